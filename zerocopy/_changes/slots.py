"""What do modules hold by name, and is it still the same: asked at every pass, so a step of Python for each would be too slow.

Whole lists are taken out of all modules, and compared.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from zerocopy._compat.torch import hooks_registered

Own: TypeAlias = dict[str, Any]  # the `__dict__` of a module

_MEMBERS = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name not in _MEMBERS)
_SLOTS = {"training", *_MEMBERS, *_HOOKS}
_training_of, _members_of, _hooks_of = (operator.itemgetter(*names) for names in (("training",), _MEMBERS, _HOOKS))
_flatten = itertools.chain.from_iterable


def has_slots(module: nn.Module) -> bool:
    """Whether a module keeps its own members: it is neither TorchScript nor a compiled module around another one."""
    return not isinstance(module, torch.jit.ScriptModule) and vars(module).keys() >= _SLOTS


def members_of(owns: Iterable[Own]) -> list[dict[str, Any]]:
    """Of each module the parameters, the buffers and the children."""
    return list(_flatten(map(_members_of, owns)))


class Hooks:
    """The hooks of some modules. They are looked at only when one was registered in this process since: there are many."""

    def __init__(self, owns: Iterable[Own]) -> None:
        self._state = _hooks(owns)
        self._registered = hooks_registered()

    def are_same(self, owns: Iterable[Own]) -> bool:
        registered = hooks_registered()
        if registered == self._registered:
            return True
        if _hooks(owns) != self._state:
            return False
        self._registered = registered
        return True


def _hooks(owns: Iterable[Own]) -> tuple[list[Any], ...]:
    return _names_and_objects(filter(None, _flatten(map(_hooks_of, owns))))  # no two hooks have one name


class HeldSlots:
    """Parameters, buffers, children, modes and hooks of some modules, and how many attributes they have.

    Keeps all of it alive: so nothing has to be looked up, and values are compared without a look at them if they are the same.
    """

    def __init__(self, owns: Sequence[Own]) -> None:
        self._owns = owns
        members = members_of(owns)
        self._empty = [held for held in members if not held]
        self._filled = [held for held in members if held]
        self._names = list(_flatten(self._filled))
        self._values = list(_flatten(map(dict.values, self._filled)))
        self._hooks = Hooks(owns)
        self.note_modes()

    def note_modes(self) -> None:
        """Note anew what modes the modules are in."""
        self._modes = list(map(_training_of, self._owns))
        self._counts = list(map(len, self._owns))

    def are_same(self) -> Iterator[bool]:
        """Whether all is as it was, in parts that take a fraction of a millisecond for a thousand modules.

        Raises:
            Exception: whatever the comparison of values that are not the same raises.
        """
        yield self._hooks.are_same(self._owns)
        yield list(map(_training_of, self._owns)) == self._modes and list(map(len, self._owns)) == self._counts
        yield not any(self._empty)
        yield list(_flatten(self._filled)) == self._names
        yield list(_flatten(map(dict.values, self._filled))) == self._values


class Slots:
    """Parameters, buffers, children, tensors in attributes, modes and hooks of some modules, none of which it refers to."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        owns = list(map(vars, modules))
        kinds = {cls for cls in set(map(type, _flatten(map(dict.values, owns)))) if issubclass(cls, torch.Tensor)}
        self._attributes = [
            (position, name)
            for position, own in enumerate(owns if kinds else ())
            for name, value in own.items()
            if type(value) in kinds
        ]
        self._state = self._look(owns)
        self._hooks = Hooks(owns)

    def are_same(self, modules: Sequence[nn.Module]) -> bool:
        owns = list(map(vars, modules))
        return self._look(owns) == self._state and self._hooks.are_same(owns)

    def _look(self, owns: Sequence[Own]) -> tuple[list[Any], ...]:
        attributes = [id(owns[position].get(name)) for position, name in self._attributes]
        return list(map(_training_of, owns)), list(map(len, owns)), *_names_and_objects(members_of(owns)), attributes


def _names_and_objects(dicts: Iterable[dict[str, Any]]) -> tuple[list[Any], ...]:
    every = list(dicts)
    filled = list(filter(None, every))
    return list(map(len, every)), list(_flatten(filled)), list(map(id, _flatten(map(dict.values, filled))))
