"""Which live pipelines of this process are published, as what, and are they still the same."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import ray

from zerocopy import _mapping, _store
from zerocopy._introspector import (
    Introspection,
    Known,
    Outer,
    UnknownRoot,
    introspect,
    make_outer,
    require_pipeline,
)
from zerocopy._publication import Loaded, Publication, Versions, observe_loads
from zerocopy._shards import Manifest, Placement, StoredMemory, locate, put_storages
from zerocopy._snapshot import Snapshot, TensorMarks, reference
from zerocopy._tensors import TensorSpec
from zerocopy.errors import ArgumentError, IsolationError


@attrs.define(eq=False, weakref_slot=True)
class Weights:
    """Published weights, and the state of the live pipeline that they are the weights of."""

    manifest: ray.ObjectRef[Any]
    shared_bytes: int
    known: Known
    snapshot: Snapshot
    roots: list[Callable[[], Any]]
    placements: Mapping[object, Placement]  # by storage key; empty where another process published
    payload: bytes | None  # of the shared skeleton; None where another process published
    specs: tuple[TensorSpec, ...]
    session: object
    pieces: list[Any]  # of tensors taken apart: alive, so that their ids and storages mean them

    def are_in_store(self) -> bool:
        return self.session is not None and self.session is _store.session()

    def are_current(self) -> bool:
        """Whether the live pipeline still has these weights, as far as versions, slots and modes tell."""
        if not (self.are_in_store() and self.snapshot.weights.are_same() and self.snapshot.has_same_structure()):
            return False
        return all(root() is not None for root in self.roots)

    def unchanged(self) -> Mapping[object, Placement]:
        """Places of storages that need not be written again, though the structure around them changed."""
        return self.placements if self.are_in_store() and self.snapshot.weights.are_same() else {}

    def verified(self, found: Introspection) -> set[object]:
        """Keys of the storages of `found` of which the store has exactly the bytes. Reads all of them."""
        if not self.are_in_store() or not self.snapshot.weights.are_same():
            return set()
        manifest: Manifest = _store.get(self.manifest)
        memory = StoredMemory(manifest, range(len(manifest.locations)), require_isolation=False)
        storages = [storage for storage in found.table.storages if storage.key in self.known.storages]
        return {s.key for s in storages if memory.holds(self.known.storages[s.key], s.to_bytes())}

    def describe(self, found: Introspection) -> bool:
        """Whether the published skeleton is that of `found`."""
        if self.payload is None:  # passed on: the outer skeleton holds all but the tensors
            return self.are_current()
        return (self.payload, self.specs) == (found.shared.payload, tuple(found.table.specs))


@attrs.define(eq=False)
class _Entry:
    """What is known of one live pipeline."""

    pipeline: weakref.ref[Any]
    held: Weights | None = None  # while automatic publishing needs them
    weak: Callable[[], Weights | None] = lambda: None  # while a publication holds them
    origin: _Origin | None = None

    def weights(self) -> Weights | None:
        return self.held or self.weak()


@attrs.define(eq=False)
class _Origin:
    """Where a loaded pipeline came from. The publication's reference keeps the weights in the store."""

    manifest: ray.ObjectRef[Any]
    shared_bytes: int
    marks: TensorMarks
    indices: list[int]
    mappings: list[weakref.ref[Any]]
    session: object


_entries: dict[int, _Entry] = {}
_lock = threading.RLock()


def _entry_of(pipeline: Any) -> _Entry:
    entry = _entries.get(id(pipeline))
    if entry is None or entry.pipeline() is not pipeline:
        key = id(pipeline)
        entry = _entries[key] = _Entry(weakref.ref(pipeline, lambda ref: _forget(key, ref)))
    return entry


def _forget(key: int, ref: weakref.ref[Any]) -> None:
    entry = _entries.get(key)
    if entry is not None and entry.pipeline is ref:
        del _entries[key]


def publish(pipeline: Any) -> Publication:
    """Put the weights of `pipeline` into the object store, once, and return a small handle to them.

    Publishing the same pipeline again shares one set of weights as long as no byte of it has changed. The weights leave
    the store when the last handle and the last pipeline loaded from one are gone.

    Args:
        pipeline: an instance of a `@zerocopy.pipeline` class, or a bare `nn.Module`.

    Raises:
        ArgumentError: `pipeline` is neither.
        CannotTravelError: something inside cannot leave the process; the error names its path.
        StoreTooSmallError: the weights are larger than this node's object store.
        RayClientError: this process is connected through Ray Client.
    """
    require_pipeline(pipeline, "zerocopy.publish")
    _store.require()
    with _lock:
        entry = _entry_of(pipeline)
        _current_weights(pipeline, entry)
        weights = entry.weights()
        found = introspect(pipeline)
        same = weights.verified(found) if weights is not None else set[object]()
        if weights is None or len(same) < len(found.table.storages) or not weights.describe(found):
            stored = weights.placements if weights is not None else {}
            weights = _put(found, {key: place for key, place in stored.items() if key in same})
            outer = found.outer
        else:
            outer = make_outer(pipeline, weights.known)
        entry.weak = weakref.ref(weights)
        if entry.held is not None:
            entry.held = weights
        publication = _handle(pipeline, weights, outer)
        publication._close = _closer(weights)
        return publication


