"""How does a pipeline with only some of its attributes work, and how does it explain why the others are missing?"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from zerocopy._split import paths
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.storages import storage_of
from zerocopy._store.tensors import is_tensor_or_array
from zerocopy._words import nearest
from zerocopy.errors import ArgumentError

_lock = threading.RLock()  # reentrant: the garbage collector may finalize an instance in a thread that holds the lock


class NotLoaded:
    """Stands in for an attribute on a class, as long as there are instances that were loaded without it.

    If an instance has the attribute, the instance's attribute is used.

    Attributes:
        fields: the fields that these instances were loaded with, by id of the instance.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[int, tuple[str, ...]] = {}

    def __get__(self, instance: object, owner: type) -> NoReturn:
        kind = f"{owner.__name__!r} object" if instance is not None else f"type object {owner.__name__!r}"
        text = f"{kind} has no attribute {self.name!r}"
        fields = self.fields.get(id(instance))
        if fields is not None:
            text += (
                f": it was loaded with fields={list(fields)!r} only. Hint: load it with {self.name!r} among the fields."
            )
        raise AttributeError(text, name=self.name, obj=instance)

    def __reduce__(self) -> tuple[Any, ...]:
        return NotLoaded, (self.name,)  # a class that is pickled by value includes it, without the instances


def names_of(names: Iterable[str], argument: str = "fields") -> tuple[str, ...]:
    """The names in an argument of a call, each once.

    Raises:
        ArgumentError: the argument is a string, or not a list of names.
    """
    if isinstance(names, str):
        raise ArgumentError(f"{argument}={names!r} is a string.", hint=f"write {argument}=[{names!r}].")
    found = tuple(names) if isinstance(names, Iterable) else (names,)
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in found):
        raise ArgumentError(f"{argument}={names!r} is not a list of names.", hint=f"write {argument}=['encoder'], say.")
    return tuple(dict.fromkeys(found))


def values_of(pipeline: Any, fields: Sequence[str]) -> list[Any]:
    """The values of these attributes.

    Raises:
        ArgumentError: the pipeline has no such attribute, or is a bare module.
    """
    attributes = paths.attributes_of(pipeline)
    for name in fields:
        if name not in attributes:
            known = ", ".join(map(repr, attributes)) or "none"
            raise ArgumentError(
                f"{type(pipeline).__name__} has no attribute {name!r} to load.",
                hint=nearest(name, list(attributes), f"its attributes are {known}."),
            )
    return [attributes[name] for name in fields]


def keep_only(pipeline: Any, fields: Sequence[str]) -> None:
    """Remove every attribute except `fields` from `pipeline`. While it lives, its class explains why they are missing."""
    cls = type(pipeline)
    missing = [name for name in paths.attributes_of(pipeline) if name not in fields]
    for members in paths.member_dicts(pipeline):
        for name in missing:
            members.pop(name, None)
    for name in paths.attributes_of(pipeline).keys() & set(missing):
        delattr(pipeline, name)  # a slot
    unexplained = [name for name in missing if not _has_own(cls, name)]
    weakref.finalize(pipeline, _forget, cls, unexplained, id(pipeline)).atexit = False
    with _lock:
        for name in unexplained:
            found = vars(cls).get(name)
            stand_in = found if isinstance(found, NotLoaded) else NotLoaded(name)
            stand_in.fields[id(pipeline)] = tuple(fields)
            if vars(cls).get(name) is not stand_in:
                setattr(cls, name, stand_in)


def _has_own(cls: type, name: str) -> bool:
    """Whether the class has a slot or a default of this name."""
    return any(not isinstance(vars(base)[name], NotLoaded) for base in cls.__mro__ if name in vars(base))


def _forget(cls: type, names: Sequence[str], instance_id: int) -> None:
    with _lock:
        for name in names:
            stand_in = vars(cls).get(name)
            if not isinstance(stand_in, NotLoaded):
                continue  # the user has replaced the stand-in
            stand_in.fields.pop(instance_id, None)
            if not stand_in.fields:
                delattr(cls, name)


def reach(values: Sequence[Any], tensors: Sequence[Any]) -> set[int]:
    """Positions of the tensors in `tensors` that can be reached from `values`."""
    by_id = {id(tensor): position for position, tensor in enumerate(tensors)}
    # Programs hold other tensor objects over the same memory.
    by_memory = {storage_of(tensor).key: position for position, tensor in enumerate(tensors)}
    stripped = strip(list(values), zone=Zone.SHARED, split=Split.NOWHERE)
    reached = [obj for obj in stripped.externals if is_tensor_or_array(obj)]
    found = {by_memory.get(storage_of(obj).key) for obj in reached} | {by_id.get(id(obj)) for obj in reached}
    return {position for position in found if position is not None}
