"""How does a loaded pipeline become the newest version in place? Its object stays, and gets the state of a new load.

The `__dict__` is replaced by one assignment, so that it never holds a mixture of two versions. Slots are copied one by one. If
another object, such as an optimizer, holds a part of the old state, this part stays as it is and keeps the old version.
"""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import torch

from zerocopy._cluster.following import warn_once
from zerocopy._cluster.handles import Tag, newest
from zerocopy._declare.pipeline import is_same_class
from zerocopy._load import devices, live
from zerocopy._seeing import events
from zerocopy._split import paths
from zerocopy.errors import ArgumentError

_CONTAINERS = (dict, list, tuple, set, frozenset)
_PASSED_THROUGH = (*_CONTAINERS, types.MappingProxyType, types.CellType, torch.nn.Module, torch.Tensor)
_FRAMES = (types.FrameType, types.GeneratorType)


def tag_of(pipeline: Any) -> Tag | None:
    """Return the tag of a live pipeline: that of its publication, or else that of its load. None without a name."""
    entry = live.entry_of(pipeline)
    tag: Tag | None = None if entry.origin is None else entry.origin.tag  # type: ignore[assignment]
    published = entry.published  # another thread may forget it
    return tag if published is None else published.weights.tag


def refresh(pipeline: Any) -> bool:
    """Update a loaded pipeline, in place, to the newest version of its name.

    The pipeline stays the same object, and gets all attributes of the new version, shared and copied. Changes that were made
    after it was loaded, such as `eval()`, are not repeated. A call that uses the pipeline during the update may see both
    versions.

    Returns:
        Whether the pipeline changed. A pipeline that was loaded from one fixed version never changes.

    Raises:
        ArgumentError: `pipeline` was not loaded from a publication with a name, or only in part; or the newest version is of
            another class; or `pipeline` is itself a dict or a list.
        As `Publication.load`: the newest version cannot be loaded. The pipeline has not changed.
    """
    origin, known = live.entry_of(pipeline).origin, tag_of(pipeline)
    loaded_as: Tag | None = None if origin is None else origin.tag  # type: ignore[assignment]
    tag = known or loaded_as  # it may have changed, and Ray then got it as a publication without a name
    if tag is None or origin is None:
        raise ArgumentError(
            f"This {type(pipeline).__name__} was not loaded from a publication with a name.",
            hint="pass a pipeline that zerocopy.lookup(...).load() returned.",
        )
    if origin.fields is not None:
        raise ArgumentError(
            f"This {type(pipeline).__name__} was loaded with fields={list(origin.fields)!r} only, and cannot change in place.",
            hint=f"load it again: zerocopy.lookup({tag.name!r}).load(fields={list(origin.fields)!r}).",
        )
    if tag.alias is None:
        return False
    latest = newest(tag.name, tag.alias)
    if known is not None and latest.tag.version == known.version:
        return False
    swap(pipeline, latest.load(origin.target or devices.CPU))
    events.refreshed(tag.name)
    return True


def swap(pipeline: Any, newer: Any) -> None:
    """Give a pipeline the state of `newer`, which was loaded only for this, and is not used again.

    Raises:
        As `refresh`.
    """
    if isinstance(pipeline, _CONTAINERS):
        raise ArgumentError(
            f"This {type(pipeline).__name__} cannot become another version in place: it is itself a dict, list, tuple or set.",
            hint="call current() of the publication for each use; in an actor or a task take a zerocopy.Live[...] parameter.",
        )
    if not is_same_class(type(pipeline), type(newer)):
        raise ArgumentError(
            f"The newest version is a {type(newer).__qualname__}, not a {type(pipeline).__qualname__}.",
            hint="publish other classes under other names.",
        )
    origin = live.entry_of(pipeline).origin
    inside = [weakref.ref(obj) for obj in _parts_of(pipeline)]  # weak: all these objects should be freed
    _take_over(pipeline, newer)
    if origin is not None and origin.memory():
        gc.collect()  # the old state may contain reference cycles
        if origin.memory():
            _warn_of_holder(pipeline, [obj for ref in inside if (obj := ref()) is not None])


def _parts_of(pipeline: Any) -> list[Any]:
    """The modules in a pipeline, and their tensors."""
    roots = paths.modules_among([pipeline, *paths.attributes_of(pipeline).values()])
    modules = [module for module in paths.registered_below(roots).values() if module is not pipeline]
    members = [held for module in (*modules, *roots) for held in list(paths.member_dicts(module))[2:]]
    tensors = [value for held in members for value in held.values() if isinstance(value, torch.Tensor)]
    return [*modules, *tensors]


def _take_over(pipeline: Any, newer: Any) -> None:
    if type(pipeline) is not type(newer):
        try:
            object.__setattr__(pipeline, "__class__", type(newer))
        except TypeError as error:  # the classes have different slots
            raise ArgumentError(
                f"{type(newer).__qualname__} was defined again, and objects of the old class cannot change to the new one: "
                f"{error}.",
                hint="load the newest version: zerocopy.lookup(...).load().",
            ) from error
    for base in type(newer).__mro__:
        for name, slot in vars(base).items():
            if isinstance(slot, types.MemberDescriptorType) and name != "__weakref__":
                _copy_slot(pipeline, newer, name)
    if hasattr(newer, "__dict__"):
        object.__setattr__(pipeline, "__dict__", newer.__dict__)
    entry, other = live.entry_of(pipeline), live.entry_of(newer)
    entry.origin, entry.published = other.origin, None
    if other is not entry:  # an object without declarations is known by its modules, which are now the same
        live.forget(newer)


def _copy_slot(pipeline: Any, newer: Any, name: str) -> None:
    if hasattr(newer, name):
        object.__setattr__(pipeline, name, getattr(newer, name))
    elif hasattr(pipeline, name):
        object.__delattr__(pipeline, name)


def _warn_of_holder(pipeline: Any, parts: list[Any]) -> None:
    holder = _holder_of(parts)
    if isinstance(holder, types.ModuleType):
        who = f"A global of the module {holder.__name__!r}"
    else:
        who = "Something" if holder is None else f"An object of the class {type(holder).__qualname__!r}"
    warn_once(
        f"{who} still holds a part of an older version of {type(pipeline).__name__}, and keeps using it: only the attributes of "
        "the pipeline itself were replaced. Make such objects again after each new version: an actor with follow=True in its "
        "method on_version(self, pipeline), other code after refresh()."
    )


def _holder_of(parts: list[Any]) -> Any:
    """Find an object that refers to some parts of a pipeline, and is neither another part nor a plain container."""
    known = {id(parts), *map(id, parts)}
    reached = parts
    for _ in range(_DEPTH):
        referrers = [obj for obj in gc.get_referrers(*reached) if id(obj) not in known and not isinstance(obj, _FRAMES)]
        known |= {id(reached), id(referrers), *map(id, referrers)}
        found = next((obj for obj in referrers if not isinstance(obj, _PASSED_THROUGH)), None)
        if found is not None or not referrers:
            return found
        reached = referrers
    return None


_DEPTH = 5  # nested containers
