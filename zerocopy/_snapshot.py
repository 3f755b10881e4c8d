"""Has a published pipeline changed since: identities, version counters, modes, in microseconds a tensor and without a walk.

Writes through `.data`, to inference tensors and to NumPy arrays do not count versions, and are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from zerocopy._mapping import Mapped, address_of
from zerocopy._paths import is_module
from zerocopy._shards import Manifest
from zerocopy._tensors import ARRAY, TensorTable


def _version(tensor: Any) -> int:
    return int(tensor._version) if _counts_versions(tensor) else 0


def _counts_versions(tensor: Any) -> bool:
    if isinstance(tensor, np.ndarray) or nn.parameter.is_lazy(tensor):
        return False
    return not (tensor.is_inference() or tensor.is_nested)


def _place(tensor: Any) -> tuple[object, ...]:
    """Where a tensor or an array lies, and how; empty for one that has no memory of its own."""
    if isinstance(tensor, np.ndarray):
        return tensor.__array_interface__["data"][0], tensor.shape, tensor.strides
    if not _has_storage(tensor):
        return ()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _has_storage(tensor: Any) -> bool:
    if isinstance(tensor, np.ndarray) or nn.parameter.is_lazy(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_nested and type(tensor) in (torch.Tensor, nn.Parameter)


def _storage_reference(tensor: Any) -> StorageWeakRef | None:
    """Keeps the identity of a storage from being used again, but not its memory."""
    return StorageWeakRef(tensor.untyped_storage()) if _has_storage(tensor) else None


# The dicts of an `nn.Module` that it manages itself: members and hooks.
_MEMBERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


def _slots(module: nn.Module) -> list[object]:
    """What a module holds by name: identities of its parameters, buffers, children, hooks and of plain tensor attributes."""
    own = vars(module)
    slots: list[object] = [module.training]
    for members in map(own.get, _MEMBERS):
        if members:
            slots.extend(members)
            slots.extend(map(id, members.values()))
    slots.extend(id(value) for value in own.values() if isinstance(value, torch.Tensor))
    return slots


class TensorMarks:
    """Identity, version and memory of tensors at one moment. Refers to them weakly: it keeps no weights alive."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        self._marks = [(weakref.ref(t), _version(t), _place(t), _storage_reference(t)) for t in tensors]

    def are_same(self) -> bool:
        """Whether every tensor is there still and has the bytes it had, as far as version counters tell."""
        for ref, version, place, storage in self._marks:
            tensor = ref()
            if tensor is None or _version(tensor) != version or _place(tensor) != place:
                return False
            if storage is not None and tensor.untyped_storage()._cdata != storage.cdata:
                return False
        return True


class LoadedMarks:
    """Tensors as a load made them, by index: told from their descriptions, so that a load has nothing to look up."""

    def __init__(self, tensors: Mapping[int, Any], mapped: Mapping[int, Mapped]) -> None:
        self._tensors = {index: weakref.ref(tensor) for index, tensor in tensors.items()}
        self._mapped = {shard: (weakref.ref(memory), offsets) for shard, (memory, offsets) in mapped.items()}

    def memories(self) -> list[Any]:
        """The mapped memory that is still in use."""
        return [memory for ref, _ in self._mapped.values() if (memory := ref()) is not None]

    def index(self) -> dict[int, int]:
        """Indices of the tensors that are alive, by id."""
        return {id(tensor): index for index, ref in self._tensors.items() if (tensor := ref()) is not None}

    def are_same(self, manifest: Manifest) -> bool:
        """Whether every tensor is there still, where it was made, and was not written to, as far as versions tell.

        False for tensors that were made on another device.
        """
        addresses = {
            shard: address_of(memory) for shard, (ref, _) in self._mapped.items() if (memory := ref()) is not None
        }
        for index, ref in self._tensors.items():
            tensor = ref()
            spec = manifest.specs[index]
            shard, buffer, offset, nbytes = manifest.locations[spec.storage]
            if tensor is None or _version(tensor):
                return False
            if nbytes == 0:
                continue
            if shard not in addresses:
                return False
            step = 1 if spec.kind == ARRAY else spec.dtype.itemsize
            start = addresses[shard] + self._mapped[shard][1][buffer] + offset + spec.offset * step
            dtype = () if spec.kind == ARRAY else (spec.dtype,)
            if _place(tensor) != (start, spec.shape, spec.stride, *dtype):
                return False
        return True


def _has_slots(obj: object) -> bool:
    return is_module(obj) and not isinstance(obj, torch.jit.ScriptModule)


class Snapshot:
    """The state of shared tensors and of the modules that hold them."""

    def __init__(self, table: TensorTable, wholes: Iterable[Any], objects: Iterable[Any]) -> None:
        self.weights = TensorMarks([*table.objects, *wholes])
        self._requires_grad = [(weakref.ref(t), t.requires_grad) for t in table.objects if isinstance(t, torch.Tensor)]
        self._modules = [(weakref.ref(obj), _slots(obj)) for obj in objects if _has_slots(obj)]

    def has_same_structure(self) -> bool:
        """Whether modules hold the same things under the same names, in the same modes, with the same hooks."""
        for ref, requires_grad in self._requires_grad:
            tensor = ref()
            if tensor is None or tensor.requires_grad != requires_grad:
                return False
        for module_ref, slots in self._modules:
            module = module_ref()
            if module is None or _slots(module) != slots:
                return False
        return True
