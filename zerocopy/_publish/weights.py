"""What are the published weights of a live pipeline, does it still have them, and how are they written?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias

import attrs
import ray
import torch

from zerocopy._changes.snapshot import Snapshot
from zerocopy._load.live import Origin
from zerocopy._publish.adoption import Adoption
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection, Known, Subject, UnknownRoot, introspect, make_outer
from zerocopy._store import object_store
from zerocopy._store.manifest import Manifest, Outer, Skeleton
from zerocopy._store.read import StoredMemory, manifest_of
from zerocopy._store.tensors import ARRAY, Storage, TensorSpec, rows_of
from zerocopy._store.write import ORDINARY, STREAMED, Cut, LocationRow, Placement, Writer


@attrs.frozen(eq=False, kw_only=True)
class _Weights:
    """Weights in the store, and the state of the live pipeline that they are the weights of. Keeps no part of it alive.

    Attributes:
        placements: where storages are, by their key, in the process that wrote them.
        components: of tensors that were taken apart. They stay alive, so that their ids and storages mean them.
    """

    manifest: ray.ObjectRef[Any]
    shared_bytes: int
    known: Known
    snapshot: Snapshot
    components: list[Any]
    placements: Mapping[object, Placement] = attrs.field(factory=dict)
    session: object = attrs.field(factory=object_store.session)

    def are_in_store(self) -> bool:
        return self.session is not None and self.session is object_store.session()

    def are_current(self) -> bool:
        """Whether the live pipeline still has these weights, as far as versions, members and modes tell."""
        return self.are_in_store() and self.snapshot.is_unchanged()

    def outer_of(self, pipeline: Any) -> Outer | None:
        """The outer skeleton of `pipeline` as it is now, if these weights hold all that it shares."""
        try:
            return make_outer(pipeline, self.known)
        except UnknownRoot:
            return None

    def unchanged_places(self) -> Mapping[object, Placement]:
        """Where storages are that have not changed, as far as version counters tell."""
        return self.placements if self.are_in_store() and self.snapshot.tensors.is_unchanged() else {}

    def verified_places(self, found: Introspection) -> Mapping[object, Placement]:
        """Where those storages of `found` lie whose exact bytes the store has. Reads all of them."""
        verified = self._verified(found) if self.placements else ()
        return {key: self.placements[key] for key in verified if key in self.placements}

    def _verified(self, found: Introspection) -> set[object]:
        """Keys of those storages of `found` whose exact bytes the store has."""
        storages = [storage for storage in found.table.storages if storage.key in self.known.storages]
        if not storages or not self.are_in_store() or not self.snapshot.tensors.is_unchanged():
            return set()
        manifest = manifest_of(self.manifest)
        memory = StoredMemory(manifest, range(len(manifest.locations)), require_isolation=False)
        return {s.key for s in storages if memory.holds(self.known.storages[s.key], s.to_bytes())}

    def _have_all_of(self, found: Introspection) -> bool:
        return self.are_in_store() and len(self._verified(found)) == len(found.table.storages)


@attrs.frozen(eq=False, kw_only=True)
class OwnWeights(_Weights):
    """Weights that this process wrote, and what it wrote."""

    skeleton: Skeleton
    specs: tuple[TensorSpec, ...]

    @classmethod
    def written(cls, found: Introspection, snapshot: Snapshot, writer: Writer) -> Self:
        """What `writer` wrote of `found`; the manifest is written now, if it does not lie beside a shard."""
        return cls(
            manifest=writer.finish(),
            shared_bytes=_shared_bytes(found),
            known=found.known,
            snapshot=snapshot,
            components=found.components,
            placements={found.table.storages[index].key: place for index, place in writer.placements.items()},
            skeleton=found.shared,
            specs=tuple(found.table.specs),
        )

    def outer_if_same(self, found: Introspection) -> Outer | None:
        """The outer skeleton of `found` over these weights, if they are those of `found`, byte by byte."""
        same_objects = (self.known.tensors, self.known.storages) == (found.known.tensors, found.known.storages)
        same_form = (self.skeleton, self.specs) == (found.shared, tuple(found.table.specs))
        return found.outer if same_objects and same_form and self._have_all_of(found) else None


class ForeignWeights(_Weights):
    """Weights that a pipeline was loaded with and still has: it is passed on as the publication it came from.

    The outer skeleton holds everything but the tensors: the shared skeleton describes objects of another process.
    """

    @classmethod
    def of_loaded(cls, found: Introspection, origin: Origin | None) -> Self | None:
        """The weights that a pipeline came from, if it still has all of them and no others."""
        if origin is None or origin.session is not object_store.session():
            return None
        manifest = manifest_of(origin.manifest)
        if not origin.marks.is_unchanged(manifest):
            return None
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
        return cls(
            manifest=origin.manifest,
            shared_bytes=origin.shared_bytes,
            known=known,
            snapshot=_snapshot(found),
            components=found.components,
        )

    def outer_if_same(self, found: Introspection) -> Outer | None:
        """The outer skeleton of `found` over these weights, if it has all of them still, byte by byte."""
        return self.outer_of(found.pipeline) if self._have_all_of(found) and self.are_current() else None


Weights: TypeAlias = OwnWeights | ForeignWeights


def put(found: Introspection, stored: Mapping[object, Placement]) -> OwnWeights:
    """Write what `found` shares into the store, except what is `stored`. Whatever is refused is refused before the first byte."""
    writer = _writer_of(found, stored, ORDINARY)

    def write() -> None:
        for shard in writer.shards:
            writer.write(shard)

    wait_until_written = object_store.in_background(write)
    try:
        snapshot = _snapshot(found)
    finally:
        wait_until_written()
    return OwnWeights.written(found, snapshot, writer)


def put_and_adopt(
    subject: Subject, found: Introspection, stored: Mapping[object, Placement], adoption: Adoption
) -> tuple[OwnWeights, Outer]:
    """The same, and re-point the tensors of the pipeline at the store. After an error they have private memory."""
    writer = _writer_of(found, stored, STREAMED)
    try:
        for placed in writer.stored:
            adoption.take(placed)
        for shard in writer.shards:
            adoption.take(writer.write(shard))
        adopted = introspect(subject)  # the same tensors, in other memory
        weights = OwnWeights.written(adopted, _snapshot(adopted), writer)
    except BaseException:
        adoption.undo()
        raise
    return weights, adopted.outer


def put_streaming(
    found: Introspection, fill: Callable[[Sequence[Storage]], None], drop: Callable[[Sequence[Storage]], None]
) -> OwnWeights:
    """Write shard by shard. Each shard is filled before it is written, and dropped afterwards.

    Args:
        fill: called with the storages of each shard before their bytes are read.
        drop: called with them when they are written.
    """
    snapshot = _snapshot(found)
    writer = _writer_of(found, {}, STREAMED)
    for shard in writer.shards:
        sources = [found.table.storages[index] for index in shard]
        fill(sources)
        writer.write(shard)
        drop(sources)
    return OwnWeights.written(found, snapshot, writer)


def _writer_of(found: Introspection, stored: Mapping[object, Placement], cut: Cut) -> Writer:
    what = type(found.pipeline).__name__
    object_store.check_room(_shared_bytes(found), what)
    object_store.check_copies(found.outer.nbytes, what)

    def make_manifest(locations: Sequence[LocationRow], shards: Sequence[ray.ObjectRef[Any]]) -> Manifest:
        return Manifest(rows_of(found.table.specs), locations, found.devices, found.shared, shards, _is_reusable(found))

    return Writer(found.table.storages, found.root_ends, cut, stored, make_manifest)


def _is_reusable(found: Introspection) -> bool:
    """Whether one can tell, by versions, members and modes, that what is shared was not changed since it was loaded.

    One cannot where NumPy arrays or inference tensors are shared, or modules that no other module has registered.
    """
    if not all(paths.is_module(root) or type(root) is torch.Tensor for root in found.roots):
        return False
    if any(spec.kind == ARRAY or spec.is_inference for spec in found.table.specs):
        return False
    registered = paths.registered_below(paths.modules_among(found.roots))
    return registered.keys() >= set(map(id, paths.modules_among(found.mutable)))


def _snapshot(found: Introspection) -> Snapshot:
    return Snapshot(found.table, found.composites, found.mutable)


def _shared_bytes(found: Introspection) -> int:
    return sum(storage.nbytes for storage in found.table.storages)
