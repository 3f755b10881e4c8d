"""How is a tensor or an array described against its storage, and rebuilt over memory that holds the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import nn

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

TENSOR, PARAMETER, ARRAY = range(3)


class TensorSpec(NamedTuple):
    """One tensor or array over one storage.

    `stride` and `offset` count elements for tensors and bytes for arrays. `flag` is `requires_grad` for a tensor and
    `writeable` for an array.
    """

    kind: int
    storage: int
    dtype: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    flag: bool
    is_conj: bool = False
    is_neg: bool = False
    is_inference: bool = False


class Storage:
    """Memory that tensors and arrays of the publisher are views of. It keeps that memory alive."""

    def __init__(self, key: object, nbytes: int, source: torch.UntypedStorage | Bytes) -> None:
        self.key = key
        self.nbytes = nbytes
        self._source = source

    def to_bytes(self) -> Bytes:
        """The bytes, shape (nbytes,) uint8: a view where they lie in main memory, else a copy from the device."""
        if isinstance(self._source, np.ndarray):
            return self._source
        storage = self._source if self._source.device.type == "cpu" else self._source.cpu()
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()


def is_tensor_or_array(obj: object) -> TypeGuard[torch.Tensor | np.ndarray[Any, Any]]:
    return isinstance(obj, (torch.Tensor, np.ndarray))


def is_plain(obj: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether `obj` can be described against a storage as it is."""
    if isinstance(obj, np.ndarray):
        return type(obj) is np.ndarray and not obj.dtype.hasobject
    if type(obj) not in (torch.Tensor, nn.Parameter) or obj.is_nested:
        return False
    return obj.layout is torch.strided and not obj.is_quantized


def is_meta(obj: object) -> bool:
    return isinstance(obj, torch.Tensor) and obj.device.type == "meta"


def _root_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def storage_of(obj: torch.Tensor | np.ndarray[Any, Any]) -> Storage:
    """The storage below `obj`. Two objects over the same memory get equal keys, as long as both are alive."""
    if isinstance(obj, torch.Tensor):
        storage = obj.untyped_storage()
        return Storage(_memory_key(storage), storage.nbytes(), storage)
    root = _root_array(obj)
    if isinstance(root.base, torch.Tensor):
        return storage_of(root.base)
    low, high = np.lib.array_utils.byte_bounds(root)
    return Storage(
        (low, high - low) if high > low else ("empty", id(root)), high - low, _bytes_at(low, high - low, root)
    )


def _memory_key(storage: torch.UntypedStorage) -> object:
    """Main memory is known by its place, so that a tensor and an array over it are known to share it."""
    if storage.device.type == "cpu" and storage.nbytes():
        return storage.data_ptr(), storage.nbytes()
    return "storage", storage._cdata


class _Memory:
    """Exposes memory that `keep` owns through NumPy's array interface."""

    def __init__(self, address: int, nbytes: int, keep: object) -> None:
        self.keep = keep
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def _bytes_at(address: int, nbytes: int, keep: object) -> Bytes:
    return np.asarray(_Memory(address, nbytes, keep)) if nbytes else np.empty(0, np.uint8)


def describe(obj: torch.Tensor | np.ndarray[Any, Any], storage: int, source: Storage) -> TensorSpec:
    """Describe `obj` as a view of `source`, which has index `storage`."""
    if isinstance(obj, np.ndarray):
        start = _address(source.to_bytes()) if source.nbytes else _address(obj)
        return TensorSpec(
            ARRAY, storage, obj.dtype, obj.shape, obj.strides, _address(obj) - start, bool(obj.flags.writeable)
        )
    return TensorSpec(
        PARAMETER if isinstance(obj, nn.Parameter) else TENSOR,
        storage,
        obj.dtype,
        tuple(obj.shape),
        obj.stride(),
        int(obj.storage_offset()),
        obj.requires_grad,
        obj.is_conj(),
        obj.is_neg(),
        obj.is_inference(),
    )


