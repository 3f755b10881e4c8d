"""Predicates for tests, also users' own: is this really one copy? Linux only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zerocopy._compat import linux
from zerocopy._compat.ray import is_store_file
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.tensors import is_tensor_or_array, storage_of


def shares_memory(first: Any, second: Any) -> bool:
    """Whether two tensors, arrays, modules or pipelines of this process are views of the same physical memory.

    Of a pipeline only the shared parts count, of anything else all tensors and arrays below it. Each tensor of the one is
    compared with that of the other at the same place of the walk. They share memory when they start at the same byte of
    the same file of the object store, in pages that nobody has written, or at the same address.
    """
    ours, theirs = _tensors(first), _tensors(second)
    if len(ours) != len(theirs) or not ours:
        return False
    files = _store_files()
    return all(_origin(one, files) == _origin(other, files) for one, other in zip(ours, theirs, strict=True))


def assert_zero_copy(pipeline: Any) -> None:
    """Fail unless every shared tensor of a loaded pipeline is an unwritten view of the object store.

    Raises:
        AssertionError: a tensor has memory of its own; the message says which.
    """
    tensors = _tensors(pipeline)
    files = _store_files()
    for tensor in tensors:
        if tensor.nbytes and _origin(tensor, files)[0] != "store":
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


def _store_files() -> list[linux.Mapping]:
    """Where this process has mapped the store: read once for all tensors."""
    return [mapping for mapping in linux.mappings() if is_store_file(mapping.path)]


def _origin(tensor: torch.Tensor | np.ndarray[Any, Any], files: Sequence[linux.Mapping]) -> tuple[object, ...]:
    """Where the bytes of a tensor come from: a place in a file of the store, or memory of this process."""
    start, nbytes = _extent(tensor)
    for file in files:
        if file.start <= start < file.end and not linux.has_pages_of_its_own(start, nbytes):
            return "store", file.device, file.inode, file.file_offset + start - file.start
    return "private", start


def _extent(tensor: Any) -> tuple[int, int]:
    if isinstance(tensor, np.ndarray):
        return int(tensor.__array_interface__["data"][0]), tensor.nbytes
    return tensor.data_ptr(), min(tensor.nbytes, storage_of(tensor).nbytes)
