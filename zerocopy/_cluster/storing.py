"""How does the registry become the owner of storages? Shard by shard, through memory that a store task can read.

The publisher copies a shard into anonymous memory. The store task, on the same node, returns the bytes that it reads there. The
memory is used again for the shard after the next. The object store is not used for this copy, because a copy there would stay for
up to a second after it was dropped.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import ray.exceptions

from zerocopy._cluster import client
from zerocopy._cluster.following import node
from zerocopy._cluster.shards import Given
from zerocopy._cluster.stored import nonce
from zerocopy._compat.linux import SharedMemory
from zerocopy._store import object_store
from zerocopy._store.storages import Storage
from zerocopy._store.write import ALIGNMENT
from zerocopy.errors import ZeroCopyError

UNDER_WAY = 2  # shards that are copied or stored at the same time

Extent: TypeAlias = tuple[int, int, int]  # of a storage in a shard: buffer, offset, bytes


def store_all(registry: Any, shards: Iterable[Sequence[Storage]]) -> Iterator[Given]:
    """Store the storages of each shard, so that the registry owns them. While one shard is stored, the next one is copied.

    Raises:
        client.RegistryLost: the registry has ended.
    """
    free = [_Staging() for _ in range(UNDER_WAY)]
    under_way: collections.deque[_Staging] = collections.deque()
    try:
        for shard in shards:
            staging = free.pop()
            staging.store(registry, shard)
            under_way.append(staging)
            if not free:
                yield under_way[0].wait()
                free.append(under_way.popleft())
        while under_way:
            yield under_way[0].wait()
            free.append(under_way.popleft())
    finally:
        for staging in (*free, *under_way):
            staging.close()


class _Staging:
    """Memory that holds one shard at a time, until the store has it."""

    def __init__(self) -> None:
        self._memory = SharedMemory()

    def store(self, registry: Any, shard: Sequence[Storage]) -> None:
        """Copy a shard here, and start its store task."""
        self._registry = registry
        self._extents, self._nbytes = _extents_of(shard)
        proof = nonce()
        room = self._memory.room_for(self._nbytes + len(proof))
        room[self._nbytes : self._nbytes + len(proof)] = proof
        memory = np.frombuffer(room, np.uint8)
        for storage, (_, offset, nbytes) in zip(shard, self._extents, strict=True):
            memory[offset : offset + nbytes] = storage.to_bytes()
        source = self._memory.path, self._nbytes, proof
        self._reply = client.submit(registry, "store", node(), source, self._extents)

    def wait(self) -> Given:
        """Wait, and return the shard that the registry owns, with the digests of the written bytes."""
        try:
            stored, digests = client.await_reply(self._registry, self._reply)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)):
                raise ZeroCopyError(
                    f"The process that stores {self._nbytes:,} bytes of weights was killed several times.",
                    hint="see whether this node has memory left; Ray's logs tell what killed it.",
                ) from error
            if isinstance(error.cause, object_store.NO_ROOM):
                raise object_store.store_full() from error
            if not isinstance(error.cause, OSError):
                raise
            # The task cannot open the memory of this process: other user, other container, or not Linux.
            content = memoryview(self._memory.room_for(self._nbytes))[: self._nbytes]
            own = object_store.put(([pickle.PickleBuffer(nonce()), pickle.PickleBuffer(content)], None))
            stored, digests = client.ask_one(self._registry, "store", node(), [own], self._extents)
        return stored, [(digest, *extent) for digest, extent in zip(digests, self._extents, strict=True)]

    def close(self) -> None:
        """Free the memory."""
        self._memory.close()


def _extents_of(shard: Sequence[Storage]) -> tuple[list[Extent], int]:
    """Return the places of storages in a shard's second buffer, and its length. The first buffer is a nonce."""
    extents, end = [], 0
    for storage in shard:
        start = end + -end % ALIGNMENT
        extents.append((1, start, storage.nbytes))
        end = start + storage.nbytes
    return extents, end
