"""How are storages written to the store: which of them are written together, and in which form?"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import ray

from zerocopy._store import object_store
from zerocopy._store.manifest import BESIDE, NOWHERE, Manifest, Placement
from zerocopy._store.storages import Storage

MB = 1 << 20
FIELD_SHARD = 4 * MB  # a shard also ends at the end of a shared root, if it has at least this many bytes
PACKED = MB // 32  # a smaller storage is copied into a pack, because each buffer costs microseconds
PACKS_PER_SHARD = 64 * MB  # limits the heap memory of packs while publishing
ALIGNMENT = 64
NONCE_BYTES = 16


Placements: TypeAlias = dict[int, Placement]  # of one shard, by index of the storage
LocationRow: TypeAlias = tuple[int, int, int, int]  # a `Location` as a plain tuple


def without_aliases(storages: Iterable[Storage], places: Mapping[object, Placement]) -> dict[object, Placement]:
    """Return those `places`, by key of the storage, that can be in one manifest: no two storages may have bytes in common.

    Two loads of one publication have the same place, but are different memory. So one of them must be written.
    """
    kept: dict[object, Placement] = {}
    ends: dict[tuple[ray.ObjectRef[Any], int], int] = {}
    located = ((places[storage.key], storage) for storage in storages if storage.key in places)
    for place, storage in sorted(located, key=lambda pair: pair[0].offset):
        buffer = place.shard, place.buffer
        if place.offset >= ends.get(buffer, 0):
            ends[buffer] = place.offset + storage.nbytes
            kept[storage.key] = place
    return kept


class Cut(NamedTuple):
    """The maximum size of shards: `least` bytes, or the total divided by `parts`, if that is more. One storage may be larger."""

    least: int
    parts: int


ORDINARY = Cut(512 * MB, 8)
STREAMED = Cut(MB, 16)  # for names, and for publishes that free the source of each shard before the next is written


def layout(sizes: Sequence[int], root_ends: Iterable[int], cut: Cut = ORDINARY) -> list[list[int]]:
    """Return the indices of the storages of each shard, in order, given the sizes of all storages and the ends of their roots.

    Storages without bytes are in no shard.
    """
    target = max(cut.least, sum(sizes) // cut.parts)
    ends = set(root_ends)
    shards: list[list[int]] = [[]]
    total = packed = 0
    for index, size in enumerate(sizes):
        too_large = total + size > target or packed > PACKS_PER_SHARD
        if shards[-1] and (too_large or (index in ends and total >= FIELD_SHARD)):
            shards.append([])
            total = packed = 0
        if size:
            shards[-1].append(index)
        total += size
        packed += size if size < PACKED else 0
    return list(filter(None, shards))


class Writer:
    """Writes storages to the store, shard by shard, without another copy; then the manifest with their locations.

    If one shard is enough, and no storage is in the store already, the manifest is in the same object as the shard.

    Attributes:
        stored: places of storages that are in the store already, by shard.
        shards: indices of the storages of each shard that must be written.
        placements: the place of each storage that has bytes, as far as it is written.
        sizes: bytes of each shard that was written.
        tag: identifies weights with a name, after they are written; None for other weights.
    """

    tag: Any = None

    def __init__(
        self,
        storages: Sequence[Storage],
        root_ends: Iterable[int],
        cut: Cut,
        stored: Mapping[object, Placement],
        make_manifest: Callable[[Sequence[LocationRow], Sequence[ray.ObjectRef[Any]]], Manifest],
    ) -> None:
        """`stored` are places by key of the storage. `make_manifest` receives the row of each storage, and the shards."""
        self._storages = storages
        self._make_manifest = make_manifest
        self._manifest: ray.ObjectRef[Any] | None = None
        self.placements = {i: stored[storage.key] for i, storage in enumerate(storages) if storage.key in stored}
        self.stored: list[Placements] = _by_shard(self.placements)
        sizes = [0 if index in self.placements else storage.nbytes for index, storage in enumerate(storages)]
        self.shards = layout(sizes, root_ends, cut)
        self.sizes: dict[ray.ObjectRef[Any], int] = {}

    @property
    def borrowed(self) -> list[ray.ObjectRef[Any]]:
        """The shards that other processes may own."""
        return self.reused

    @property
    def reused(self) -> list[ray.ObjectRef[Any]]:
        """The shards that were in the store already."""
        return list({place.shard: None for placed in self.stored for place in placed.values()})

    def used_bytes(self) -> dict[bytes, int]:
        """Bytes of the storages in each shard, by the id of the shard, as far as they are written."""
        used: dict[bytes, int] = {}
        for index, place in self.placements.items():
            key = place.shard.binary()
            used[key] = used.get(key, 0) + self._storages[index].nbytes
        return used

    def write_all(self, fill: Callable[[Sequence[Storage]], None] = lambda _: None) -> Iterator[Placements]:
        """Write the `shards`. Yields the places of the storages of each shard when it is written.

        Args:
            fill: called with the storages of each shard before their bytes are read.
        """
        for shard in self.shards:
            fill([self._storages[index] for index in shard])
            yield self._write(shard)

    def _write(self, shard: Sequence[int]) -> Placements:
        buffers, places = buffers_for([self._storages[index] for index in shard])
        # Not in the same object, if the manifest refers to older shards: a later user of this shard would keep those, too.
        is_beside = len(self.shards) == 1 and not self.stored
        manifest = self._describe(dict(zip(shard, places, strict=True))) if is_beside else None
        ref = object_store.put((buffers, manifest))
        if manifest is not None:
            self._manifest = ref
        return self._note(ref, dict(zip(shard, places, strict=True)))

    def _note(self, ref: ray.ObjectRef[Any], places: Mapping[int, tuple[int, int]]) -> Placements:
        """Note the object that contains a shard, given buffer and offset of its storages. Returns their places."""
        placed = {index: Placement(ref, *place) for index, place in places.items()}
        self.placements.update(placed)
        self.sizes[ref] = sum(self._storages[index].nbytes for index in places)
        return placed

    def finish(self) -> ray.ObjectRef[Any]:
        """Write the manifest, if it is not written yet. All shards must be written. Returns the reference to the manifest."""
        if self._manifest is None:
            self._manifest = object_store.put((buffers_for([])[0], self._describe({})))
        return self._manifest

    def _describe(self, beside: Mapping[int, tuple[int, int]]) -> Manifest:
        """Create the manifest, given buffer and offset of each storage that is written to the same object."""
        shards: dict[ray.ObjectRef[Any], int] = {}
        rows: list[LocationRow] = []
        for index, storage in enumerate(self._storages):
            if index in beside:
                rows.append((BESIDE, *beside[index], storage.nbytes))
            elif (placement := self.placements.get(index)) is None:
                rows.append((NOWHERE, 0, 0, 0))
            else:
                shard = shards.setdefault(placement.shard, len(shards) + 1)
                rows.append((shard, placement.buffer, placement.offset, storage.nbytes))
        return self._make_manifest(rows, list(shards))


def _by_shard(placements: Placements) -> list[Placements]:
    by_shard: dict[ray.ObjectRef[Any], Placements] = {}
    for index, placement in placements.items():
        by_shard.setdefault(placement.shard, {})[index] = placement
    return list(by_shard.values())


def buffers_for(storages: Sequence[Storage]) -> tuple[list[pickle.PickleBuffer], list[tuple[int, int]]]:
    """Return the buffers of one shard (a nonce first, the pack of small storages last), and buffer and offset of each storage."""
    buffers = [pickle.PickleBuffer(os.urandom(NONCE_BYTES))]
    large = sum(storage.nbytes >= PACKED for storage in storages)
    packed = 0
    places = []
    for storage in storages:
        if storage.nbytes >= PACKED:
            places.append((len(buffers), 0))
            buffers.append(pickle.PickleBuffer(storage.to_buffer()))
        else:
            packed += -packed % ALIGNMENT
            places.append((1 + large, packed))
            packed += storage.nbytes
    if packed:
        buffers.append(pickle.PickleBuffer(_pack(storages, places, packed)))
    return buffers, places


def _pack(storages: Sequence[Storage], places: Sequence[tuple[int, int]], nbytes: int) -> memoryview:
    pack = memoryview(bytearray(nbytes))
    for storage, (_, offset) in zip(storages, places, strict=True):
        if storage.nbytes < PACKED:
            pack[offset : offset + storage.nbytes] = storage.to_buffer()
    return pack
