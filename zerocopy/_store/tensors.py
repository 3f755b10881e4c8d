"""How is a tensor or an array described as a view of its storage, and rebuilt over memory with the same bytes?"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import nn

from zerocopy._compat.torch import leaf_of_class, negated_view
from zerocopy._store.storages import COPIED, Region, Storage, address_of, storage_of

TENSOR, PARAMETER, ARRAY = range(3)


class TensorSpec(NamedTuple):
    """One tensor or array over one storage.

    `stride` and `offset` count elements for tensors and bytes for arrays. `flag` is `requires_grad` for a tensor and
    `writeable` for an array. `is_whole` is True for a plain contiguous tensor over all bytes of its storage.
    """

    kind: int
    storage: int
    dtype: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    flag: bool
    is_whole: bool = False
    is_conj: bool = False
    is_neg: bool = False
    is_inference: bool = False

    @classmethod
    def of_row(cls, row: tuple[Any, ...]) -> TensorSpec:
        """Return the description that a row of `rows_of` contains."""
        if len(row) == WHOLE:
            kind, storage, dtype, shape, flag = row
            return cls(kind, storage, dtype, shape, _default_stride(shape), 0, flag, is_whole=True)
        return cls._make(row)

    def over(self, storage: int) -> TensorSpec:
        """Return the same description for another storage."""
        return TensorSpec(self.kind, storage, *self[2:])


WHOLE = 5  # columns of the row of a tensor that covers its storage


def rows_of(specs: Iterable[TensorSpec]) -> tuple[tuple[Any, ...], ...]:
    """Convert descriptions to plain tuples, shorter ones for tensors that cover their storage. Equal shapes become one object.

    Thousands of named tuples would take longer to unpickle than the skeleton.
    """
    known: dict[Any, Any] = {}
    once = known.setdefault
    rows: list[tuple[Any, ...]] = []
    for kind, storage, dtype, shape, stride, offset, flag, is_whole, *special in specs:
        if is_whole:
            rows.append((kind, storage, dtype, once(shape, shape), flag))
        else:
            place = once(shape, shape), once(stride, stride), offset
            rows.append((kind, storage, dtype, *place, flag, is_whole, *special))
    return tuple(rows)


def is_tensor_or_array(obj: object) -> TypeGuard[torch.Tensor | np.ndarray[Any, Any]]:
    return isinstance(obj, (torch.Tensor, np.ndarray))


def is_plain(obj: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether `obj` can be described directly as a view of a storage. Other objects must be taken apart first."""
    if isinstance(obj, np.ndarray):
        return type(obj) is np.ndarray and not obj.dtype.hasobject
    if type(obj) not in (torch.Tensor, nn.Parameter) or obj.is_nested:
        return False
    return obj.layout is torch.strided and not obj.is_quantized


def is_meta(obj: object) -> bool:
    return isinstance(obj, torch.Tensor) and obj.is_meta


def spec_of(obj: torch.Tensor | np.ndarray[Any, Any], storage: int, source: Storage) -> TensorSpec:
    """Return the description of `obj` as a view of `source`, the storage with the index `storage`."""
    if isinstance(obj, np.ndarray):
        start = address_of(source.to_bytes()) if source.nbytes else address_of(obj)
        return TensorSpec(
            ARRAY, storage, obj.dtype, obj.shape, obj.strides, address_of(obj) - start, bool(obj.flags.writeable)
        )
    is_special = obj.is_conj(), obj.is_neg(), obj.is_inference()
    kind = PARAMETER if isinstance(obj, nn.Parameter) else TENSOR
    shape, stride = tuple(obj.shape), obj.stride()
    # A tensor that covers its storage has the offset 0.
    covers = (
        0 < obj.nbytes == source.nbytes and obj.is_contiguous() and (1 not in shape or stride == _default_stride(shape))
    )
    if covers and not any(is_special):
        return TensorSpec(kind, storage, obj.dtype, shape, stride, 0, obj.requires_grad, is_whole=True)
    offset = int(obj.storage_offset())
    return TensorSpec(kind, storage, obj.dtype, shape, stride, offset, obj.requires_grad, False, *is_special)


