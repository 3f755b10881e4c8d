"""What do the tasks run that the registry submits? They store shards, and run sources.

This file travels to the registry's process, and to those of its tasks, by value. So neither need import torch.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from typing import Any, TypeAlias

import ray

from zerocopy._cluster.shards import Ref

LEAST_STORED = 128 << 10  # bytes: Ray keeps smaller results in the heap of their owner, where nothing can map them
NONCE_BYTES = 16  # what is unique to a shard comes first

Source: TypeAlias = list[Ref] | tuple[str, int]  # a shard in the store, or memory at a path of its node, and bytes


class Packed:
    """Something pickled that is unpickled where it is read."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.content,)


def nonce() -> bytes:
    """What proves that a mapping shows the right object."""
    return os.urandom(NONCE_BYTES)


def store(source: Source, rows: Sequence[tuple[int, int, int]]) -> tuple[Any, list[bytes]]:
    """Return a shard as a value of this task, which its submitter owns, and the digests of its storages, read here.

    Args:
        source: the shard. A reference stands in a list: as an argument of its own it would wait for room beside the arguments
            of other tasks.
        rows: buffer, offset and bytes of each storage.
    """
    import xxhash

    buffers = _buffers_of(source)
    views = [memoryview(buffer) for buffer in buffers]
    digests = [xxhash.xxh3_128_digest(views[buffer][offset : offset + nbytes]) for buffer, offset, nbytes in rows]
    missing = max(0, LEAST_STORED - sum(map(len, views)))
    padding = [pickle.PickleBuffer(bytes(missing))] if missing else []
    return ([*map(pickle.PickleBuffer, buffers), *padding], None), digests


def _buffers_of(source: Source) -> list[Any]:
    if isinstance(source, list):
        buffers: list[Any] = ray.get(source[0])[0]
        return buffers
    path, nbytes = source
    with open(path, "rb") as file:  # noqa: PTH123
        return [nonce(), mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ)]


def run_source(call: bytes) -> Any:
    """Run the source of a version."""
    return pickle.loads(call)()
