"""What is a pipeline with some of its attributes only: why the others are missing, in words."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from zerocopy._split import paths
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.tensors import is_tensor_or_array, storage_of
from zerocopy.errors import ArgumentError

_loaded_names: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_names: dict[int, tuple[str, ...]] = {}


class NotLoaded:
    """Stands on a class for an attribute that some instances were loaded without. An attribute of the instance wins."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        kind = f"{owner.__name__!r} object" if instance is not None else f"type object {owner.__name__!r}"
        text = f"{kind} has no attribute {self.name!r}"
        if instance is not None and _loaded_names.get(id(instance)) is instance:
            text += f": it was loaded with fields={list(_names[id(instance)])!r} only"
        raise AttributeError(text, name=self.name, obj=instance)


def names_of(fields: Iterable[str]) -> tuple[str, ...]:
    """The names in `fields`, each once.

    Raises:
        ArgumentError: it is a string.
    """
    if isinstance(fields, str):
        raise ArgumentError(f"fields={fields!r} is a string.", hint=f"write fields=[{fields!r}].")
    return tuple(dict.fromkeys(fields))


def values_of(pipeline: Any, fields: Sequence[str]) -> list[Any]:
    """The values of these attributes.

    Raises:
        ArgumentError: the pipeline has no such attribute, or is a bare module.
    """
    attributes = paths.attributes_of(pipeline)
    for name in fields:
        if name not in attributes:
            known = ", ".join(map(repr, attributes))
            raise ArgumentError(
                f"{type(pipeline).__name__} has no attribute {name!r} to load.", hint=f"it has {known}."
            )
    return [attributes[name] for name in fields]


def keep_only(pipeline: Any, fields: Sequence[str]) -> None:
    """Take every attribute but `fields` away from `pipeline`, and let its class say so."""
    cls = type(pipeline)
    for name in set(paths.attributes_of(pipeline)) - set(fields):
        for members in paths.member_dicts(pipeline):
            members.pop(name, None)
        if not hasattr(cls, name):
            setattr(cls, name, NotLoaded(name))
        elif hasattr(pipeline, name) and name in paths.attributes_of(pipeline):
            delattr(pipeline, name)  # a slot
    _names[id(pipeline)] = tuple(fields)
    _loaded_names[id(pipeline)] = pipeline
    weakref.finalize(pipeline, _names.pop, id(pipeline), None).atexit = False


def reach(values: Sequence[Any], tensors: Sequence[Any]) -> set[int]:
    """Positions in `tensors` of those that can be reached from `values`."""
    index = {id(tensor): position for position, tensor in enumerate(tensors)}
    memory = {
        storage_of(tensor).key: position for position, tensor in enumerate(tensors)
    }  # programs hold them by alias
    stripped = strip(list(values), zone=Zone.SHARED, split=Split.NOWHERE)
    found = [obj for obj in stripped.externals if is_tensor_or_array(obj)]
    by_memory = {memory.get(storage_of(obj).key) for obj in found} | {index.get(id(obj)) for obj in found}
    return {position for position in by_memory if position is not None}
