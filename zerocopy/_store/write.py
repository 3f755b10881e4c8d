"""How are storages grouped into objects of the store, and found there again."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from zerocopy._compat.linux import is_equal
from zerocopy._split.introspect import Skeleton
from zerocopy._store import object_store
from zerocopy._store.mapping import Mapped, map_private, start_of, starts_of
from zerocopy._store.tensors import Region, Storage, TensorSpec

MB = 1 << 20
FIELD_SHARD = 4 * MB  # ... or at the end of a shared root, when it has at least this
PACKED = MB // 32  # a storage below this is copied into a pack: every buffer of its own costs microseconds
PACKS_PER_SHARD = 64 * MB  # bounds the heap that packs take while publishing
ALIGNMENT = 64
NONCE_BYTES = 16

NOWHERE, BESIDE = -1, 0  # instead of the number of a shard: there are no bytes, or they are beside the manifest


class Location(NamedTuple):
    """Where the bytes of a storage are: from `offset` on in a buffer of a shard."""

    shard: int
    buffer: int
    offset: int
    nbytes: int


class Manifest:
    """What a publication keeps in the store: descriptions of all shared tensors, the shared skeleton, and where bytes are.

    Attributes:
        spec_rows: of each tensor a row as `rows_of` makes it.
        location_rows: of each storage a `Location` as a plain tuple.
        beside: in a process that got the manifest, the buffers of the object of the store that it came in.
    """

    def __init__(
        self,
        spec_rows: Sequence[tuple[Any, ...]],
        location_rows: Sequence[tuple[int, int, int, int]],
        devices: Mapping[int, tuple[str | None, ...]],
        skeleton: Skeleton,
        shards: Sequence[ray.ObjectRef[Any]],
        is_reusable: bool,
    ) -> None:
        self.spec_rows = spec_rows
        self.location_rows = location_rows
        self.devices = devices
        self.skeleton = skeleton
        self.shards = shards
        self.is_reusable = is_reusable
        self.beside: Sequence[Any] = ()

    @functools.cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(TensorSpec.of_row, self.spec_rows))

    @functools.cached_property
    def locations(self) -> tuple[Location, ...]:
        return tuple(map(Location._make, self.location_rows))

    def __reduce__(self) -> tuple[Any, ...]:
        rows = self.spec_rows, self.location_rows
        return Manifest, (*rows, self.devices, self.skeleton, self.shards, self.is_reusable)


class Placement(NamedTuple):
    """A storage's place in the store, good as long as `shard` is referenced."""

    shard: ray.ObjectRef[Any]
    buffer: int
    offset: int


class Cut(NamedTuple):
    """How large shards may grow: to `least` bytes, or to one of `parts` of all if that is more."""

    least: int
    parts: int


ORDINARY = Cut(512 * MB, 8)
STREAMED = Cut(MB, 16)  # where each shard's source is freed before the next one is written


