"""How are the bytes of a publication found in the store and mapped into this process?"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np
import ray

from zerocopy._compat.linux import is_equal
from zerocopy._store import object_store
from zerocopy._store.manifest import BESIDE, NOWHERE, Manifest
from zerocopy._store.mapping import Mapped, map_private, start_of, starts_of
from zerocopy._store.storages import Region, digest_of_bytes
from zerocopy.errors import ArgumentError, CorruptedError


def buffers_of(shard: ray.ObjectRef[Any]) -> Sequence[Any]:
    """Return the buffers of a shard; see `object_store.get`."""
    buffers: Sequence[Any] = object_store.get(shard)[0]
    return buffers


def manifest_of(reference: ray.ObjectRef[Any]) -> Manifest:
    """Return the manifest of a publication; see `object_store.get`."""
    return manifest_in(reference, object_store.get(reference))


def manifest_in(reference: ray.ObjectRef[Any], content: tuple[Sequence[Any], Any]) -> Manifest:
    """Return the manifest of a publication, given the content of its store object."""
    buffers, stored = content
    manifest = stored if isinstance(stored, Manifest) else Manifest.assembled(*stored)
    manifest.reference, manifest.beside = reference, buffers
    return manifest


class StoredMemory:
    """The memory of a manifest's storages in this process. Each load maps it again."""

    def __init__(self, manifest: Manifest, needed: Iterable[int], *, require_isolation: bool) -> None:
        self._manifest = manifest
        self._locations = manifest.location_rows
        self._require_isolation = require_isolation
        self._needed = list(needed)
        shards = sorted({self._locations[storage][0] for storage in self._needed} - {NOWHERE, BESIDE})
        others = object_store.get_all([manifest.shards[shard - 1] for shard in shards]) if shards else []
        self._buffers = {
            BESIDE: manifest.beside,
            **{n: buffers for n, (buffers, _) in zip(shards, others, strict=True)},
        }
        self.mapped: dict[int, Mapped] = {}  # writable memory, by number of the shard

    def regions(self, on_devices: Container[int]) -> dict[int, Region]:
        """Return the bytes of each storage, private to this load. For storages `on_devices`, they are the source of the copy."""
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
        source = self._manifest.shard(shard) if writable else None
        return map_private(
            buffers, starts_of(buffers), shard=source, writable=writable, required=self._require_isolation
        )

    def mapped_memory(self) -> list[Any]:
        """The memory that has been mapped for tensors so far."""
        return [mapped.memory for mapped in self.mapped.values()]

    def check_digests(self) -> None:
        """Compare the needed storages with the digests in the manifest.

        Raises:
            ArgumentError: the manifest has no digests.
            CorruptedError: some bytes differ.
        """
        digests = self._manifest.digests
        if len(digests) < len(self._locations):
            raise ArgumentError(
                "verify=True needs digests (checksums), which only publications with a name have.",
                hint="publish it under a name: zerocopy.publish(..., name=...).",
            )
        wrong = [storage for storage in self._needed if self._digest(storage) not in (None, digests[storage])]
        if wrong:
            raise CorruptedError(
                f"{len(wrong)} of {len(self._needed)} storages have other bytes than were published.",
                hint="something other than zerocopy has written to the object store. Publish again.",
                storages=wrong,
            )

    def _digest(self, storage: int) -> bytes | None:
        """Return the digest of the bytes that tensors show or were copied from; None if the storage has no bytes."""
        shard, buffer, offset, nbytes = self._locations[storage]
        if shard == NOWHERE:
            return None
        if shard in self.mapped:
            memory, offsets = self.mapped[shard]
            start = offsets[buffer] + offset
            return digest_of_bytes(np.frombuffer(memory, np.uint8, nbytes, start))
        return digest_of_bytes(memoryview(self._buffers[shard][buffer])[offset : offset + nbytes])

    def content(self, storage: int) -> bytes:
        """Return a copy of the bytes of a storage."""
        shard, buffer, offset, nbytes = self._locations[storage]
        return bytes(memoryview(self._buffers[shard][buffer])[offset : offset + nbytes]) if nbytes else b""

    def holds(self, storage: int, content: np.ndarray[Any, Any]) -> bool:
        """Whether a storage has exactly the bytes of `content` in the store."""
        shard, buffer, offset, nbytes = self._locations[storage]
        if nbytes != content.nbytes:
            return False
        if nbytes == 0:
            return True
        return is_equal(start_of(self._buffers[shard][buffer]) + offset, start_of(content), nbytes)