def _default_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the stride of a new contiguous tensor. (Contiguous ones may have any stride in a dimension of size 1.)"""
    steps = itertools.accumulate((max(size, 1) for size in reversed(shape[1:])), operator.mul, initial=1)
    return tuple(steps)[::-1] if shape else ()


class TensorTable:
    """The tensors of one skeleton in order of appearance, and their storages.

    A table with a `base` uses the indices of `base` for the storages in it. The indices of its own storages follow after them.
    """

    def __init__(self, base: StorageIndex | None = None, base_count: int = 0) -> None:
        self.specs: list[TensorSpec] = []
        self.objects: list[Any] = []
        self.storages: list[Storage] = []
        self.index: dict[int, int] = {}
        self.storage_index: StorageIndex = dict(base or {})
        self._base_count = base_count

    def add(self, obj: Any) -> int:
        """Return the index of `obj`, which must be shareable. Adds `obj` if it is new."""
        known = self.index.get(id(obj))
        if known is not None:
            return known
        source = storage_of(obj)
        position = self.storage_index.get(source.key)
        if position is None:
            position = self.storage_index[source.key] = self._base_count + len(self.storages)
            self.storages.append(source)
        self.specs.append(spec_of(obj, position, source))
        self.objects.append(obj)
        self.index[id(obj)] = len(self.objects) - 1
        return self.index[id(obj)]

    def items(self) -> Iterator[tuple[Any, TensorSpec]]:
        """Each tensor with its description."""
        return zip(self.objects, self.specs, strict=True)

    def key_of(self, spec: TensorSpec) -> object:
        """Return the key of the storage of a tensor of this table."""
        return self.storages[spec.storage].key

    @property
    def nbytes(self) -> int:
        """Bytes of all storages."""
        return sum(storage.nbytes for storage in self.storages)

    def sizes(self) -> dict[object, int]:
        """Bytes of each storage, by key."""
        return {storage.key: storage.nbytes for storage in self.storages}


StorageIndex: TypeAlias = dict[object, int]


def rebuild(
    rows: Iterable[tuple[Any, ...]], regions: Mapping[int, Region], uploaded: Mapping[int, Region]
) -> list[Any]:
    """Return the tensors and arrays that `rows` describe, as views of the regions of their storages.

    Args:
        rows: each is a `TensorSpec`, or a row of `rows_of`.
        regions: regions in main memory, by index of the storage.
        uploaded: regions on devices, for tensors that do not stay in main memory. Arrays always stay there.
    """
    rows = list(rows)
    first: dict[int, torch.Tensor] = {}  # for each storage a tensor that covers it
    mapped = {row[1] for row in rows if row[0] == ARRAY}  # not cloned: an array could not use the clone
    rebuilt: list[Any] = []
    # Loaded tensors do not depend on the mode of the caller: only a tensor that was an inference tensor becomes one.
    with torch.inference_mode(False), torch.no_grad():
        for row in rows:
            if len(row) == WHOLE and row[1] not in first and row[1] not in uploaded:  # most tensors: the fast path
                kind, storage, dtype, shape, flag = row
                memory, start, nbytes = regions[storage]
                twin = NUMPY_TWINS.get(dtype)
                if twin is not None:
                    tensor = from_numpy(ndarray(shape, twin, memory, start))
                else:
                    flat = frombuffer(memory, dtype=dtype, count=nbytes // dtype.itemsize, offset=start)
                    tensor = flat.resize_(shape)
                if nbytes <= COPIED and storage not in mapped:
                    tensor = tensor.clone()
                if kind == PARAMETER:
                    tensor.__class__ = nn.Parameter  # as torch does with lazy parameters, without a second tensor
                if flag:
                    tensor.requires_grad = True
                first[storage] = tensor
                rebuilt.append(tensor)
                continue
            spec = TensorSpec.of_row(row)
            if spec.kind == ARRAY:
                rebuilt.append(_array(spec, regions[spec.storage]))
                continue
            base = first.get(spec.storage)
            if base is None:
                base = base_over(uploaded.get(spec.storage) or regions[spec.storage], spec.dtype)
                if base.nbytes <= COPIED and spec.storage not in mapped:
                    base = base.clone()
                first[spec.storage] = base
            rebuilt.append(_finish(strided(base, spec), spec))
    return rebuilt


# Looked up once, because they are called for each tensor of a model.
ndarray, from_numpy, frombuffer = np.ndarray, torch.from_numpy, torch.frombuffer
CLASSES: dict[int, Any] = {TENSOR: torch.Tensor, PARAMETER: nn.Parameter}
NUMPY_TWINS = {
    dtype: np.dtype(str(dtype).removeprefix("torch."))
    for dtype in (
        torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
        torch.complex64, torch.complex128, torch.bool,
    )
}  # fmt: skip


def _array(spec: TensorSpec, region: Region) -> np.ndarray[Any, Any]:
    memory, start, nbytes = region
    content = memory.numpy() if isinstance(memory, torch.Tensor) else np.frombuffer(memory, np.uint8, nbytes, start)
    array: np.ndarray[Any, Any] = np.ndarray(spec.shape, spec.dtype, content, spec.offset, spec.stride)
    array.flags.writeable = spec.flag
    return array


def base_over(region: Region, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that covers a region."""
    memory, start, nbytes = region
    if nbytes % dtype.itemsize:  # not a whole number of elements: only a tensor of bytes covers the storage
        dtype = torch.uint8
    if isinstance(memory, torch.Tensor):
        place = memory.untyped_storage(), 0, (nbytes // dtype.itemsize,), (1,)
        return torch.empty(0, dtype=dtype, device=memory.device).set_(*place)
    if nbytes == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(memory, dtype=dtype, count=nbytes // dtype.itemsize, offset=start)


def strided(base: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the view that `spec` describes, created from a tensor that covers its storage. Class and flag are not set."""
    if spec.dtype is base.dtype:
        return base.as_strided(spec.shape, spec.stride, spec.offset)
    empty = torch.empty(0, dtype=spec.dtype, device=base.device)
    return empty.set_(base.untyped_storage(), spec.offset, spec.shape, spec.stride)


def _finish(view: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return the tensor that `spec` describes, given its view."""
    if not spec.is_inference:
        return _as_published(view, spec)
    with torch.inference_mode():
        place = view.untyped_storage(), spec.offset, spec.shape, spec.stride
        return _as_published(torch.empty(0, dtype=spec.dtype, device=view.device).set_(*place), spec)


def _as_published(view: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    if spec.is_conj:
        view = view.conj()
    if spec.is_neg:
        view = negated_view(view)
    return leaf(view, CLASSES[spec.kind], spec.flag)


def leaf(view: torch.Tensor, cls: type[torch.Tensor], requires_grad: bool) -> torch.Tensor:
    """Return a tensor of class `cls` over the memory of `view`. For torch, it is a leaf and not a view."""
    made: torch.Tensor = leaf_of_class(cls, view, requires_grad)
    return made


def like(original: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the memory of `view` with the class, `requires_grad` and Python attributes of `original`."""
    made = leaf(view, type(original), original.requires_grad)
    vars(made).update(vars(original))
    return made


def repeated(number: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a tensor with `number` in every element, over memory for one element."""
    zero = torch.zeros((), dtype=dtype, device=device)
    return (zero.fill_(number) if number else zero).expand(shape)  # some dtypes cannot be filled


def stand_in(spec: TensorSpec) -> Any:
    """Return an object like the one that `spec` describes, over memory for one element."""
    if spec.kind == ARRAY:
        return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)
    with torch.inference_mode(False), torch.no_grad():
        return leaf(repeated(0, spec.shape, spec.dtype), CLASSES[spec.kind], spec.flag)
