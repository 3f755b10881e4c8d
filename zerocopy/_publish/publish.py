"""Which live pipelines of this process are published, as what, and are they still the same."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import attrs
import ray

from zerocopy._changes.snapshot import LoadedMarks, Snapshot
from zerocopy._compat.cpython import collector_paused
from zerocopy._load.publication import Loaded, Publication, Versions, observe_loads
from zerocopy._publish.adoption import Adoption
from zerocopy._publish.weights import Weights, put, put_and_adopt, put_streaming
from zerocopy._split.introspect import (
    Introspection,
    Known,
    Outer,
    Subject,
    UnknownRoot,
    introspect,
    make_outer,
    require_pipeline,
)
from zerocopy._store import mapping, object_store
from zerocopy._store.tensors import Storage
from zerocopy._store.write import Placement, manifest_of
from zerocopy.errors import ArgumentError, IsolationError


class Lease:
    """Held by the publications that were made by hand of one pipeline: while one lives, its weights are remembered."""


@attrs.define(eq=False)
class _Entry:
    """What is known of one live pipeline."""

    pipeline: Callable[[], Any]
    weights: Weights | None = None
    automatic: bool = False  # remembered as long as the pipeline lives, whoever has a lease
    lease: Callable[[], Lease | None] = lambda: None
    origin: _Origin | None = None

    def remember(self, weights: Weights, *, automatic: bool) -> None:
        self.weights = weights
        self.automatic = self.automatic or automatic

    def lease_weights(self) -> Lease:
        lease = self.lease()
        if lease is None:
            lease = Lease()
            self.lease = weakref.ref(lease, lambda _: self.forget_unless_needed())
        return lease

    def forget_unless_needed(self) -> None:
        if not self.automatic and self.lease() is None:
            self.weights = None


@attrs.define(eq=False)
class _Origin:
    """Where a loaded pipeline came from. The publication's reference keeps the weights in the store."""

    manifest: ray.ObjectRef[Any]
    shared_bytes: int
    marks: LoadedMarks
    session: object


_Key: TypeAlias = tuple[int, tuple[str, ...]]
_entries: dict[_Key, _Entry] = {}
_lock = threading.RLock()


def _entry_of(pipeline: Any, variant: tuple[str, ...] = ()) -> _Entry:
    """What is known of `pipeline`, published in some way. Of a dict, say, nothing can be remembered."""
    key = id(pipeline), variant
    entry = _entries.get(key)
    if entry is None or entry.pipeline() is not pipeline:
        if not type(pipeline).__weakrefoffset__:
            return _Entry(lambda: pipeline)
        entry = _entries[key] = _Entry(weakref.ref(pipeline, lambda ref: _forget(key, ref)))
    return entry


def _forget(key: _Key, ref: weakref.ref[Any]) -> None:
    entry = _entries.get(key)
    if entry is not None and entry.pipeline is ref:
        del _entries[key]


def publish(pipeline: Any, *, adopt: bool = False) -> Publication:
    """Put the weights of `pipeline` into the object store, once, and return a small handle to them.

    Publishing the same pipeline again shares one set of weights as long as no byte of it has changed. The weights leave
    the store when the last handle and the last pipeline loaded from one are gone.

    Args:
        pipeline: an instance of a `@zerocopy.pipeline` class, or a bare `nn.Module`.
        adopt: re-point its tensors at the store, each part as soon as it is written, so that this process keeps no second
            copy. Tensors keep their identity and ties, and a write to them stays private. Memory that something else
            has a view of, NumPy arrays and TorchScript stay where they are. After an error everything is as before.

    Raises:
        ArgumentError: `pipeline` is neither.
        IsolationError: `adopt` was asked for where private mappings are not possible.
        CannotTravelError: something inside cannot leave the process; the error names its path.
        StoreTooSmallError: the weights are larger than this node's object store.
        RayClientError: this process is connected through Ray Client.
    """
    require_pipeline(pipeline, "zerocopy.publish")
    return publish_subject(Subject(pipeline), pipeline, adopt=adopt)


