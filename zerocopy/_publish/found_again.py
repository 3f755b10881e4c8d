"""Which tensors of a manifest does a live pipeline have, byte by byte?

They are found by their place in the store, not by their identity: a loaded pipeline may have been taken apart and put together
again. Tiny storages are in ordinary memory, and are found by their bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from zerocopy._store import windows
from zerocopy._store.manifest import Manifest
from zerocopy._store.read import StoredMemory
from zerocopy._store.storages import COPIED, Storage
from zerocopy._store.tensors import TensorSpec, TensorTable

_Specs: TypeAlias = dict[int, set[TensorSpec]]  # the specs of the tensors over each storage, with the storage index 0


class Indices(NamedTuple):
    """The indices in a manifest of live tensors, by id, and of their storages, by key."""

    tensors: dict[int, int]
    storages: dict[object, int]


def find(table: TensorTable, manifest: Manifest) -> Indices | None:
    """The indices in `manifest` of all tensors in `table`; None if the manifest lacks one of them, or has other bytes for it."""
    storages = _find_storages(table, manifest)
    if storages is None:
        return None
    free: dict[TensorSpec, list[int]] = defaultdict(list)
    for index, spec in enumerate(manifest.specs):
        free[spec].append(index)
    tensors: dict[int, int] = {}
    for tensor, spec in table.items():
        same = free.get(spec.over(storages[table.key_of(spec)]))
        if not same:
            return None
        tensors[id(tensor)] = same.pop(0)  # tensors with equal descriptions are interchangeable
    return Indices(tensors, storages)


def _find_storages(table: TensorTable, manifest: Manifest) -> dict[object, int] | None:
    places = windows.places_of(table.storages)
    shards = [manifest.reference, *manifest.shards]  # in the order of the numbers in locations
    numbers = {shard: number for number, shard in enumerate(shards)}
    by_location = {location: index for index, location in enumerate(manifest.locations)}
    tiny = _Tiny(manifest)
    needed = _specs_of(table.specs)
    found: dict[object, int] = {}
    for position, storage in enumerate(table.storages):
        place = places.get(storage.key)
        if place is None:
            index = tiny.take(storage, needed[position])
        else:
            row: Any = (numbers.get(place.shard), place.buffer, place.offset, storage.nbytes)
            index = by_location.get(row)
        if index is None:
            return None
        found[storage.key] = index
    return found if len(set(found.values())) == len(found) else None  # two loads of one storage are different memory


class _Tiny:
    """The tiny storages of a manifest, by their bytes. Each is found only once."""

    def __init__(self, manifest: Manifest) -> None:
        indices = [index for index, location in enumerate(manifest.locations) if location.nbytes <= COPIED]
        memory = StoredMemory(manifest, indices, require_isolation=False)
        self._specs = _specs_of(manifest.specs)
        self._free: dict[bytes, list[int]] = defaultdict(list)
        for index in indices:
            self._free[memory.content(index)].append(index)

    def take(self, storage: Storage, specs: set[TensorSpec]) -> int | None:
        """The index of a tiny storage with the bytes of `storage` and tensors like `specs`; None if there is none."""
        if storage.nbytes > COPIED:
            return None
        same = self._free.get(storage.to_bytes().tobytes(), [])
        index = next((index for index in same if self._specs[index] >= specs), None)
        if index is not None:
            same.remove(index)
        return index


def _specs_of(specs: Sequence[TensorSpec]) -> _Specs:
    found: _Specs = defaultdict(set)
    for spec in specs:
        found[spec.storage].add(spec.over(0))
    return found
