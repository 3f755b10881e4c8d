"""How are storages grouped into objects of the store, and found there again."""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from zerocopy import _store
from zerocopy._introspector import Skeleton
from zerocopy._mapping import Mapped, map_private
from zerocopy._tensors import Region, Storage, TensorSpec

MB = 1 << 20
FIELD_SHARD = 4 * MB  # ... or at the end of a shared root, when it has at least this
PACKED = MB // 4  # a storage below this is copied into a pack: every buffer of its own costs some 0.1 ms
PACKS_PER_SHARD = 16 * MB  # bounds the heap that packs take while publishing
ALIGNMENT = 64
NONCE_BYTES = 16


class Location(NamedTuple):
    """Where the bytes of a storage are: from `offset` on in a buffer of a shard. The shard is -1 where there are no bytes."""

    shard: int
    buffer: int
    offset: int
    nbytes: int


class Manifest:
    """What a publication keeps in the store: descriptions of all shared tensors, the shared skeleton, and where bytes are.

    Descriptions travel as plain tuples: thousands of named ones would take longer to unpickle than the skeleton.
    """

    def __init__(
        self,
        specs: Sequence[tuple[Any, ...]],
        locations: Sequence[tuple[int, int, int, int]],
        devices: Mapping[int, tuple[str | None, ...]],
        skeleton: Skeleton,
        shards: Sequence[ray.ObjectRef[Any]],
        is_reusable: bool,
    ) -> None:
        self.spec_rows = specs
        self.location_rows = locations
        self.devices = devices
        self.skeleton = skeleton
        self.shards = shards
        self.is_reusable = is_reusable

    @functools.cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(TensorSpec._make, self.spec_rows))

    @functools.cached_property
    def locations(self) -> tuple[Location, ...]:
        return tuple(map(Location._make, self.location_rows))

    def __reduce__(self) -> tuple[Any, ...]:
        rows = tuple(map(tuple, self.spec_rows)), tuple(map(tuple, self.location_rows))
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


ORDINARY = Cut(256 * MB, 8)
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


def put_storages(
    storages: Sequence[Storage],
    root_ends: Iterable[int],
    stored: Mapping[object, Placement],
    cut: Cut = ORDINARY,
    about_to_write: Callable[[list[Storage]], None] = lambda _: None,
) -> Iterator[dict[int, Placement]]:
    """Write storages to the store, shard by shard, each from where it is. Those in `stored` are there already.

    Yields:
        The places of the storages of each shard, by index, when it is written.
    """
    there = {i: stored[storage.key] for i, storage in enumerate(storages) if storage.key in stored}
    by_shard: dict[ray.ObjectRef[Any], dict[int, Placement]] = {}
    for index, place in there.items():
        by_shard.setdefault(place.shard, {})[index] = place
    yield from by_shard.values()
    sizes = [0 if index in there else storage.nbytes for index, storage in enumerate(storages)]
    for shard in group(sizes, root_ends, cut):
        members = [index for index in shard if sizes[index]]
        content = [storages[index] for index in members]
        about_to_write(content)
        yield dict(zip(members, _put_shard(content), strict=True))


def _put_shard(storages: Sequence[Storage]) -> list[Placement]:
    buffers, places = _lay_out(storages)
    ref = _store.put(buffers)
    return [Placement(ref, buffer, offset) for buffer, offset in places]


def _lay_out(storages: Sequence[Storage]) -> tuple[list[pickle.PickleBuffer], list[tuple[int, int]]]:
    """The buffers of one shard, a nonce first, the pack of small storages last; and where each storage is."""
    buffers = [pickle.PickleBuffer(os.urandom(NONCE_BYTES))]
    large = sum(storage.nbytes >= PACKED for storage in storages)
    packed = 0
    places = []
    for storage in storages:
        if storage.nbytes >= PACKED:
            places.append((len(buffers), 0))
            buffers.append(pickle.PickleBuffer(storage.to_bytes().data))
        else:
            packed += -packed % ALIGNMENT
            places.append((1 + large, packed))
            packed += storage.nbytes
    if packed:
        buffers.append(pickle.PickleBuffer(_pack(storages, places, packed).data))
    return buffers, places


def _pack(storages: Sequence[Storage], places: Sequence[tuple[int, int]], nbytes: int) -> np.ndarray[Any, Any]:
    pack = np.zeros(nbytes, np.uint8)
    for storage, (_, offset) in zip(storages, places, strict=True):
        if storage.nbytes < PACKED:
            pack[offset : offset + storage.nbytes] = storage.to_bytes()
    return pack


def locate(
    storages: Sequence[Storage], placements: Sequence[Placement | None]
) -> tuple[tuple[Location, ...], tuple[ray.ObjectRef[Any], ...]]:
    """Placements in the form that a manifest keeps: shards once each, and locations that number them."""
    shards: dict[ray.ObjectRef[Any], int] = {}
    locations = []
    for storage, placement in zip(storages, placements, strict=True):
        if placement is None:
            locations.append(Location(-1, 0, 0, 0))
        else:
            shard = shards.setdefault(placement.shard, len(shards))
            locations.append(Location(shard, placement.buffer, placement.offset, storage.nbytes))
    return tuple(locations), tuple(shards)


class StoredMemory:
    """The memory of a manifest's storages in this process: mapped anew for each load."""

    def __init__(self, manifest: Manifest, needed: Iterable[int], *, require_isolation: bool) -> None:
        self._locations = manifest.location_rows
        self._require_isolation = require_isolation
        self._needed = list(needed)
        shards = sorted({self._locations[storage][0] for storage in self._needed} - {-1})
        buffers = _store.get_all([manifest.shards[shard] for shard in shards])
        self._buffers: dict[int, list[Any]] = dict(zip(shards, buffers, strict=True))
        self.mapped: dict[int, Mapped] = {}  # writable memory, by shard

    def regions(self, on_devices: Container[int]) -> dict[int, Region]:
        """The bytes of each storage, private to this load; of those `on_devices` the source to copy from."""
        read_only: dict[int, Mapped] = {}
        regions = {}
        for storage in self._needed:
            shard, buffer, offset, nbytes = self._locations[storage]
            if shard < 0:
                regions[storage] = (bytearray(), 0, 0)
                continue
            maps = read_only if storage in on_devices else self.mapped
            if shard not in maps:
                maps[shard] = map_private(
                    self._buffers[shard], writable=maps is self.mapped, required=self._require_isolation
                )
            memory, offsets = maps[shard]
            regions[storage] = (memory, offsets[buffer] + offset, nbytes)
        return regions

    def holds(self, storage: int, content: np.ndarray[Any, Any]) -> bool:
        """Whether a storage has exactly these bytes in the store."""
        shard, buffer, offset, nbytes = self._locations[storage]
        if nbytes != content.nbytes:
            return False
        if nbytes == 0:
            return True
        stored = np.frombuffer(self._buffers[shard][buffer], np.uint8)
        return _is_equal(_address(stored) + offset, _address(content), nbytes)


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


_memcmp: Callable[[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], int] = ctypes.CDLL(None).memcmp


def _is_equal(first: int, second: int, nbytes: int) -> bool:
    return _memcmp(ctypes.c_void_p(first), ctypes.c_void_p(second), ctypes.c_size_t(nbytes)) == 0
