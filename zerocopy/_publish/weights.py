"""What are the published weights of a pipeline, and how are they written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import ray

from zerocopy._changes.snapshot import Snapshot
from zerocopy._publish.adoption import Adoption
from zerocopy._split.introspect import Introspection, Known, Outer, Skeleton, Subject, introspect, is_reusable
from zerocopy._store import object_store
from zerocopy._store.tensors import Storage, TensorSpec, rows_of
from zerocopy._store.write import ORDINARY, STREAMED, Cut, Manifest, Placement, StoredMemory, manifest_of, write


@attrs.frozen(eq=False)
class Weights:
    """Published weights, and the state of the live pipeline that they are the weights of. Keeps no part of it alive."""

    manifest: ray.ObjectRef[Any]
    shared_bytes: int
    known: Known
    snapshot: Snapshot
    placements: Mapping[object, Placement]  # by storage key; empty where another process published
    skeleton: Skeleton | None  # the shared one; None where another process published
    specs: tuple[TensorSpec, ...]
    session: object
    pieces: list[Any]  # of tensors taken apart: alive, so that their ids and storages mean them

    def are_in_store(self) -> bool:
        return self.session is not None and self.session is object_store.session()

    def are_current(self) -> bool:
        """Whether the live pipeline still has these weights, as far as versions, slots and modes tell."""
        return self.are_in_store() and self.snapshot.weights.are_same() and self.snapshot.has_same_structure()

    def unchanged(self) -> Mapping[object, Placement]:
        """Places of storages that need not be written again, though the structure around them changed."""
        return self.placements if self.are_in_store() and self.snapshot.weights.are_same() else {}

    def verified(self, found: Introspection) -> set[object]:
        """Keys of the storages of `found` of which the store has exactly the bytes. Reads all of them."""
        storages = [storage for storage in found.table.storages if storage.key in self.known.storages]
        if not storages or not self.are_in_store() or not self.snapshot.weights.are_same():
            return set()
        manifest = manifest_of(self.manifest)
        memory = StoredMemory(manifest, range(len(manifest.locations)), require_isolation=False)
        return {s.key for s in storages if memory.holds(self.known.storages[s.key], s.to_bytes())}

    def describe(self, found: Introspection) -> bool:
        """Whether the published skeleton is that of `found`: the same objects in the same places."""
        if self.skeleton is None:  # passed on: the outer skeleton holds all but the tensors
            return self.are_current()
        same_objects = (self.known.tensors, self.known.storages) == (found.known.tensors, found.known.storages)
        return same_objects and (self.skeleton, self.specs) == (found.shared, tuple(found.table.specs))


def put(found: Introspection, stored: Mapping[object, Placement]) -> Weights:
    """Write what `found` shares into the store, but for what is `stored`. Every refusal comes before the first byte."""
    _require_room(found)
    written = object_store.meanwhile(lambda: _write(found, stored))
    try:
        snapshot = Snapshot(found.table, found.wholes, found.mutable)
    finally:
        done = written()
    return _weights(found, snapshot, *done)


def put_and_adopt(
    subject: Subject, found: Introspection, stored: Mapping[object, Placement], adoption: Adoption
) -> tuple[Weights, Outer]:
    """The same, and the tensors of the pipeline re-pointed at the store. An error leaves them private memory."""
    _require_room(found)
    try:
        placements, manifest = _write(found, stored, STREAMED, written=adoption.take)
        adopted = introspect(subject)  # the same tensors, in other memory
    except BaseException:
        adoption.undo()
        raise
    snapshot = Snapshot(adopted.table, adopted.wholes, adopted.mutable)
    return _weights(adopted, snapshot, placements, manifest), adopted.outer


def put_streaming(
    found: Introspection,
    about_to_write: Callable[[Iterable[Storage]], None],
    written: Callable[[Iterable[Storage]], None],
) -> Weights:
    """Write shard by shard what has to be made ready, and can be let go of afterwards.

    Args:
        about_to_write: called with the storages of each shard before their bytes are read.
        written: called with them afterwards.
    """
    _require_room(found)
    storages = found.table.storages
    snapshot = Snapshot(found.table, found.wholes, found.mutable)
    done = _write(found, {}, STREAMED, about_to_write, lambda placed: written([storages[index] for index in placed]))
    return _weights(found, snapshot, *done)


def _write(
    found: Introspection,
    stored: Mapping[object, Placement],
    cut: Cut = ORDINARY,
    about_to_write: Callable[[list[Storage]], None] = lambda _: None,
    written: Callable[[Mapping[int, Placement]], None] = lambda _: None,
) -> tuple[list[Placement | None], ray.ObjectRef[Any]]:
    """As `write`, what `found` shares."""

    def make_manifest(locations: Sequence[tuple[int, int, int, int]], shards: Sequence[ray.ObjectRef[Any]]) -> Manifest:
        return Manifest(rows_of(found.table.specs), locations, found.devices, found.shared, shards, is_reusable(found))

    return write(found.table.storages, found.root_ends, stored, make_manifest, cut, about_to_write, written)


def _weights(
    found: Introspection, snapshot: Snapshot, placements: Sequence[Placement | None], manifest: ray.ObjectRef[Any]
) -> Weights:
    places = {s.key: place for s, place in zip(found.table.storages, placements, strict=True) if place is not None}
    return Weights(
        manifest, _shared_bytes(found), found.known, snapshot, places, found.shared, tuple(found.table.specs),
        object_store.session(), found.pieces,
    )  # fmt: skip


def _require_room(found: Introspection) -> None:
    object_store.require_room(_shared_bytes(found), type(found.pipeline).__name__)


def _shared_bytes(found: Introspection) -> int:
    return sum(storage.nbytes for storage in found.table.storages)
