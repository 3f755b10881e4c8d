"""Is there really only one copy of the weights? Checks for tests, including your own. Linux only."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zerocopy._compat import linux
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.manifest import Handle
from zerocopy._store.mapping import around, store_files
from zerocopy._store.storages import COPIED, storage_of
from zerocopy._store.tensors import is_tensor_or_array
from zerocopy.errors import ArgumentError


def shares_memory(first: Any, second: Any) -> bool:
    """Whether two tensors, arrays, modules or pipelines of this process are views of the same physical memory.

    Pipelines and objects that hold models are compared by their shared parts, all other objects by all their tensors and
    arrays. Both objects are walked in the same order, and their tensors are compared in pairs. Two tensors share memory if they
    start at the same address; or if they start at the same byte of the same file of the object store, in pages that were not
    written. Tensors whose storage has at most 16 bytes count only if there are no larger ones, because each load copies them.

    Raises:
        ArgumentError: an argument is a publication, and not what its `load()` returned.
        OSError: the kernel does not report which pages were written.
    """
    for obj in (first, second):
        _check_live(obj, "shares_memory")
    ours, theirs = _tensors(first), _tensors(second)
    if len(ours) != len(theirs) or not ours:
        return False
    pairs = list(zip(ours, theirs, strict=True))
    counted = [pair for pair in pairs if not all(map(_is_tiny, pair))] or pairs
    files = store_files()
    return all(_origin(one, files) == _origin(other, files) for one, other in counted)


def assert_zero_copy(pipeline: Any) -> None:
    """Fail unless every shared tensor of a loaded pipeline is a view of the object store that was not written.

    Tensors whose storage has at most 16 bytes do not count, because each load copies them.

    Raises:
        ArgumentError: `pipeline` is a publication, and not what its `load()` returned.
        AssertionError: a tensor has memory of its own. The message names the tensor and its private bytes.
        OSError: the kernel does not report which pages were written.
    """
    _check_live(pipeline, "assert_zero_copy")
    files = store_files()
    for tensor in _tensors(pipeline):
        own = 0 if _is_tiny(tensor) else _own_bytes(tensor, files)
        if own:
            path = (
                paths.path_to(pipeline, tensor, paths.name_of(pipeline)) or f"a tensor inside {paths.name_of(pipeline)}"
            )
            if isinstance(tensor, torch.Tensor) and not tensor.is_cpu:
                where = f"it is on {tensor.device}"
            else:
                where = f"{own:,} of its {tensor.nbytes:,} bytes are memory of this process"
            raise AssertionError(f"{path} is not a view of the object store: {where}")


def _check_live(obj: object, what: str) -> None:
    """Refuse a publication: it holds no tensors, so there would be nothing to check."""
    if isinstance(obj, Handle):
        raise ArgumentError(
            f"{what}() expects a loaded pipeline, got a publication.", hint="pass the pipeline that its load() returns."
        )


def _tensors(obj: Any) -> list[Any]:
    if is_tensor_or_array(obj):
        return [obj]
    parts = strip([obj], zone=Zone.AUTO, split=Split.ROOTS).roots
    if not parts and not is_pipeline_class(type(obj)):
        parts = [obj]
    stripped = strip(parts, zone=Zone.SHARED, split=Split.NOWHERE, within=obj)
    return [external for external in stripped.externals if is_tensor_or_array(external)]


def _is_tiny(tensor: Any) -> bool:
    return storage_of(tensor).nbytes <= COPIED


def _origin(tensor: torch.Tensor | np.ndarray[Any, Any], files: Sequence[linux.Mapping]) -> tuple[object, ...]:
    """Where the bytes of a tensor come from: a place in a file of the store, or memory of this process."""
    start, _ = _extent(tensor)
    file = around(start, start, files)
    if file is None or _own_bytes(tensor, files):
        return "private", start
    return "store", file.device, file.inode, file.file_offset + start - file.start


def _own_bytes(tensor: torch.Tensor | np.ndarray[Any, Any], files: Sequence[linux.Mapping]) -> int:
    """How many bytes of a tensor are private: all of them, or those in pages of the store that were written."""
    start, nbytes = _extent(tensor)
    file = around(start, start, files)
    if file is None or not nbytes:
        return nbytes
    page = mmap.PAGESIZE
    own = linux.own_pages(start // page * page, -(-(start + nbytes) // page) * page)
    if own is None:
        raise OSError("the kernel does not tell which pages of this process were written")
    return sum(min(end, start + nbytes) - max(first, start) for first, end in own)


def _extent(tensor: Any) -> tuple[int, int]:
    if isinstance(tensor, np.ndarray):
        return int(tensor.__array_interface__["data"][0]), tensor.nbytes
    return tensor.data_ptr(), min(tensor.nbytes, storage_of(tensor).nbytes)
