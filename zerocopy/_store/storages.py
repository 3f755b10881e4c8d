"""Which memory does a tensor or an array use, and which memory can a rebuilt tensor or array use?"""

from __future__ import annotations

import ctypes
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

from zerocopy._compat.linux import Range
from zerocopy._compat.torch import id_of_storage

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

# Each load copies storages of at most this many bytes: one element of any dtype. A copy costs no more than a mapping, and torch
# can resize it. Observers start with one element, and grow.
COPIED = 16

# Memory of a storage in this process: a buffer or a tensor, the offset in it, bytes.
Region: TypeAlias = tuple[Any, int, int]


class Storage:
    """Memory that tensors and arrays of the publisher are views of. Keeps that memory alive.

    Attributes:
        key: equal for two storages over the same memory.
        address: its address in main memory; None for empty memory, and for memory of a device.
    """

    def __init__(self, key: object, nbytes: int, source: torch.UntypedStorage | Bytes, address: int | None) -> None:
        self.key = key
        self.nbytes = nbytes
        self.source: torch.UntypedStorage | Bytes | None = source
        self.address = address

    def to_bytes(self) -> Bytes:
        """The bytes, shape (nbytes,) uint8: a view of main memory, or a copy of the memory of a device."""
        if isinstance(self.source, np.ndarray):
            return self.source
        if self.source is None:
            raise RuntimeError("this storage was adopted")
        if self.address is None and self.nbytes:
            return _copied(self.source)
        # Not by `numpy()`: after that, torch never resizes the storage again.
        return _bytes_at(self.source.data_ptr(), self.nbytes, self.source)

    def to_buffer(self) -> Any:
        """The bytes as a buffer, valid while this storage is alive. It is cheap: it is called for each storage of a model."""
        if self.address is None or self.source is None:
            return self.to_bytes()
        # An array, because Ray cannot read back a buffer with the format of ctypes.
        memory: Any = (ctypes.c_char * self.nbytes).from_address(self.address)
        return np.frombuffer(memory, np.uint8)

    def forget(self) -> object:
        """Drop the memory, and return the object that keeps it alive."""
        source, self.source = self.source, None
        return source

    @property
    def extent(self) -> Range:
        """Its start and end in main memory.

        Raises:
            ValueError: it is not in main memory.
        """
        if self.address is None:
            raise ValueError("this storage is not in main memory")
        return self.address, self.address + self.nbytes


def _copied(storage: torch.UntypedStorage) -> Bytes:
    # NumPy asks for huge pages. The first access to ordinary pages takes longer.
    content = np.empty(storage.nbytes(), np.uint8)
    torch.from_numpy(content).copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
    return content


def digest_of_bytes(content: Any) -> bytes:
    """The digest of a buffer: XXH3-128 (https://xxhash.com), which is fast and not cryptographic."""
    return xxhash.xxh3_128_digest(content)


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Return the address of an array."""
    return int(array.__array_interface__["data"][0])


def storage_of(obj: torch.Tensor | np.ndarray[Any, Any]) -> Storage:
    """Return the storage of `obj`. Two objects over the same memory get equal keys, as long as both are alive.

    In main memory, the key is the address and the size, so that a tensor and an array over the same memory have equal keys.
    """
    if isinstance(obj, torch.Tensor):
        storage = obj.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes and obj.is_cpu:
            address = storage.data_ptr()
            return Storage((address, nbytes), nbytes, storage, address)
        return Storage(("storage", id_of_storage(storage)), nbytes, storage, None)
    root = obj
    while isinstance(root.base, np.ndarray):
        root = root.base
    if isinstance(root.base, torch.Tensor):
        return storage_of(root.base)
    low, high = np.lib.array_utils.byte_bounds(root)
    nbytes = high - low
    if not nbytes:
        return Storage(("empty", id(root)), 0, _bytes_at(low, 0, root), None)
    return Storage((low, nbytes), nbytes, _bytes_at(low, nbytes, root), low)


class _Memory:
    """Memory that `keep` owns, with NumPy's array interface."""

    def __init__(self, address: int, nbytes: int, keep: object) -> None:
        self.keep = keep
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def _bytes_at(address: int, nbytes: int, keep: object) -> Bytes:
    return np.asarray(_Memory(address, nbytes, keep)) if nbytes else np.empty(0, np.uint8)


def allocated(content: bytes) -> Region:
    """Return memory that torch has allocated, with this `content`. Unlike the memory of a buffer, torch can resize it."""
    with torch.inference_mode(False):
        memory = torch.empty(len(content), dtype=torch.uint8, device="cpu")
    ctypes.memmove(memory.data_ptr(), content, len(content))
    return memory, 0, len(content)