def publish_subject(
    subject: Subject, anchor: Any, variant: tuple[str, ...] = (), *, adopt: bool = False
) -> Publication:
    """Publish any object that holds models.

    Args:
        anchor: as long as it lives, publishing the same `variant` with it again shares these weights.
        variant: what tells this way to publish from others.
        adopt: as `publish`.

    Raises:
        As `publish`, but for ArgumentError.
    """
    object_store.require()
    with _lock, collector_paused():
        entry = _entry_of(anchor, variant)
        _current_weights(subject.pipeline, entry)
        weights = entry.weights
        found = introspect(subject)
        same = weights.verified(found) if weights is not None else set[object]()
        outer = None
        if weights is not None and len(same) == len(found.table.storages) and weights.describe(found):
            outer = found.outer if weights.skeleton is not None else _outer_over(weights, subject.pipeline)
        adoption = Adoption(found) if adopt else None
        if adoption is not None and adoption.is_possible():
            stored = weights.placements if weights is not None and outer is not None else _verified_places(found)
            weights, outer = put_and_adopt(subject, found, stored, adoption)
            entry.origin = _adopted_origin(weights, adoption)
        elif weights is None or outer is None:
            weights = put(found, _verified_places(found))
            outer = found.outer
        lease = entry.lease_weights()
        entry.remember(weights, automatic=False)
        publication = _handle(subject.pipeline, weights, outer)
        publication._lease, publication._close = lease, _let_go
        return publication


def publish_automatically(pipeline: Any) -> Publication:
    """A handle to the weights of `pipeline`, which are published now if they never were, or have changed since.

    The weights stay in the store as long as the pipeline lives.
    """
    object_store.require()
    with _lock, collector_paused():
        entry = _entry_of(pipeline)
        weights = _current_weights(pipeline, entry)
        outer = _outer_over(weights, pipeline) if weights is not None else None
        if weights is not None and outer is not None:
            entry.remember(weights, automatic=True)
            return _handle(pipeline, weights, outer)
        found = introspect(Subject(pipeline))
        weights = put(found, _unchanged_places())
        entry.remember(weights, automatic=True)
        return _handle(pipeline, weights, found.outer)


def _published() -> list[Weights]:
    """The weights of every pipeline of this process that the store has still."""
    return [entry.weights for entry in _entries.values() if entry.weights is not None]


def _unchanged_places() -> dict[object, Placement]:
    """Where storages are that need not be written again, as far as version counters tell; whatever pipeline they are of."""
    return {key: place for weights in _published() for key, place in weights.unchanged().items()}


def _verified_places(found: Introspection) -> dict[object, Placement]:
    """The same for the storages of `found`, byte by byte."""
    places: dict[object, Placement] = {}
    for weights in _published():
        places.update({key: weights.placements[key] for key in weights.verified(found) if key in weights.placements})
    return places


def _outer_over(weights: Weights, pipeline: Any) -> Outer | None:
    """The outer skeleton of `pipeline` over these weights, if they hold all that it shares now."""
    try:
        return make_outer(pipeline, weights.known)
    except UnknownRoot:
        return None


def _current_weights(pipeline: Any, entry: _Entry) -> Weights | None:
    if entry.weights is not None and entry.weights.are_current():
        return entry.weights
    passed_on = _weights_of_origin(pipeline, entry.origin) if entry.origin is not None else None
    entry.weights = passed_on or entry.weights
    return passed_on