def group(sizes: Sequence[int], root_ends: Iterable[int], cut: Cut = ORDINARY) -> list[list[int]]:
    """Indices of the storages of each shard, in order, given the sizes of all and the ends of their roots."""
    target = max(cut.least, sum(sizes) // cut.parts)
    ends = set(root_ends)
    shards: list[list[int]] = [[]]
    total = packed = 0
    for index, size in enumerate(sizes):
        too_large = total + size > target or packed > PACKS_PER_SHARD
        if shards[-1] and (too_large or (index in ends and total >= FIELD_SHARD)):
            shards.append([])
            total = packed = 0
        shards[-1].append(index)
        total += size
        packed += size if size < PACKED else 0
    return [shard for shard in shards if any(sizes[index] for index in shard)]


def write(
    storages: Sequence[Storage],
    root_ends: Iterable[int],
    stored: Mapping[object, Placement],
    make_manifest: Callable[[Sequence[tuple[int, int, int, int]], Sequence[ray.ObjectRef[Any]]], Manifest],
    cut: Cut,
    about_to_write: Callable[[list[Storage]], None],
    written: Callable[[Mapping[int, Placement]], None],
) -> tuple[list[Placement | None], ray.ObjectRef[Any]]:
    """Write storages to the store, shard by shard, each from where it is, and their manifest: with the shard, if there is one.

    Args:
        stored: where storages are that are in the store already.
        make_manifest: makes it from the location of each storage, and the shards that these count from 1 on.
        cut: how large shards may grow.
        about_to_write: called with the storages of each shard before their bytes are read.
        written: called with the places of the storages of each shard, by index, when it is written.

    Returns:
        The place of each storage that has bytes, and the reference to the manifest.
    """
    placements = [stored.get(storage.key) for storage in storages]

    def settle(places: Mapping[int, Placement]) -> None:
        for index, place in places.items():
            placements[index] = place
        written(places)

    by_shard: dict[ray.ObjectRef[Any], dict[int, Placement]] = {}
    for index, place in enumerate(placements):
        if place is not None:
            by_shard.setdefault(place.shard, {})[index] = place
    for places in by_shard.values():
        settle(places)
    sizes = [0 if place else storage.nbytes for storage, place in zip(storages, placements, strict=True)]
    shards = [[index for index in shard if sizes[index]] for shard in group(sizes, root_ends, cut)]
    beside = shards.pop() if len(shards) == 1 else []
    for shard in shards:
        about_to_write([storages[index] for index in shard])
        buffers, spots = _lay_out([storages[index] for index in shard])
        ref = object_store.put((buffers, None))
        settle({index: Placement(ref, *spot) for index, spot in zip(shard, spots, strict=True)})
    about_to_write([storages[index] for index in beside])
    buffers, spots = _lay_out([storages[index] for index in beside])
    locations, refs = _locate(storages, placements, dict(zip(beside, spots, strict=True)))
    ref = object_store.put((buffers, make_manifest(locations, refs)))
    settle({index: Placement(ref, *spot) for index, spot in zip(beside, spots, strict=True)})
    return placements, ref


def _lay_out(storages: Sequence[Storage]) -> tuple[list[pickle.PickleBuffer], list[tuple[int, int]]]:
    """The buffers of one shard, a nonce first, the pack of small storages last; and where each storage is."""
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


def _locate(
    storages: Sequence[Storage], placements: Sequence[Placement | None], beside: Mapping[int, tuple[int, int]]
) -> tuple[list[tuple[int, int, int, int]], list[ray.ObjectRef[Any]]]:
    """Where storages are, in the form that a manifest keeps, and the shards that it refers to.

    Args:
        beside: buffers and offsets of those that are written beside the manifest.
    """
    shards: dict[ray.ObjectRef[Any], int] = {}
    locations: list[tuple[int, int, int, int]] = []
    for index, (storage, placement) in enumerate(zip(storages, placements, strict=True)):
        if index in beside:
            locations.append((BESIDE, *beside[index], storage.nbytes))
        elif placement is None:
            locations.append((NOWHERE, 0, 0, 0))
        else:
            shard = shards.setdefault(placement.shard, len(shards) + 1)
            locations.append((shard, placement.buffer, placement.offset, storage.nbytes))
    return locations, list(shards)


def buffers_of(shard: ray.ObjectRef[Any]) -> Sequence[Any]:
    """The buffers of a shard; see `_store.get`."""
    buffers: Sequence[Any] = object_store.get(shard)[0]
    return buffers


def manifest_of(reference: ray.ObjectRef[Any]) -> Manifest:
    """The manifest of a publication; see `_store.get`."""
    buffers, manifest = object_store.get(reference)
    manifest.beside = buffers
    result: Manifest = manifest
    return result


class StoredMemory:
    """The memory of a manifest's storages in this process: mapped anew for each load."""

    def __init__(self, manifest: Manifest, needed: Iterable[int], *, require_isolation: bool) -> None:
        self._locations = manifest.location_rows
        self._require_isolation = require_isolation
        self._needed = list(needed)
        shards = sorted({self._locations[storage][0] for storage in self._needed} - {NOWHERE, BESIDE})
        others = object_store.get_all([manifest.shards[shard - 1] for shard in shards]) if shards else []
        self._buffers = {
            BESIDE: manifest.beside,
            **{n: buffers for n, (buffers, _) in zip(shards, others, strict=True)},
        }
        self.mapped: dict[int, Mapped] = {}  # writable memory, by shard

    def regions(self, on_devices: Container[int]) -> dict[int, Region]:
        """The bytes of each storage, private to this load; of those `on_devices` the source to copy from."""
        read_only: dict[int, Mapped] = {}
        regions: dict[int, Region] = {}
        locations, mapped = self._locations, self.mapped
        for storage in self._needed:
            shard, buffer, offset, nbytes = locations[storage]
            if shard == NOWHERE:
                regions[storage] = bytearray(), 0, 0
                continue
            maps = read_only if storage in on_devices else mapped
            if shard not in maps:
                maps[shard] = self._map(shard, writable=maps is mapped)
            memory, offsets = maps[shard]
            regions[storage] = memory, offsets[buffer] + offset, nbytes
        return regions

    def _map(self, shard: int, *, writable: bool) -> Mapped:
        buffers = self._buffers[shard]
        return map_private(buffers, starts_of(buffers), writable=writable, required=self._require_isolation)

    def holds(self, storage: int, content: np.ndarray[Any, Any]) -> bool:
        """Whether a storage has exactly these bytes in the store."""
        shard, buffer, offset, nbytes = self._locations[storage]
        if nbytes != content.nbytes:
            return False
        if nbytes == 0:
            return True
        return is_equal(start_of(self._buffers[shard][buffer]) + offset, start_of(content), nbytes)
