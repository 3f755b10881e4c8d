"""How do tests compare objects across processes? As plain data with everything that can be observed of an object."""

from __future__ import annotations

import functools
import hashlib
import types
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from zerocopy._split.paths import attributes_of

ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, np.dtype)


def observe(root: Any) -> Any:
    """Types, structure, identity, flags, strides and bytes of `root` and all objects inside it, in nested tuples.

    The first visit of an object or a storage gives it a number, and later visits return only this number.
    """
    return _Observer().observe(root)


class _Observer:
    def __init__(self) -> None:
        self.numbers: dict[object, int] = {}
        self.kept: list[Any] = []

    def number(self, key: object, obj: Any) -> tuple[int, bool]:
        known = key in self.numbers
        if not known:
            self.numbers[key] = len(self.numbers)
            self.kept.append(obj)
        return self.numbers[key], known

    def observe(self, obj: Any) -> Any:
        if isinstance(obj, ATOMS) and not isinstance(obj, nn.Module):
            return type(obj).__name__, repr(obj)
        if isinstance(obj, type):
            return "class", obj.__name__
        number, known = self.number(id(obj), obj)
        if known:
            return "again", number
        return number, type(obj).__name__, self.content(obj)

    def content(self, obj: Any) -> Any:  # noqa: C901 (a case for each kind of thing)
        if isinstance(obj, torch.Tensor):
            # A nested tensor's attributes are caches and symbols, which each process numbers separately.
            return self.tensor(obj), self.members({} if obj.is_nested else getattr(obj, "__dict__", {}))
        if isinstance(obj, np.ndarray):
            bits = obj.tolist() if obj.dtype.hasobject else digest(np.ascontiguousarray(obj).tobytes())
            return str(obj.dtype.descr), obj.shape, obj.strides, obj.flags.writeable, obj.flags.f_contiguous, bits
        if isinstance(obj, nn.Module):
            return self.items(obj), self.members(vars(obj)), self.members(attributes_of(obj))
        if isinstance(obj, Mapping):
            return [(self.observe(key), self.observe(value)) for key, value in obj.items()]
        if isinstance(obj, (list, tuple)):
            return [self.observe(item) for item in obj], self.members(attributes_of(obj))
        if isinstance(obj, (set, frozenset)):
            return sorted((self.observe(item) for item in obj), key=repr) if len(obj) < 2 else len(obj)
        if isinstance(obj, functools.partial):
            return self.observe(obj.func), self.observe(obj.args), self.observe(obj.keywords)
        if isinstance(obj, types.MethodType):
            return obj.__name__, self.observe(obj.__self__)
        if isinstance(obj, types.FunctionType):
            cells = [cell.cell_contents for cell in obj.__closure__ or ()]
            return obj.__name__, digest(obj.__code__.co_code), self.observe(cells)
        if isinstance(obj, weakref.ref):
            return self.observe(obj())
        if type(obj).__name__ == "_WrappedHook":  # torch pickles only its hook
            return self.observe(obj.hook)
        return self.members(attributes_of(obj))

    def items(self, module: Any) -> Any:
        """The items of a module that is also a container or a value."""
        if isinstance(module, Mapping):
            return [(self.observe(key), self.observe(value)) for key, value in module.items()]
        if isinstance(module, (str, int)):
            return str.__str__(module) if isinstance(module, str) else int.__int__(module)
        if isinstance(module, BaseException):
            return self.observe(module.args)
        return [self.observe(item) for item in module] if isinstance(module, (list, tuple, set, deque)) else None

    def members(self, members: Mapping[str, Any]) -> Any:
        return [(name, self.observe(value)) for name, value in members.items()]

    def tensor(self, tensor: torch.Tensor) -> Any:
        if nn.parameter.is_lazy(tensor):
            return "lazy", str(tensor.dtype), tensor.requires_grad
        flags = tensor.dtype, tensor.requires_grad, tensor.is_inference(), tensor.layout, tensor.device.type
        flags = tuple(map(str, flags))
        if tensor.layout is torch._mkldnn:
            return flags, digest(tensor.to_dense().numpy().tobytes())
        if tensor.is_nested:
            return flags, [self.observe(part.detach().clone().contiguous()) for part in tensor.unbind()]
        if tensor.layout is torch.sparse_coo:
            return flags, tensor.is_coalesced(), self.observe(tensor._indices()), self.observe(tensor._values())
        if tensor.layout is not torch.strided:
            return flags, digest(tensor.to_dense().contiguous().cpu().numpy().tobytes())
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return flags, tuple(tensor.shape)
        storage = tensor.untyped_storage()
        place, known = self.number(("storage", storage._cdata), storage)
        bits = None if known else digest(torch.empty(0, dtype=torch.uint8).set_(storage.cpu()).numpy().tobytes())
        extra = str(tensor.qscheme()) if tensor.is_quantized else (tensor.is_conj(), tensor.is_neg())
        return (
            flags,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.storage_offset(),
            extra,
            (place, storage.nbytes(), bits),
        )


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def difference(first: Any, second: Any, path: str = "") -> str:
    """A text that says where two observations differ; empty if they are equal."""
    if first == second:
        return ""
    if type(first) is not type(second) or not isinstance(first, (list, tuple)):
        return f"{path}: {first!r} != {second!r}"
    if len(first) != len(second):
        return f"{path}: {len(first)} != {len(second)} items: {first!r} {second!r}"
    found = (difference(a, b, f"{path}.{index}") for index, (a, b) in enumerate(zip(first, second, strict=True)))
    return next(filter(None, found), "")
