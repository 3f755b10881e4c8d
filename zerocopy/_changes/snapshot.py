"""Has a pipeline changed since it was published or loaded: identities, version counters and modes, without a walk.

It takes microseconds per tensor. Writes through `.data`, to inference tensors and to NumPy arrays move no version counter, and
are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from zerocopy._changes.members import Members, has_members
from zerocopy._compat.torch import hold_storage_ids, release_storage_id, storage_id, version_of
from zerocopy._split.paths import modules_among
from zerocopy._store.manifest import Location, Manifest
from zerocopy._store.mapping import Mapped, start_of
from zerocopy._store.tensors import ARRAY, TensorSpec, TensorTable


class Snapshot:
    """The state of shared tensors and of the modules that hold them. Keeps none of them alive."""

    def __init__(self, table: TensorTable, composites: Iterable[Any], objects: Iterable[Any]) -> None:
        self.tensors = TensorMarks(table, composites)
        tensors = [tensor for tensor in table.objects if isinstance(tensor, torch.Tensor)]
        self._tensors = list(map(weakref.ref, tensors))
        self._requires_grad = [tensor.requires_grad for tensor in tensors]
        modules = list(filter(has_members, modules_among(objects)))
        self._modules = list(map(_weakly, modules))
        self._members = Members(modules)

    def is_unchanged(self) -> bool:
        """Whether the tensors are unchanged, and modules hold the same things by the same names, in the same modes."""
        if not self.tensors.is_unchanged():
            return False
        tensors = [tensor for ref in self._tensors if (tensor := ref()) is not None]
        modules = [module for ref in self._modules if (module := ref()) is not None]
        if len(tensors) < len(self._tensors) or len(modules) < len(self._modules):
            return False
        if [tensor.requires_grad for tensor in tensors] != self._requires_grad:
            return False
        return self._members.is_unchanged(modules)


def _weakly(module: nn.Module) -> Callable[[], nn.Module | None]:
    """A weak reference; a strong one to a module that is a tuple, a number or the like, too, where Python has no weak ones."""
    return weakref.ref(module) if type(module).__weakrefoffset__ else lambda: module


class TensorMarks:
    """Identity, version and memory of tensors at one moment. Keeps none of them alive."""

    def __init__(self, table: TensorTable, composites: Iterable[Any]) -> None:
        """`composites`: tensors that `table` has in parts only."""
        plain: list[Any] = []
        others = list(composites)
        for obj, spec in zip(table.objects, table.specs, strict=True):
            (others if spec.kind == ARRAY or spec.is_inference else plain).append(obj)
        self._plain = list(map(weakref.ref, plain))
        self._state = _state_of(plain)
        self._others = list(map(weakref.ref, others))
        self._states_of_others = list(map(_state_of_any, others))
        self._storages = _StorageIdentities([*plain, *filter(_has_storage, others)])

    def is_unchanged(self) -> bool:
        """Whether every tensor is alive and has the bytes it had, as far as version counters tell."""
        tensors, others = [ref() for ref in self._plain], [ref() for ref in self._others]
        if any(tensor is None for tensor in tensors) or any(other is None for other in others):
            return False
        return _state_of(tensors) == self._state and list(map(_state_of_any, others)) == self._states_of_others


class LoadedMarks:
    """Tensors as a load made them, by index. Their descriptions tell where they were made, so a load looks nothing up."""

    def __init__(self, tensors: Mapping[int, Any], mapped: Mapping[int, Mapped]) -> None:
        self._indices = list(tensors)
        self._tensors = list(map(weakref.ref, tensors.values()))
        self._mapped = {shard: (weakref.ref(memory), offsets) for shard, (memory, offsets) in mapped.items()}

    def memories(self) -> list[Any]:
        """The mapped memory that is still in use."""
        return [memory for ref, _ in self._mapped.values() if (memory := ref()) is not None]

    def index(self) -> dict[int, int]:
        """Indices of the tensors that are alive, by id."""
        found = zip(self._indices, self._tensors, strict=True)
        return {id(tensor): index for index, ref in found if (tensor := ref()) is not None}

    def is_unchanged(self, manifest: Manifest) -> bool:
        """Whether every tensor is alive, where it was made, and not written to, as far as version counters tell.

        False for tensors that were made on another device.
        """
        starts = {shard: start_of(memory) for shard, (ref, _) in self._mapped.items() if (memory := ref()) is not None}
        for index, ref in zip(self._indices, self._tensors, strict=True):
            tensor = ref()
            if tensor is None or _version_of(tensor):
                return False
            spec = manifest.specs[index]
            location = manifest.locations[spec.storage]
            if location.nbytes == 0:
                continue
            if location.shard not in starts:
                return False
            if _place_of(tensor) != self._place_made(spec, location, starts[location.shard]):
                return False
        return True

    def _place_made(self, spec: TensorSpec, location: Location, start: int) -> tuple[object, ...]:
        """As `_place_of`: where the load made a tensor, in the memory from `start` on."""
        _, offsets = self._mapped[location.shard]
        address = start + offsets[location.buffer] + location.offset
        if spec.kind == ARRAY:
            return address + spec.offset, spec.shape, spec.stride
        return address + spec.offset * spec.dtype.itemsize, spec.shape, spec.stride, spec.dtype


class _StorageIdentities:
    """Keeps the identities of some tensors' storages from being used again, but not their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._held = hold_storage_ids(tensors)
        self._release: Any = release_storage_id  # this module may be gone when it is needed

    def __del__(self) -> None:
        for held in self._held:
            self._release(held)


def _state_of(tensors: list[Any]) -> tuple[list[Any], ...]:
    """Versions, storages and places of plain tensors, a list of each: this is asked at every pass."""
    return (
        list(map(version_of, tensors)),
        list(map(storage_id, tensors)),
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        list(map(torch.Tensor.numel, tensors)),
    )


def _state_of_any(tensor: Any) -> tuple[object, ...]:
    """The same of one tensor of any kind, or of an array."""
    return _version_of(tensor), storage_id(tensor) if _has_storage(tensor) else None, _place_of(tensor)


def _version_of(tensor: Any) -> int:
    """The version counter; 0 where there is none."""
    if isinstance(tensor, np.ndarray) or nn.parameter.is_lazy(tensor) or tensor.is_inference() or tensor.is_nested:
        return 0
    return int(version_of(tensor))


def _place_of(tensor: Any) -> tuple[object, ...]:
    """Where in memory a tensor or an array lies, and how; empty for one that has no memory of its own."""
    if isinstance(tensor, np.ndarray):
        return tensor.__array_interface__["data"][0], tensor.shape, tensor.strides
    if not _has_storage(tensor):
        return ()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _has_storage(tensor: Any) -> bool:
    if isinstance(tensor, np.ndarray) or nn.parameter.is_lazy(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_nested and type(tensor) in (torch.Tensor, nn.Parameter)