def publish_automatically(pipeline: Any) -> Publication:
    """A handle to the weights of `pipeline`, which are published now if they never were, or have changed since.

    The weights stay in the store as long as the pipeline lives.
    """
    _store.require()
    with _lock:
        entry = _entry_of(pipeline)
        weights = _current_weights(pipeline, entry)
        if weights is not None:
            try:
                outer = make_outer(pipeline, weights.known)
            except UnknownRoot:
                pass
            else:
                entry.held = weights
                return _handle(pipeline, weights, outer)
        found = introspect(pipeline)
        previous = entry.weights()
        entry.held = weights = _put(found, previous.unchanged() if previous is not None else {})
        return _handle(pipeline, weights, found.outer)


def _current_weights(pipeline: Any, entry: _Entry) -> Weights | None:
    weights = entry.weights()
    if weights is not None and weights.are_current():
        return weights
    passed_on = _weights_of_origin(pipeline, entry.origin) if entry.origin is not None else None
    entry.held = passed_on or entry.held
    return passed_on


def _weights_of_origin(pipeline: Any, origin: _Origin) -> Weights | None:
    """The weights that a loaded pipeline came from, if it still has all of them and no others."""
    if origin.session is not _store.session() or not origin.marks.are_same():
        return None
    found = introspect(pipeline)
    index = {key: origin.indices[position] for key, position in origin.marks.index().items()}
    if not all(key in index for key in found.table.index):
        return None
    manifest: Manifest = _store.get(origin.manifest)
    storages = {}
    for obj, spec in zip(found.table.objects, found.table.specs, strict=True):
        published = manifest.specs[index[id(obj)]]
        if spec.flag != published.flag:
            return None
        storages[found.table.storages[spec.storage].key] = published.storage
    known = Known(
        index, storages, found.known.roots, frozenset(), len(manifest.specs), len(manifest.locations), whole=True
    )
    return Weights(
        origin.manifest, origin.shared_bytes, known, Snapshot(found.table, found.wholes, found.mutable),
        [reference(root) for root in found.roots], {}, None, (), origin.session, found.pieces,
    )  # fmt: skip


def _put(found: Introspection, stored: Mapping[object, Placement]) -> Weights:
    """Write what `found` shares into the store, but for what is `stored`. Every refusal comes before the first byte."""
    storages = found.table.storages
    snapshot = Snapshot(found.table, found.wholes, found.mutable)
    shared_bytes = sum(storage.nbytes for storage in storages)
    _store.require_room(shared_bytes, type(found.pipeline).__name__)
    placements = put_storages(storages, found.root_ends, stored)
    locations, shards = locate(storages, placements)
    manifest = Manifest(tuple(found.table.specs), locations, found.devices, found.shared, shards)
    return Weights(
        _store.put(manifest), shared_bytes, found.known, snapshot, [reference(root) for root in found.roots],
        {s.key: place for s, place in zip(storages, placements, strict=True) if place is not None},
        found.shared.payload, tuple(found.table.specs), _store.session(), found.pieces,
    )  # fmt: skip


def _handle(pipeline: Any, weights: Weights, outer: Outer) -> Publication:
    required = os.environ.get(_mapping.REQUIRE_ISOLATION, "0") not in ("", "0")
    publication = Publication(
        weights.manifest, outer, type(pipeline).__name__, weights.shared_bytes, required, Versions.here()
    )
    publication.cls = type(pipeline)
    publication._weights = weights
    return publication


def _closer(weights: Weights) -> Callable[[ray.ObjectRef[Any]], None]:
    def close(manifest: ray.ObjectRef[Any]) -> None:
        """Give up automatic publishing's hold as well, and what closures have pinned."""
        with _lock:
            for entry in _entries.values():
                if entry.held is weights:
                    entry.held = None
        _store.unpin(manifest)

    return close


def _remember(publication: Publication, loaded: Loaded) -> None:
    _entry_of(loaded.pipeline).origin = _Origin(
        loaded.manifest,
        publication.shared_bytes,
        TensorMarks(loaded.tensors.values()),
        list(loaded.tensors),
        [weakref.ref(mapping) for mapping in loaded.mappings],
        _store.session(),
    )


observe_loads(_remember)


def unshare(pipeline: Any) -> None:
    """Give a loaded pipeline private memory of its own: it needs the object store no longer.

    Tensors and arrays keep their identity, their ties and their contents. Takes the bytes of the weights in memory. Call it
    before `ray.shutdown()` in a process that keeps using the pipeline.

    Raises:
        ArgumentError: `pipeline` was not loaded from a publication in this process.
        IsolationError: it was loaded where private mappings are not possible; `copy.deepcopy` it instead.
    """
    entry = _entries.get(id(pipeline))
    if entry is None or entry.pipeline() is not pipeline or entry.origin is None:
        raise ArgumentError(
            f"This {type(pipeline).__name__} was not loaded from a publication in this process.",
            hint="unshare() takes what publication.load() returned, or what arrived in a task or an actor.",
        )
    mappings = [mapping for ref in entry.origin.mappings if (mapping := ref()) is not None]
    for mapping in mappings:
        if not isinstance(mapping, _mapping.PrivateMap):
            raise IsolationError(
                f"This {type(pipeline).__name__} uses Ray's own mapping, which cannot be taken over.",
                hint="use copy.deepcopy(pipeline).",
            )
    for mapping in mappings:
        mapping.detach()
    entry.origin = None
    entry.held = None
