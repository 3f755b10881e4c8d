"""Has a published pipeline changed since: identities, version counters, modes, in microseconds a tensor and without a walk.

Writes through `.data`, to inference tensors and to NumPy arrays do not count versions, and are not seen.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from zerocopy._changes.slots import Slots, has_slots
from zerocopy._compat.torch import hold_storage_ids, release_storage_id, storage_id, version_of
from zerocopy._split.paths import modules_among
from zerocopy._store.manifest import Manifest
from zerocopy._store.mapping import Mapped, start_of
from zerocopy._store.tensors import ARRAY, TensorTable


def _version(tensor: Any) -> int:
    return int(version_of(tensor)) if _counts_versions(tensor) else 0


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


class _StorageIdentities:
    """Keeps the identities of some tensors' storages from being used again, but not their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._held = hold_storage_ids(tensors)
        self._release: Any = release_storage_id  # this module may be gone when it is needed

    def __del__(self) -> None:
        for held in self._held:
            self._release(held)


def _state(tensors: list[Any]) -> tuple[list[Any], ...]:
    """Versions, storages and places of plain tensors: whole lists at a time, for it is asked at every pass."""
    return (
        list(map(version_of, tensors)),
        list(map(storage_id, tensors)),
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        list(map(torch.Tensor.numel, tensors)),
    )


class TensorMarks:
    """Identity, version and memory of tensors at one moment. Refers to them weakly: it keeps no weights alive."""

    def __init__(self, table: TensorTable, wholes: Iterable[Any]) -> None:
        plain: list[Any] = []
        others = list(wholes)
        for obj, spec in zip(table.objects, table.specs, strict=True):
            (others if spec.kind == ARRAY or spec.is_inference else plain).append(obj)
        self._plain = list(map(weakref.ref, plain))
        self._state = _state(plain)
        self._others = list(map(weakref.ref, others))
        self._state_of_others = list(map(_describe, others))
        self._storages = _StorageIdentities([*plain, *filter(_has_storage, others)])

    def are_same(self) -> bool:
        """Whether every tensor is there still and has the bytes it had, as far as version counters tell."""
        tensors, others = [ref() for ref in self._plain], [ref() for ref in self._others]
        if any(tensor is None for tensor in itertools.chain(tensors, others)):
            return False
        return _state(tensors) == self._state and list(map(_describe, others)) == self._state_of_others


def _describe(tensor: Any) -> tuple[object, ...]:
    """As `_state`, what tells a change of any tensor or array."""
    storage = storage_id(tensor) if _has_storage(tensor) else None
    return _version(tensor), storage, _place(tensor)


class LoadedMarks:
    """Tensors as a load made them, by index: told from their descriptions, so that a load has nothing to look up."""

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

    def are_same(self, manifest: Manifest) -> bool:
        """Whether every tensor is there still, where it was made, and was not written to, as far as versions tell.

        False for tensors that were made on another device.
        """
        addresses = {
            shard: start_of(memory) for shard, (ref, _) in self._mapped.items() if (memory := ref()) is not None
        }
        for index, ref in zip(self._indices, self._tensors, strict=True):
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


class Snapshot:
    """The state of shared tensors and of the modules that hold them."""

    def __init__(self, table: TensorTable, wholes: Iterable[Any], objects: Iterable[Any]) -> None:
        self.weights = TensorMarks(table, wholes)
        tensors = [tensor for tensor in table.objects if isinstance(tensor, torch.Tensor)]
        self._tensors = list(map(weakref.ref, tensors))
        self._requires_grad = [tensor.requires_grad for tensor in tensors]
        modules = list(filter(has_slots, modules_among(objects)))
        self._modules = list(map(weakref.ref, modules))
        self._slots = Slots(modules)

    def has_same_structure(self) -> bool:
        """Whether modules hold the same things under the same names, in the same modes, with the same hooks."""
        tensors = [tensor for ref in self._tensors if (tensor := ref()) is not None]
        modules = [module for ref in self._modules if (module := ref()) is not None]
        if len(tensors) < len(self._tensors) or len(modules) < len(self._modules):
            return False
        if [tensor.requires_grad for tensor in tensors] != self._requires_grad:
            return False
        return self._slots.are_same(modules)
