"""Has a published pipeline changed since: identities, version counters, modes, in microseconds a tensor and without a walk.

Writes through `.data`, to inference tensors and to NumPy arrays do not count versions, and are not seen.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from zerocopy._mapping import Mapped, start_of
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


# What every `nn.Module` keeps: taken out of many of them without a step of Python for each, for it is asked at every pass.
_MEMBERS = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name not in _MEMBERS)
_training_of, _members_of, _hooks_of = (operator.itemgetter(*names) for names in (("training",), _MEMBERS, _HOOKS))
_storage_id = torch._C._storage_id  # type: ignore[attr-defined]


def _tensor_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the plain attributes of a module that are tensors."""
    return tuple(name for name, value in vars(module).items() if isinstance(value, torch.Tensor))


def _slots(modules: Sequence[nn.Module], tensor_names: Iterable[Iterable[str]]) -> tuple[list[object], ...]:
    """What modules hold by name: identities of parameters, buffers, children, hooks, and of tensors in attributes."""
    flatten = itertools.chain.from_iterable
    owns = list(map(vars, modules))
    members = list(flatten(map(_members_of, owns)))
    hooks = list(flatten(map(_hooks_of, owns)))
    if any(hooks):
        members += hooks
    return (
        list(map(_training_of, owns)),
        list(map(len, owns)),
        list(map(len, members)),
        list(flatten(members)),
        list(map(id, flatten(map(dict.values, members)))),
        [id(own.get(name)) for own, names in zip(owns, tensor_names, strict=True) for name in names],
    )


def _state(tensors: list[Any]) -> tuple[list[Any], ...]:
    """Versions, storages and places of plain tensors: whole lists at a time."""
    return (
        [tensor._version for tensor in tensors],
        list(map(_storage_id, tensors)),
        [tensor.data_ptr() for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        [tensor.numel() for tensor in tensors],
    )


class TensorMarks:
    """Identity, version and memory of tensors at one moment. Refers to them weakly: it keeps no weights alive."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        found = list(tensors)
        plain = [tensor for tensor in found if _has_storage(tensor) and _counts_versions(tensor)]
        known = set(map(id, plain))
        self._plain = list(map(weakref.ref, plain))
        self._state = _state(plain)
        self._storages = list(map(_storage_reference, plain))
        self._others = [
            (weakref.ref(t), _version(t), _place(t), _storage_reference(t)) for t in found if id(t) not in known
        ]

    def are_same(self) -> bool:
        """Whether every tensor is there still and has the bytes it had, as far as version counters tell."""
        tensors = [ref() for ref in self._plain]
        if any(tensor is None for tensor in tensors) or _state(tensors) != self._state:
            return False
        return all(_is_same(ref(), version, place, storage) for ref, version, place, storage in self._others)


def _is_same(tensor: Any, version: int, place: object, storage: StorageWeakRef | None) -> bool:
    if tensor is None or _version(tensor) != version or _place(tensor) != place:
        return False
    return storage is None or tensor.untyped_storage()._cdata == storage.cdata


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
            shard: start_of(memory) for shard, (ref, _) in self._mapped.items() if (memory := ref()) is not None
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


_SLOTS = {"training", *_MEMBERS, *_HOOKS}


def _has_slots(obj: object) -> bool:
    """Whether `obj` is a module that keeps its own members: neither TorchScript nor a compiled module around another one."""
    return is_module(obj) and not isinstance(obj, torch.jit.ScriptModule) and vars(obj).keys() >= _SLOTS


class Snapshot:
    """The state of shared tensors and of the modules that hold them."""

    def __init__(self, table: TensorTable, wholes: Iterable[Any], objects: Iterable[Any]) -> None:
        self.weights = TensorMarks([*table.objects, *wholes])
        tensors = [tensor for tensor in table.objects if isinstance(tensor, torch.Tensor)]
        self._tensors = list(map(weakref.ref, tensors))
        self._requires_grad = [tensor.requires_grad for tensor in tensors]
        modules = [obj for obj in objects if _has_slots(obj)]
        self._tensor_names = list(map(_tensor_names, modules))
        self._modules = list(map(weakref.ref, modules))
        self._slots = _slots(modules, self._tensor_names)

    def has_same_structure(self) -> bool:
        """Whether modules hold the same things under the same names, in the same modes, with the same hooks."""
        tensors = [tensor for ref in self._tensors if (tensor := ref()) is not None]
        modules = [module for ref in self._modules if (module := ref()) is not None]
        if len(tensors) < len(self._tensors) or len(modules) < len(self._modules):
            return False
        if [tensor.requires_grad for tensor in tensors] != self._requires_grad:
            return False
        return _slots(modules, self._tensor_names) == self._slots
