"""Has a published pipeline changed since: identities, version counters, modes, in microseconds a tensor and without a walk.

Writes through `.data`, to inference tensors and to NumPy arrays do not count versions, and are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from zerocopy._tensors import TensorTable


def reference(obj: Any) -> Callable[[], Any]:
    """A weak reference to `obj`, or a strong one where its type allows no other."""
    try:
        return weakref.ref(obj)
    except TypeError:
        return lambda: obj


def _version(tensor: Any) -> int:
    return int(tensor._version) if _counts_versions(tensor) else 0


def _counts_versions(tensor: Any) -> bool:
    if isinstance(tensor, np.ndarray) or nn.parameter.is_lazy(tensor):
        return False
    return not (tensor.is_inference() or tensor.is_nested)


def _address(tensor: Any) -> int:
    if isinstance(tensor, np.ndarray):
        return int(tensor.__array_interface__["data"][0])
    has_address = not nn.parameter.is_lazy(tensor) and tensor.layout is torch.strided and not tensor.is_nested
    return int(tensor.data_ptr()) if has_address else 0


def _slots(module: nn.Module) -> list[object]:
    """What a module holds by name: identities of its parameters, buffers, children and of plain tensor attributes."""
    own = vars(module)
    slots: list[object] = [module.training]
    for members in (own.get("_parameters", {}), own.get("_buffers", {}), own.get("_modules", {})):
        slots.extend(members)
        slots.extend(map(id, members.values()))
    slots.extend(id(value) for value in own.values() if isinstance(value, torch.Tensor))
    return slots


class TensorMarks:
    """Identity, version and memory of tensors at one moment. Refers to them weakly: it keeps no weights alive."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        self._marks = [(weakref.ref(tensor), _version(tensor), _address(tensor)) for tensor in tensors]

    def are_same(self) -> bool:
        """Whether every tensor is there still and has the bytes it had, as far as version counters tell."""
        for ref, version, address in self._marks:
            tensor = ref()
            if tensor is None or _version(tensor) != version or _address(tensor) != address:
                return False
        return True

    def index(self) -> dict[int, int]:
        """Positions of the tensors that are alive, by id."""
        return {
            id(tensor): position for position, (ref, _, _) in enumerate(self._marks) if (tensor := ref()) is not None
        }


class Snapshot:
    """The state of shared tensors, of the modules that hold them, and of dicts and lists of them."""

    def __init__(self, table: TensorTable, wholes: Iterable[Any], objects: Iterable[Any]) -> None:
        self.weights = TensorMarks([*table.objects, *wholes])
        self._requires_grad = [(weakref.ref(t), t.requires_grad) for t in table.objects if isinstance(t, torch.Tensor)]
        self._modules: list[tuple[weakref.ref[nn.Module], list[object]]] = []
        self._containers: list[tuple[Any, list[int]]] = []
        for obj in objects:
            if isinstance(obj, nn.Module):
                self._modules.append((weakref.ref(obj), _slots(obj)))
            elif type(obj) in (dict, list) and any(id(value) in table.index for value in _values(obj)):
                self._containers.append((obj, _members(obj)))

    def has_same_structure(self) -> bool:
        """Whether modules and containers hold the same things under the same names, in the same modes."""
        for ref, requires_grad in self._requires_grad:
            tensor = ref()
            if tensor is None or tensor.requires_grad != requires_grad:
                return False
        for module_ref, slots in self._modules:
            module = module_ref()
            if module is None or _slots(module) != slots:
                return False
        return all(_members(container) == members for container, members in self._containers)


def _values(container: Any) -> Iterable[Any]:
    return container.values() if type(container) is dict else container


def _members(container: Any) -> list[int]:
    return [id(value) for value in _values(container)]