class TensorTable:
    """The tensors of one skeleton in order of appearance, and the storages below them.

    A table over a `base` refers to the base's storages by their index there and numbers its own ones after them.
    """

    def __init__(self, base: StorageIndex | None = None, base_count: int = 0) -> None:
        self.specs: list[TensorSpec] = []
        self.objects: list[Any] = []
        self.storages: list[Storage] = []
        self.index: dict[int, int] = {}
        self.storage_index: StorageIndex = dict(base or {})
        self._base_count = base_count

    def add(self, obj: Any) -> int:
        """The index of `obj`, which must be shareable."""
        known = self.index.get(id(obj))
        if known is not None:
            return known
        source = storage_of(obj)
        position = self.storage_index.get(source.key)
        if position is None:
            position = self.storage_index[source.key] = self._base_count + len(self.storages)
            self.storages.append(source)
        self.specs.append(describe(obj, position, source))
        self.objects.append(obj)
        self.index[id(obj)] = len(self.objects) - 1
        return self.index[id(obj)]


StorageIndex: TypeAlias = dict[object, int]


class Region(NamedTuple):
    """Memory of a storage in this process: `nbytes` bytes of `buffer` from `offset` on."""

    buffer: Any
    offset: int
    nbytes: int


class _Base:
    """One storage, rebuilt: hands out the tensors and arrays over it. The memory moves to `device` once."""

    def __init__(self, region: Region, dtype: torch.dtype | None, device: torch.device) -> None:
        self.region = region
        self.tensor = _typed_base(region, dtype or torch.uint8)
        self.dtype = dtype
        if device.type != "cpu":
            self.tensor = self.tensor.to(device)

    def strided(self, spec: TensorSpec) -> torch.Tensor:
        if spec.dtype is self.tensor.dtype:
            return self.tensor.as_strided(spec.shape, spec.stride, spec.offset)
        empty = torch.empty(0, dtype=spec.dtype, device=self.tensor.device)
        return empty.set_(self.tensor.untyped_storage(), spec.offset, spec.shape, spec.stride)

    def array(self, spec: TensorSpec) -> np.ndarray[Any, Any]:
        memory = np.frombuffer(self.region.buffer, np.uint8, self.region.nbytes, self.region.offset)
        array: np.ndarray[Any, Any] = np.ndarray(spec.shape, spec.dtype, memory, spec.offset, spec.stride)
        array.flags.writeable = spec.flag
        return array


def _typed_base(region: Region, dtype: torch.dtype) -> torch.Tensor:
    if region.nbytes == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    if region.nbytes % dtype.itemsize:  # a storage with a ragged end: only bytes cover it whole
        dtype = torch.uint8
    count = region.nbytes // dtype.itemsize
    return torch.frombuffer(region.buffer, dtype=dtype, count=count, offset=region.offset)


def rebuild(
    specs: Sequence[TensorSpec], region_of: Callable[[int], Region], device_of: Callable[[int], torch.device]
) -> list[Any]:
    """The tensors and arrays of `specs`, views of the regions (of their copies on the devices) of their storages.

    Args:
        region_of: the memory of a storage, by index.
        device_of: where the tensors of a storage belong, by index; arrays stay in main memory.
    """
    bases: dict[int, _Base] = {}
    rebuilt = []
    # What a loaded model is must not depend on where it is loaded: only what was an inference tensor becomes one.
    with torch.inference_mode(False), torch.no_grad():
        for spec in specs:
            base = bases.get(spec.storage)
            if base is None:
                dtype = None if spec.kind == ARRAY else spec.dtype
                base = bases[spec.storage] = _Base(region_of(spec.storage), dtype, device_of(spec.storage))
            rebuilt.append(base.array(spec) if spec.kind == ARRAY else _finish(base.strided(spec), spec))
    return rebuilt


def _finish(view: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    if not spec.is_inference:
        return _as_published(view, spec)
    with torch.inference_mode():
        place = view.untyped_storage(), spec.offset, spec.shape, spec.stride
        return _as_published(torch.empty(0, dtype=spec.dtype, device=view.device).set_(*place), spec)


def _as_published(view: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    if spec.is_conj:
        view = view.conj()
    if spec.is_neg:
        view = torch._neg_view(view)
    # As a subclass of itself a view becomes a plain leaf: `_is_view()` is False, as it was for the original.
    return torch.Tensor._make_subclass(nn.Parameter if spec.kind == PARAMETER else torch.Tensor, view, spec.flag)


def stand_in(spec: TensorSpec) -> Any:
    """An object like the one that `spec` describes, over a single zero: it takes no memory."""
    if spec.kind == ARRAY:
        return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)
    with torch.inference_mode(False), torch.no_grad():
        zero = torch.zeros((), dtype=spec.dtype, device="cpu").expand(spec.shape)
        return torch.Tensor._make_subclass(nn.Parameter if spec.kind == PARAMETER else torch.Tensor, zero, spec.flag)
