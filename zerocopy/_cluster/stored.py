"""What do the registry's tasks do? They store shards, and run sources.

This file is pickled by value for the registry's process and for its tasks. So their processes need not import torch.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from typing import Any, TypeAlias

import ray

from zerocopy._cluster.shards import Ref

LEAST_STORED = 128 << 10  # bytes. Ray keeps smaller results in the heap of their owner, where no process can map them
NONCE_BYTES = 16  # random bytes at the start of a shard, which no other shard has

# A shard in the store; or memory on its node: the path, the number of bytes, and the proof, which follows these bytes.
Source: TypeAlias = list[Ref] | tuple[str, int, bytes]


class Packed:
    """A pickled object. A process that reads it gets the object itself."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.content,)


def nonce() -> bytes:
    """Return random bytes, which prove that a mapping shows the right object."""
    return os.urandom(NONCE_BYTES)


def store(source: Source, rows: Sequence[tuple[int, int, int]]) -> tuple[Any, list[bytes]]:
    """Return a shard, which the submitter of this task then owns; and the digests of its storages, computed here.

    Args:
        source: the shard. A reference is in a list, because Ray limits the memory of direct arguments: the task would wait until
            the arguments of other tasks leave enough room.
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
    path, nbytes, proof = source
    with open(path, "rb") as file:  # noqa: PTH123
        # In another container, the same path may lead to the memory of another process.
        if os.pread(file.fileno(), len(proof), nbytes) != proof:
            raise OSError(f"{path} is not the memory of the publisher")
        return [nonce(), mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ)]


def run_source(call: bytes) -> Any:
    """Run the source of a version."""
    return pickle.loads(call)()
