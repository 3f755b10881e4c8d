"""How does an ordinary `nn.Module` travel: as its class, and what tells it from a blank one.

A module keeps a dozen dicts, most of them empty, and pickle would write and make each of them. What a blank module has too
is left out, and made again where the module is rebuilt.
"""

from __future__ import annotations

import copyreg
import operator
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

_blank = nn.Module()
_BLANK = vars(_blank)
_NAMES = tuple(_BLANK)
_CONTAINERS = {name: type(value) for name, value in _BLANK.items() if isinstance(value, (dict, set))}
_TYPES = list(_CONTAINERS.values())
_SCALARS = {name: value for name, value in _BLANK.items() if name not in _CONTAINERS}  # True and None, today
_containers_of = operator.itemgetter(*_CONTAINERS)


def _reference_counts(containers: tuple[Any, ...]) -> list[int]:
    return list(map(sys.getrefcount, containers))


# More references to a container than these tell that something else holds it, too.
_members = _blank.__getstate__()
_OWN = max(_reference_counts(_containers_of(_members)))


def _is_ordinary(cls: Any) -> bool:
    """Whether instances of `cls` pickle as `object` does it: by their class and what `__getstate__` gives."""
    own = ("__reduce_ex__", "__reduce__")
    if any(getattr(cls, name) is not getattr(object, name) for name in own) or cls in copyreg.dispatch_table:
        return False
    if hasattr(cls, "__getnewargs_ex__") or hasattr(cls, "__getnewargs__"):
        return False
    slots: list[str] = copyreg._slotnames(cls)  # type: ignore[attr-defined]
    return not slots


def reduce_module(module: nn.Module) -> tuple[Any, ...] | None:
    """A module by its difference from a blank one; None where its class has a way of its own, or that would not tell all."""
    cls: Any = type(module)
    if not _is_ordinary(cls):
        return None
    members = module.__getstate__()
    if type(members) is not dict or tuple(members)[: len(_NAMES)] != _NAMES:
        return None
    containers = _containers_of(members)
    told = zip(_CONTAINERS, containers, _TYPES, _reference_counts(containers), strict=True)
    blank = {name for name, value, cls, count in told if not value and type(value) is cls and count <= _OWN}
    blank |= {name for name, value in _SCALARS.items() if members[name] is value}
    state = {name: value for name, value in members.items() if name not in blank}
    fill = _fill if cls.__setstate__ is nn.Module.__setstate__ else _set_state
    return copyreg.__newobj__, (cls,), state, None, None, fill  # type: ignore[attr-defined]


def _compiled(name: str, code: str) -> Callable[..., None]:
    """The function `name`, in whose code {} stands for the members of a blank module, in order: nothing makes them faster."""
    made = {member: "{}" if cls is dict else f"c{i}()" for i, (member, cls) in enumerate(_CONTAINERS.items())}
    names = {f"c{i}": cls for i, cls in enumerate(_CONTAINERS.values())}
    members = ", ".join(f"{member!r}: {made.get(member, repr(_BLANK[member]))}" for member in _NAMES)
    function = eval(code.format(members), {**names, "__name__": __name__, "set_attribute": object.__setattr__})
    function.__name__ = function.__qualname__ = name  # under which pickle finds it
    compiled: Callable[..., None] = function
    return compiled


_fill = _compiled("_fill", "lambda module, state: set_attribute(module, '__dict__', {{{}, **state}})")
_set_state = _compiled("_set_state", "lambda module, state: module.__setstate__({{{}, **state}})")
