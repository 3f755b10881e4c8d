"""Predicates for tests, also users' own: is this really one copy? Linux only."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.mapping import is_store_file
from zerocopy._store.tensors import is_tensor_or_array, storage_of

_PAGE = 4096
_IS_FILE_PAGE = 1 << 61  # of an entry of /proc/self/pagemap, as the kernel's pagemap.rst describes it
_IS_PRESENT = 1 << 63


def shares_memory(first: Any, second: Any) -> bool:
    """Whether two tensors, arrays, modules or pipelines of this process are views of the same physical memory.

    Of a pipeline only the shared parts count, of anything else all tensors and arrays below it. Each tensor of the one is
    compared with that of the other at the same place of the walk. They share memory when they start at the same byte of
    the same file of the object store, in pages that nobody has written, or at the same address.
    """
    ours, theirs = _tensors(first), _tensors(second)
    if len(ours) != len(theirs) or not ours:
        return False
    return all(_origin(one) == _origin(other) for one, other in zip(ours, theirs, strict=True))


def assert_zero_copy(pipeline: Any) -> None:
    """Fail unless every shared tensor of a loaded pipeline is an unwritten view of the object store.

    Raises:
        AssertionError: a tensor has memory of its own; the message says which.
    """
    for tensor in _tensors(pipeline):
        if tensor.nbytes and _origin(tensor)[0] != "store":
            path = paths.path_to(pipeline, tensor, paths.name_of(pipeline))
            raise AssertionError(f"{path} is not a view of the object store, but {tensor.nbytes:,} bytes of its own")


def _tensors(obj: Any) -> list[Any]:
    if is_tensor_or_array(obj):
        return [obj]
    parts = [obj]
    if is_pipeline_class(type(obj)):
        parts = strip([obj], zone=Zone.AUTO, split=Split.ROOTS).roots
    stripped = strip(parts, zone=Zone.SHARED, split=Split.NOWHERE, within=obj)
    return [external for external in stripped.externals if is_tensor_or_array(external)]


def _origin(tensor: torch.Tensor | np.ndarray[Any, Any]) -> tuple[object, ...]:
    """Where the bytes of a tensor come from: a place in a file of the store, or memory of this process."""
    start, nbytes = _extent(tensor)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, device, inode, *path = line.split(maxsplit=5)
        low, high = (int(address, 16) for address in addresses.split("-"))
        if low <= start < high and path and is_store_file(path[0]) and not _is_written(start, nbytes):
            return "store", device, inode, int(offset, 16) + start - low
    return "private", start


def _extent(tensor: Any) -> tuple[int, int]:
    if isinstance(tensor, np.ndarray):
        return int(tensor.__array_interface__["data"][0]), tensor.nbytes
    return tensor.data_ptr(), min(tensor.nbytes, storage_of(tensor).nbytes)


def _is_written(start: int, nbytes: int) -> bool:
    """Whether a write has given this process a page of its own in this range."""
    first, last = start // _PAGE, (start + max(nbytes, 1) - 1) // _PAGE
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        content = pagemap.read((last - first + 1) * 8)
    entries = struct.unpack(f"{len(content) // 8}Q", content)
    return any(entry & _IS_PRESENT and not entry & _IS_FILE_PAGE for entry in entries)