def _weights_of_origin(pipeline: Any, origin: _Origin) -> Weights | None:
    """The weights that a loaded pipeline came from, if it still has all of them and no others."""
    if origin.session is not object_store.session():
        return None
    manifest = manifest_of(origin.manifest)
    if not origin.marks.are_same(manifest):
        return None
    found = introspect(Subject(pipeline))
    index = origin.marks.index()
    if not all(key in index for key in found.table.index):
        return None
    storages = {}
    for obj, spec in zip(found.table.objects, found.table.specs, strict=True):
        published = manifest.specs[index[id(obj)]]
        if spec.flag != published.flag:
            return None
        storages[found.table.storages[spec.storage].key] = published.storage
    known = Known(
        index, storages, found.known.roots, frozenset(), found.known.loose, len(manifest.specs), len(manifest.locations),
        whole=True,
    )  # fmt: skip
    return Weights(
        origin.manifest, origin.shared_bytes, known, Snapshot(found.table, found.wholes, found.mutable),
        {}, None, (), origin.session, found.pieces,
    )  # fmt: skip


def _adopted_origin(weights: Weights, adoption: Adoption) -> _Origin:
    shards = [weights.manifest, *manifest_of(weights.manifest).shards]  # as locations number them
    marks = LoadedMarks(adoption.tensors(), {shards.index(ref): mapped for ref, mapped in adoption.mapped})
    return _Origin(weights.manifest, weights.shared_bytes, marks, weights.session)


def put_once(
    pipeline: Any,
    found: Introspection,
    about_to_write: Callable[[Iterable[Storage]], None],
    written: Callable[[Iterable[Storage]], None],
) -> Publication:
    """Publish a pipeline that nobody will change or publish again; see `put_streaming`.

    Raises:
        StoreTooSmallError: the weights are larger than this node's object store.
    """
    publication = _handle(pipeline, put_streaming(found, about_to_write, written), found.outer)
    publication._close = _let_go
    return publication


def _handle(pipeline: Any, weights: Weights, outer: Outer) -> Publication:
    required = os.environ.get(mapping.REQUIRE_ISOLATION, "0") not in ("", "0")
    publication = Publication(
        (weights.manifest, outer), type(pipeline).__name__, weights.shared_bytes, required, Versions.here()
    )
    publication.cls = type(pipeline)
    return publication


def _let_go(manifest: ray.ObjectRef[Any]) -> None:
    """Give up automatic publishing's hold on closed weights as well, and what closures have pinned."""
    with _lock:
        for entry in _entries.values():
            if entry.weights is not None and entry.weights.manifest == manifest:
                entry.automatic = False
                entry.forget_unless_needed()
    object_store.unpin(manifest)


def _remember(publication: Publication, loaded: Loaded) -> None:
    entry = _entry_of(loaded.pipeline)
    entry.origin = _Origin(
        loaded.manifest,
        publication.shared_bytes,
        loaded.marks,
        object_store.session(),
    )


observe_loads(_remember)


def forget(pipeline: Any) -> None:
    """Let go of what is known of a live pipeline, and so of the references to its weights."""
    _entries.pop((id(pipeline), ()), None)


def unshare(pipeline: Any) -> None:
    """Give a loaded pipeline private memory of its own: it needs the object store no longer.

    Tensors and arrays keep their identity, their ties and their contents. Takes the bytes of the weights in memory. Call it
    before `ray.shutdown()` in a process that keeps using the pipeline.

    Raises:
        ArgumentError: `pipeline` was not loaded from a publication in this process.
        IsolationError: it was loaded where private mappings are not possible; `copy.deepcopy` it instead.
    """
    entry = _entries.get((id(pipeline), ()))
    if entry is None or entry.pipeline() is not pipeline or entry.origin is None:
        raise ArgumentError(
            f"This {type(pipeline).__name__} was not loaded from a publication in this process.",
            hint="unshare() takes what publication.load() returned, or what arrived in a task or an actor.",
        )
    memories = entry.origin.marks.memories()
    for memory in memories:
        if not isinstance(memory, mapping.PrivateMap):
            raise IsolationError(
                f"This {type(pipeline).__name__} uses Ray's own mapping, which cannot be taken over.",
                hint="use copy.deepcopy(pipeline).",
            )
    for memory in memories:
        memory.detach()
    entry.origin = None
    entry.weights = None
