"""How do tensors over files reach the store without staying in memory?

They are filled just before they are written to the store, and dropped afterwards.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Sequence

import torch

from zerocopy._compat.linux import drop_pages, own_pages
from zerocopy._store.storages import Storage, storage_of


class Pages:
    """The memory of one pipeline whose tensors are in files."""

    def __init__(self, mapped: Collection[object], dtype: torch.dtype | None) -> None:
        """`mapped`: keys of the storages over files. `dtype`: the dtype that floating-point tensors are converted to."""
        self._mapped = mapped
        self._dtype = dtype
        self._used: set[object] = set()  # keys of the source storages that tensors of the pipeline use
        self._ours: set[object] = set()  # keys of the storages over files, and of the storages to fill
        self._to_fill: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensor(self, source: torch.Tensor) -> torch.Tensor:
        """`source`, if it covers a storage that no other tensor uses, and needs no conversion.

        Else a new tensor, which `source` will be copied into.
        """
        storage = storage_of(source)
        dtype = self._dtype if self._dtype is not None and source.is_floating_point() else source.dtype
        is_whole = source.nbytes == storage.nbytes and storage.key not in self._used
        self._used.add(storage.key)
        if not source.numel() or (is_whole and dtype == source.dtype):
            if storage.key in self._mapped:
                self._ours.add(storage.key)
            return source
        memory = mmap.mmap(-1, math.prod(source.shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=dtype).view(source.shape)
        key = storage_of(tensor).key
        self._ours.add(key)
        self._to_fill[key] = tensor, source
        return tensor

    def fill(self, storages: Sequence[Storage]) -> None:
        """Fill these storages with the values from the files, converted to the dtype."""
        for storage in storages:
            if storage.key in self._to_fill:
                tensor, source = self._to_fill[storage.key]
                tensor.copy_(source)
                below = storage_of(source)
                if below.key in self._mapped:
                    _drop_unwritten(below)

    def drop(self, storages: Sequence[Storage]) -> None:
        """Release the memory of these storages: the store has their bytes now."""
        for storage in storages:
            if storage.key in self._to_fill and storage.address is not None:
                drop_pages(storage.address, storage.nbytes)  # its source is still there
            elif storage.key in self._ours:
                _drop_unwritten(storage)


def _drop_unwritten(storage: Storage) -> None:
    """Drop the pages of a storage over a file, which can be read again.

    If a hook of `load_state_dict` wrote any, or the kernel does not report written pages, all stay.
    """
    if storage.address is None:
        return
    start = storage.address - storage.address % mmap.PAGESIZE
    end = storage.address + storage.nbytes
    if own_pages(start, end + -end % mmap.PAGESIZE) == []:
        drop_pages(storage.address, storage.nbytes)
