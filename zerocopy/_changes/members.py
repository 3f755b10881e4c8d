"""Which members do modules have by name, and have these changed?

This check runs each time a pipeline is passed, so a Python step per module would be too slow. Instead, whole lists are extracted
from all modules at once, and compared.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from zerocopy._compat.torch import hooks_registered

Vars: TypeAlias = dict[str, Any]  # the result of `vars(module)`

_MEMBERS = ("_parameters", "_buffers", "_modules")
TENSORS = (torch.Tensor, np.ndarray)
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name not in _MEMBERS)
_ALWAYS_THERE = {"training", *_MEMBERS, *_HOOKS}
_training_of, _members_of, _hooks_of = (operator.itemgetter(*names) for names in (("training",), _MEMBERS, _HOOKS))
_flatten = itertools.chain.from_iterable


def has_members(module: nn.Module) -> bool:
    """Whether a module keeps its own members: it is neither TorchScript nor a compiled module around another one."""
    return not isinstance(module, torch.jit.ScriptModule) and vars(module).keys() >= _ALWAYS_THERE


class Members:
    """Classes, parameters, buffers, children, tensors in attributes, modes and hooks of some modules. Keeps none alive."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        module_vars = list(map(vars, modules))
        kinds = {cls for cls in set(map(type, _flatten(map(dict.values, module_vars)))) if issubclass(cls, TENSORS)}
        self._attributes = [
            (position, name)
            for position, held in enumerate(module_vars if kinds else ())
            for name, value in held.items()
            if type(value) in kinds
        ]
        self._classes = _classes_of(modules)
        self._state, values = self._look(module_vars)
        self._tensors = [isinstance(value, TENSORS) for value in values]
        self._hooks = _Hooks(module_vars)

    def tensors(self, modules: Sequence[nn.Module]) -> list[Any] | None:
        """The tensors that the same modules hold, always in the same order; None if the modules have changed."""
        module_vars = list(map(vars, modules))
        state, values = self._look(module_vars)
        if state != self._state or _classes_of(modules) != self._classes or not self._hooks.is_unchanged(module_vars):
            return None
        attributes = [module_vars[position][name] for position, name in self._attributes]
        return [*itertools.compress(values, self._tensors), *attributes]

    def _look(self, module_vars: Sequence[Vars]) -> tuple[tuple[list[Any], ...], list[Any]]:
        """The lists to compare, and the values of all members."""
        members: list[Vars] = list(_flatten(map(_members_of, module_vars)))
        filled = list(filter(None, members))
        values = list(_flatten(map(dict.values, filled)))
        return (
            list(map(_training_of, module_vars)),
            list(map(len, module_vars)),
            list(map(len, members)),
            list(_flatten(filled)),
            list(map(id, values)),
            [id(module_vars[position].get(name)) for position, name in self._attributes],
        ), values


def _classes_of(modules: Sequence[nn.Module]) -> list[int]:
    """Ids of the classes. A notebook can assign a redefined class to the `__class__` of an object, as `%autoreload` does."""
    return list(map(id, map(type, modules)))


class HeldMembers:
    """Parameters, buffers, children, modes and hooks of some modules, and the number of their attributes.

    Keeps all of them alive. So no lookup is needed, and an object is compared with itself quickly.
    """

    def __init__(self, module_vars: Sequence[Vars]) -> None:
        self._module_vars = module_vars
        members: list[Vars] = list(_flatten(map(_members_of, module_vars)))
        self._empty = [held for held in members if not held]
        self._filled = [held for held in members if held]
        self._names = list(_flatten(self._filled))
        self._values = list(_flatten(map(dict.values, self._filled)))
        self._hooks = _Hooks(module_vars)
        self.record_modes()

    def record_modes(self) -> None:
        """Record the present modes of the modules, and the number of their attributes."""
        self._modes = list(map(_training_of, self._module_vars))
        self._counts = list(map(len, self._module_vars))

    def parts_unchanged(self) -> Iterator[bool]:
        """Yields for each part whether it is unchanged. A part takes a fraction of a millisecond for a thousand modules.

        Raises:
            Exception: any error from the comparison of two different objects.
        """
        yield self._hooks.is_unchanged(self._module_vars)
        yield (
            list(map(_training_of, self._module_vars)) == self._modes
            and list(map(len, self._module_vars)) == self._counts
        )
        yield not any(self._empty)
        yield list(_flatten(self._filled)) == self._names
        yield list(_flatten(map(dict.values, self._filled))) == self._values


class _Hooks:
    """The hooks of some modules. There are many dicts of hooks, and almost all are empty.

    They are compared only after this process has registered another hook. Before that, hooks can only have been removed.
    """

    def __init__(self, module_vars: Sequence[Vars]) -> None:
        dicts = list(_flatten(map(_hooks_of, module_vars)))
        filled = itertools.compress(itertools.count(), dicts)
        self._counts = [(*divmod(place, len(_HOOKS)), len(dicts[place])) for place in filled]  # module, dict, hooks
        self._state = self._state_of(module_vars)
        self._registered = hooks_registered()

    def is_unchanged(self, module_vars: Sequence[Vars]) -> bool:
        registered = hooks_registered()
        if registered == self._registered:
            return all(len(module_vars[module][_HOOKS[which]]) == count for module, which, count in self._counts)
        if self._state_of(module_vars) != self._state:
            return False
        self._registered = registered
        return True

    @staticmethod
    def _state_of(module_vars: Iterable[Vars]) -> tuple[list[Any], ...]:
        return _names_and_ids(filter(None, _flatten(map(_hooks_of, module_vars))))  # no two hooks have the same name


def _names_and_ids(dicts: Iterable[dict[Any, Any]]) -> tuple[list[Any], ...]:
    """The sizes of some dicts, the names in all of them, and the ids of all their values."""
    every = list(dicts)
    filled = list(filter(None, every))
    return list(map(len, every)), list(_flatten(filled)), list(map(id, _flatten(map(dict.values, filled))))
