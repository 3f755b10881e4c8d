"""What are the published weights of a live pipeline, does it still have them, and how are they written?"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias

import attrs
import ray
import torch

from zerocopy._changes.snapshot import Snapshot
from zerocopy._load.live import Origin, Tag
from zerocopy._publish.adoption import Adoption
from zerocopy._publish.found_again import find
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection, Known, Subject, UnknownRoot, introspect, make_outer
from zerocopy._store import object_store
from zerocopy._store.manifest import NOWHERE, Manifest, Outer, Placement, Skeleton
from zerocopy._store.read import StoredMemory, manifest_of
from zerocopy._store.storages import Storage
from zerocopy._store.tensors import ARRAY, TensorSpec, rows_of
from zerocopy._store.write import ORDINARY, STREAMED, Cut, LocationRow, Writer
from zerocopy.errors import PublicationLostError


@attrs.frozen(eq=False, kw_only=True)
class _Weights:
    """Weights in the store, and the state of the live pipeline that has them. Keeps no part of the pipeline alive.

    Attributes:
        borrowed: the objects of the store that these weights use and that other processes may own.
        components: the components of tensors that were taken apart. They stay alive, so that their ids and storages are not
            reused.
    """

    manifest: ray.ObjectRef[Any]
    shared_bytes: int
    known: Known
    snapshot: Snapshot
    components: list[Any]
    borrowed: object_store.Borrowed
    tag: Tag | None
    session: object = attrs.field(factory=object_store.session)

    def in_store(self) -> Self | None:
        """These weights with a reference; None if they are gone. Weights with a name may have no reference in this process."""
        if self.session is None or self.session is not object_store.session():
            return None
        if self.manifest is None:
            manifest = None if self.tag is None else self.tag.find()
            return None if manifest is None else attrs.evolve(self, manifest=manifest)
        return self if self.borrowed.have_owners() else None

    def current_outer(self, pipeline: Any) -> Outer | None:
        """The outer skeleton of `pipeline` as it is now; None if a change of its weights is detected."""
        try:
            outer, loose = make_outer(pipeline, self.known)
        except UnknownRoot:
            return None
        return outer if self.snapshot.is_unchanged(loose, self.components) else None


@attrs.frozen(eq=False, kw_only=True)
class OwnWeights(_Weights):
    """Weights that this process wrote, and where they are.

    Attributes:
        placements: the places of the storages, by key.
        sizes: bytes of each shard that this process has written.
        used: bytes of the storages in each shard, by its id.
    """

    skeleton: Skeleton
    specs: tuple[TensorSpec, ...]
    placements: Mapping[object, Placement]
    sizes: Mapping[ray.ObjectRef[Any], int]
    used: Mapping[bytes, int]

    @classmethod
    def written(
        cls, found: Introspection, snapshot: Snapshot, writer: Writer, sizes: Mapping[ray.ObjectRef[Any], int]
    ) -> Self:
        """The weights of `found` that `writer` wrote. Writes the manifest now, if it is not in the object of a shard."""
        placements = {found.table.storages[index].key: place for index, place in writer.placements.items()}
        snapshot.note_written(placements)
        manifest = writer.finish()
        return cls(
            manifest=manifest,
            shared_bytes=found.table.nbytes,
            known=found.known,
            snapshot=snapshot,
            components=found.components,
            borrowed=object_store.Borrowed(writer.borrowed),
            tag=writer.tag,
            placements=placements,
            skeleton=found.shared,
            specs=tuple(found.table.specs),
            used=writer.used_bytes(),
            sizes={**{shard: sizes[shard] for shard in writer.reused if shard in sizes}, **writer.sizes},
        )

    def without_references(self) -> Self:
        """The same weights, which have a name. This process no longer keeps them in the store."""
        nothing: Any = None  # for mypy, the attribute cannot be None
        return attrs.evolve(self, manifest=nothing, borrowed=object_store.Borrowed([]), placements={}, sizes={})

    def with_places(self) -> Self:
        """The same weights with their places. Weights with a name may have no places in this process."""
        if self.placements or self.manifest is None:
            return self
        try:
            manifest = manifest_of(self.manifest)
        except PublicationLostError:  # the registry that owned the manifest has just ended
            return self
        rows = {key: manifest.location_rows[index] for key, index in self.known.storages.items()}
        places = {
            key: Placement(manifest.shard(shard), buffer, offset)
            for key, (shard, buffer, offset, _) in rows.items()
            if shard != NOWHERE
        }
        return attrs.evolve(self, placements=places)

    def outer_if_same(self, found: Introspection) -> Outer | None:
        """The outer skeleton of `found` over these weights; None unless `found` has the same weights, byte by byte."""
        same_objects = (self.known.tensors, self.known.storages) == (found.known.tensors, found.known.storages)
        same_form = (self.skeleton, self.specs) == (found.shared, tuple(found.table.specs))
        if self.manifest is None or not (same_objects and same_form):
            return None
        return found.outer if len(self.verified_places(found.table.storages)) == len(self.placements) else None

    def unchanged_places(self, found: Introspection) -> Mapping[object, Placement]:
        """The places of the storages of `found` that the store has. Storages that may have changed are compared byte by byte."""
        same = self.snapshot.unchanged(found.table)
        doubtful = [storage for storage in found.table.storages if storage.key not in same]
        places = {key: self.placements[key] for key in same if key in self.placements}
        return {**places, **self.verified_places(doubtful)}

    def verified_places(self, storages: Sequence[Storage]) -> Mapping[object, Placement]:
        """The same for any storages. All storages that the store may have are compared byte by byte."""
        candidates = [storage for storage in storages if storage.key in self.placements]
        if not candidates or self.manifest is None:
            return {}
        try:
            manifest = manifest_of(self.manifest)
        except PublicationLostError:
            return {}
        indices = {storage.key: self.known.storages[storage.key] for storage in candidates}
        memory = StoredMemory(manifest, indices.values(), require_isolation=False)
        return {s.key: self.placements[s.key] for s in candidates if memory.holds(indices[s.key], s.to_bytes())}

    def worth_keeping(
        self, places: Mapping[object, Placement], nbytes: Mapping[object, int]
    ) -> Mapping[object, Placement]:
        """Those `places` whose shards are still needed for at least half of their bytes. Other shards should be freed."""
        used: dict[ray.ObjectRef[Any], int] = defaultdict(int)
        for key, place in places.items():
            used[place.shard] += nbytes[key]
        return {key: place for key, place in places.items() if 2 * used[place.shard] >= self.sizes.get(place.shard, 0)}


class ForeignWeights(_Weights):
    """Weights that a pipeline was loaded with and still has. The pipeline is passed on as the publication that it came from.

    The outer skeleton holds everything but the tensors, because the shared skeleton describes objects of another process.
    """

    def without_references(self) -> Self:
        """See `OwnWeights.without_references`."""
        nothing: Any = None
        return attrs.evolve(self, manifest=nothing, borrowed=object_store.Borrowed([]))

    @classmethod
    def of_loaded(cls, found: Introspection, origin: Origin | None) -> Self | None:
        """The weights that a pipeline was loaded from; None unless it still has exactly these, byte by byte."""
        if origin is None or origin.session is not object_store.session():
            return None
        try:
            manifest = manifest_of(origin.manifest)
        except PublicationLostError:
            return None
        snapshot = Snapshot(found)  # before anything is compared
        borrowed = object_store.Borrowed([origin.manifest, *manifest.shards])
        indices = find(found.table, manifest) if borrowed.have_owners() else None
        if indices is None:
            return None
        known = Known(
            indices.tensors, indices.storages, found.known.roots, frozenset(), found.known.loose, len(manifest.specs),
            len(manifest.locations), whole=True,
        )  # fmt: skip
        return cls(
            manifest=origin.manifest,
            shared_bytes=origin.shared_bytes,
            known=known,
            snapshot=snapshot,
            components=found.components,
            borrowed=borrowed,
            tag=origin.tag,
        )


Weights: TypeAlias = OwnWeights | ForeignWeights
MakeWriter: TypeAlias = Callable[..., Writer]  # with the arguments of `Writer`


def put(
    found: Introspection,
    snapshot: Snapshot,
    stored: Mapping[object, Placement],
    sizes: Mapping[ray.ObjectRef[Any], int],
    make_writer: MakeWriter | None = None,
) -> OwnWeights:
    """Write the storages that `found` shares into the store, except those in `stored`. All checks run before the first write.

    Args:
        snapshot: from before anything was compared or written, so that writes of other threads in the meantime count as changes.
        sizes: bytes of those shards of `stored` that this process has written.
        make_writer: creates the writer, if it is not a `Writer`.
    """
    cut = ORDINARY if make_writer is None else STREAMED  # later versions of a name need parts of it
    writer = _writer_of(found, stored, cut, make_writer)
    for _ in writer.write_all():
        pass
    return OwnWeights.written(found, snapshot, writer, sizes)


def put_and_adopt(
    subject: Subject,
    found: Introspection,
    stored: Mapping[object, Placement],
    sizes: Mapping[ray.ObjectRef[Any], int],
    adoption: Adoption,
    make_writer: MakeWriter | None = None,
) -> tuple[OwnWeights, Outer]:
    """Like `put`, and turn the tensors of the pipeline into views of the store. After an error, they have private memory."""
    writer = _writer_of(found, stored, STREAMED, make_writer)
    try:
        for placed in itertools.chain(writer.stored, writer.write_all()):
            adoption.take(placed)
        adopted = introspect(subject)  # the same tensors, in other memory
        weights = OwnWeights.written(adopted, Snapshot(adopted), writer, sizes)
    except BaseException:
        adoption.undo()
        raise
    return weights, adopted.outer


@attrs.frozen(eq=False)
class Streamed:
    """A pipeline that is published shard by shard, and whose bytes are in memory only while they are read.

    Attributes:
        found: the introspection. It knows the addresses of memory that may still be empty.
        fill: fills the memory of some storages before they are read.
        drop: releases that memory.
    """

    found: Introspection
    fill: Callable[[Sequence[Storage]], None] = lambda _: None
    drop: Callable[[Sequence[Storage]], None] = lambda _: None


def put_streaming(
    streamed: Streamed, stored: Mapping[object, Placement], make_writer: MakeWriter | None = None
) -> Writer:
    """Write shard by shard. Each shard is filled before it is written, and dropped afterwards. See `put`."""
    writer = _writer_of(streamed.found, stored, STREAMED, make_writer)
    for placed in writer.write_all(streamed.fill):
        streamed.drop([streamed.found.table.storages[index] for index in placed])
    return writer


def _writer_of(
    found: Introspection, stored: Mapping[object, Placement], cut: Cut, make_writer: MakeWriter | None
) -> Writer:
    what = type(found.pipeline).__name__
    object_store.check_room(found.table.nbytes, what)
    object_store.warn_of_crowding(found.table.nbytes, found.outer.nbytes, what)
    make_manifest = functools.partial(manifest_for, found)
    return (make_writer or Writer)(found.table.storages, found.root_ends, cut, stored, make_manifest)


def manifest_for(
    found: Introspection, locations: Sequence[LocationRow] = (), shards: Sequence[ray.ObjectRef[Any]] = ()
) -> Manifest:
    """The manifest of the shared part of `found`, given the places of its storages."""
    return Manifest(rows_of(found.table.specs), locations, found.devices, found.shared, shards, _is_reusable(found))


def _is_reusable(found: Introspection) -> bool:
    """Whether versions, members and modes can show that the shared part was not changed since it was loaded.

    They cannot if a root is neither a module nor a tensor, if NumPy arrays or inference tensors are shared, or if a shared module
    is not registered below a root.
    """
    if not all(paths.is_module(root) or type(root) is torch.Tensor for root in found.roots):
        return False
    if any(spec.kind == ARRAY or spec.is_inference for spec in found.table.specs):
        return False
    registered = paths.registered_below(paths.modules_among(found.roots))
    return registered.keys() >= set(map(id, paths.modules_among(found.mutable)))
