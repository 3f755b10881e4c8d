"""How does an ordinary `nn.Module` travel?

It travels as its class, and its differences from a blank module. A module has a dozen dicts, most of them empty, and pickle would
write and create each of them. Members that a blank module has too are left out, and are created again when the module is rebuilt.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

from torch import nn

from zerocopy._compat.cpython import (
    count_for,
    most_references,
    new_object,
    reference_count,
    reference_counts,
)
from zerocopy._compat.ray import registered_reducer
from zerocopy._split import reducers

_BLANK = vars(nn.Module())
_NAMES = tuple(_BLANK)
_CONTAINERS = {name: type(value) for name, value in _BLANK.items() if isinstance(value, (dict, set))}
_SCALARS = [(name, value) for name, value in _BLANK.items() if name not in _CONTAINERS]  # at present, True and None
_FILLED = [(name, _CONTAINERS[name]) for name in ("_parameters", "_buffers", "_modules")]
_HOOKS = tuple(name for name in _CONTAINERS if (name, _CONTAINERS[name]) not in _FILLED)  # most modules have no hooks
_HOOK_TYPES = [_CONTAINERS[name] for name in _HOOKS]
_hooks_of = operator.itemgetter(*_HOOKS)

# If a container has more references than these, something in addition to its module holds it. The counted holders are the
# module's dict, the copy of this dict from `__getstate__`, and, if several containers are checked together, their tuple.
_OWN, _OWN_HOOKS = count_for(2), count_for(3)


class ModuleReducer:
    """Reduces modules to their differences from a blank module. It is for one pickling, because it caches facts about classes."""

    def __init__(self) -> None:
        self._fills: dict[type, Callable[..., None] | None] = {}

    def reduce(self, module: nn.Module) -> tuple[Any, ...] | None:
        """Returns None if the class of the module has its own way to pickle, or if the differences would lose something."""
        cls = type(module)
        if cls not in self._fills:
            self._fills[cls] = _fill_of(cls)
        fill = self._fills[cls]
        if fill is None:
            return None
        members = module.__getstate__()
        if type(members) is not dict or tuple(members)[: len(_NAMES)] != _NAMES or "__reduce_ex__" in members:
            return None
        state = _differences(members)
        return new_object, (cls,), state, None, None, fill


def _fill_of(cls: Any) -> Callable[..., None] | None:
    """The function that fills a new instance of `cls`; None unless `cls` pickles like `object`: by name and `__getstate__`."""
    own = ("__new__", "__reduce_ex__", "__reduce__")
    if any(getattr(cls, name) is not getattr(object, name) for name in own) or registered_reducer(cls) is not None:
        return None
    if hasattr(cls, "__getnewargs_ex__") or hasattr(cls, "__getnewargs__") or reducers.packs_its_own(cls):
        return None
    if _layout(cls) != _layout(nn.Module):
        return None  # a base class has data of its own besides the members: a dict, a list, slots, C fields
    return _fill if cls.__setstate__ is nn.Module.__setstate__ else _set_state


def _layout(cls: type) -> tuple[int, int]:
    return cls.__basicsize__, cls.__itemsize__


def _differences(members: dict[str, Any]) -> dict[str, Any]:
    """Members that differ from those of a blank module, or that other objects hold too."""
    hooks = _hooks_of(members)
    if any(hooks) or list(map(type, hooks)) != _HOOK_TYPES or most_references(hooks) > _OWN_HOOKS:
        held = zip(_HOOKS, hooks, _HOOK_TYPES, reference_counts(hooks), strict=True)
        state = {name: hook for name, hook, cls, count in held if hook or type(hook) is not cls or count > _OWN_HOOKS}
    else:
        state = {}
    for name, cls in _FILLED:
        if members[name] or type(members[name]) is not cls or reference_count(members[name]) > _OWN:
            state[name] = members[name]
    for name, value in _SCALARS:
        if members[name] is not value:
            state[name] = members[name]
    if len(members) > len(_NAMES):
        state.update(itertools.islice(members.items(), len(_NAMES), None))
    return state


def _compiled(name: str, code: str) -> Callable[..., None]:
    """The function `name`. {} in its code becomes a literal with the members of a blank module: nothing creates them faster."""
    made = {member: "{}" if cls is dict else f"c{i}()" for i, (member, cls) in enumerate(_CONTAINERS.items())}
    names = {f"c{i}": cls for i, cls in enumerate(_CONTAINERS.values())}
    members = ", ".join(f"{member!r}: {made.get(member, repr(_BLANK[member]))}" for member in _NAMES)
    function = eval(code.format(members), {**names, "__name__": __name__, "set_attribute": object.__setattr__})
    function.__name__ = function.__qualname__ = name  # pickle finds it by this name
    compiled: Callable[..., None] = function
    return compiled


_fill = _compiled("_fill", "lambda module, state: set_attribute(module, '__dict__', {{{}, **state}})")
_set_state = _compiled("_set_state", "lambda module, state: module.__setstate__({{{}, **state}})")
