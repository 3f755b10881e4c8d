"""Which live pipelines does this process know, where were they loaded from, and with which weights are they published?"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import attrs
import ray
import torch

from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.held_models import models_in
from zerocopy._store import object_store
from zerocopy._store.mapping import PrivateMap, detach_all
from zerocopy.errors import ArgumentError, IsolationError


class Tag(Protocol):
    """Identifies weights that have a name."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def number(self) -> int | None:
        """The number of the version, once it is known."""

    def publication(self, manifest: ray.ObjectRef[Any], outer: Any, *description: Any, **kwargs: Any) -> Any:
        """A handle to the weights, given the reference to the manifest. See `Publication`."""

    def find(self) -> ray.ObjectRef[Any] | None:
        """The reference to the manifest of the weights; None if they are gone."""


class Origin:
    """Where a loaded pipeline came from. The reference keeps the weights in the store.

    Attributes:
        session: the connection to Ray that the reference belongs to.
        tag: identifies the weights for `_cluster`, if they have a name.
        target: the device of the fields that declare no device.
        fields: the attributes that were loaded, None for all.
    """

    def __init__(
        self,
        manifest: ray.ObjectRef[Any],
        shared_bytes: int,
        memory: Iterable[Any],
        tag: Tag | None = None,
        target: torch.device | None = None,
        fields: Sequence[str] | None = None,
    ) -> None:
        """`memory`: the mapped memory that the tensors are views of. It is not kept alive."""
        self.manifest = manifest
        self.shared_bytes = shared_bytes
        self.tag = tag
        self.target = target
        self.fields = fields
        self.session = object_store.session()
        self._memory = list(map(weakref.ref, memory))

    def memory(self) -> list[Any]:
        """The mapped memory that is still in use."""
        return [memory for ref in self._memory if (memory := ref()) is not None]


@attrs.define(eq=False)
class Entry:
    """What this process knows about one live pipeline.

    Attributes:
        anchors: weak references to the objects that identify it.
        origin: where it was loaded from, if it was loaded.
        published: its published weights, if it is published. `_publish` sets them, and `_cluster.refresh` reads their tag.
    """

    anchors: tuple[Callable[[], Any], ...]
    origin: Origin | None = None
    published: Any = None


_Key: TypeAlias = tuple[tuple[int, ...], tuple[str, ...]]
_entries: dict[_Key, Entry] = {}


def entry_of(pipeline: Any, variant: tuple[str, ...] = ()) -> Entry:
    """The entry of `pipeline`, published in the way `variant`. It is created if it does not exist."""
    anchors, key = _anchored(pipeline, variant)
    entry = _entries.get(key)
    if entry is None or any(anchor() is None for anchor in entry.anchors):
        if not all(type(anchor).__weakrefoffset__ for anchor in anchors):  # it cannot be remembered
            return Entry(())
        entry = _entries[key] = Entry(tuple(weakref.ref(anchor, lambda ref: _remove(key, ref)) for anchor in anchors))
    return entry


def _anchored(pipeline: Any, variant: tuple[str, ...] = ()) -> tuple[list[Any], _Key]:
    """The objects that identify a pipeline, and the key of its entry: their ids, and how the pipeline holds them.

    A model, and a pipeline of a declared class, are identified by themselves. Any other object is identified by the nearest
    modules in it and by their places: the object may have been created for one call, or be a dict, which does not support weak
    references.
    """
    cls = type(pipeline)
    if is_pipeline_class(cls) or paths.is_module(pipeline):
        return [pipeline], ((id(pipeline),), variant)
    held: list[tuple[object, Any]] = list(models_in(pipeline))
    if not held:  # the model is deeper inside
        held = list(itertools.islice((found for found in paths.walk(pipeline, "") if paths.is_module(found[1])), 1))
    anchors = [model for _, model in held] or [pipeline]
    return anchors, (
        tuple(map(id, anchors)),
        (f"in {cls.__qualname__}", *(_place(steps) for steps, _ in held), *variant),
    )


def _place(steps: Any) -> str:
    """The place of a model, as text. Calls no code of the user's objects."""
    return "".join(f"{form}{key if type(key) in (str, int) else type(key).__qualname__}" for form, key in steps)


def _remove(key: _Key, ref: weakref.ref[Any]) -> None:
    entry = _entries.get(key)
    if entry is not None and any(anchor is ref for anchor in entry.anchors):
        del _entries[key]


def entries() -> Iterable[Entry]:
    """The entries of all live pipelines."""
    return list(_entries.values())


def note_load(pipeline: Any, origin: Origin) -> None:
    """Remember where a pipeline was loaded from, as long as the pipeline lives."""
    entry_of(pipeline).origin = origin


def forget(pipeline: Any) -> None:
    """Forget a live pipeline, and drop the references to its weights."""
    _entries.pop(_anchored(pipeline)[1], None)


def unshare(pipeline: Any) -> None:
    """Copy the weights of a loaded pipeline into private memory, so that it no longer needs the object store.

    Use it to free memory of the store: a loaded pipeline stays valid without it. Tensors and arrays keep their identity, their
    ties and their contents, and other threads may use them during the copy. The copy takes as much memory as the weights. In
    contrast, `publication.close()` only releases a handle, and copies nothing.

    Args:
        pipeline: a pipeline that `publication.load()` returned.

    Raises:
        ArgumentError: `pipeline` was not loaded from a publication in this process.
        IsolationError: it was loaded where private mappings are not possible. Use `copy.deepcopy` instead.
        OutOfMemoryError: there is not enough memory. Nothing was changed.
    """
    entry = entry_of(pipeline)
    if entry.origin is None:
        raise ArgumentError(
            f"This {type(pipeline).__name__} was not loaded from a publication in this process.",
            hint="pass a pipeline that publication.load() returned, or that arrived in a task or an actor.",
        )
    memories = entry.origin.memory()
    if not all(isinstance(memory, PrivateMap) for memory in memories):
        raise IsolationError(
            f"This {type(pipeline).__name__} was loaded where private mappings are not possible, so unshare() cannot copy it.",
            hint="use copy.deepcopy(pipeline).",
        )
    detach_all(memories)
    entry.origin = entry.published = None
