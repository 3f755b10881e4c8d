"""Which versions, storages and places in memory do tensors have?"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from zerocopy._compat.torch import as_plain_tensors, hold_storage_ids, release_storage_id, storage_id, version_of
from zerocopy._store.tensors import is_plain

_dtype_of, _needs_grad = operator.attrgetter("dtype"), operator.attrgetter("requires_grad")


class TensorStates:
    """Identities, versions and places of tensors and arrays at one moment. Keeps none of them alive."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._are_plain = [is_plain(tensor) and not _is_special(tensor) for tensor in tensors]
        self._ids = list(map(id, tensors))
        plain, others = self._divided(tensors)
        self._state = _state_of(plain)
        self._states_of_others = list(map(_state_of_any, others))
        self._arrays = [weakref.ref(other) for other in others if isinstance(other, np.ndarray)]
        self._storages = _StorageIdentities([*plain, *itertools.chain(*map(_parts_of, others))])

    def are_unchanged(self, tensors: Sequence[Any]) -> bool:
        """Whether these are the same tensors in the same order, and no code has written to them through torch."""
        return list(map(id, tensors)) == self._ids and self.are_like(tensors)

    def are_like(self, tensors: Sequence[Any]) -> bool:
        """Like `are_unchanged`, but the Python objects may be different: torch creates new ones for the tensors of programs."""
        if len(tensors) != len(self._ids) or any(array() is None for array in self._arrays):
            return False
        plain, others = self._divided(tensors)
        try:
            return _state_of(plain) == self._state and list(map(_state_of_any, others)) == self._states_of_others
        except RuntimeError:  # a tensor of another kind has the same id now
            return False

    def unchanged(self, tensors: Iterable[Any]) -> set[int]:
        """Ids of the plain tensors in `tensors` that were recorded, and that no code has written to through torch."""
        ids = itertools.compress(self._ids, self._are_plain)
        states = dict(zip(ids, zip(*self._state[:_BYTES], strict=True), strict=True))
        known = [tensor for tensor in tensors if id(tensor) in states and is_plain(tensor) and not _is_special(tensor)]
        found = zip(*_state_of(known)[:_BYTES], strict=True)
        return {id(tensor) for tensor, state in zip(known, found, strict=True) if state == states[id(tensor)]}

    def _divided(self, tensors: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The plain tensors, and all others."""
        plain = list(itertools.compress(tensors, self._are_plain))
        if len(plain) == len(tensors):
            return plain, []
        return plain, list(itertools.compress(tensors, map(operator.not_, self._are_plain)))


class _StorageIdentities:
    """Prevents the ids of some tensors' storages from being used again. Does not keep their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._held = hold_storage_ids(tensors)
        self._release: Any = release_storage_id  # `__del__` may run when the globals of this module are gone

    def __del__(self) -> None:
        for held in self._held:
            self._release(held)


_BYTES = 6  # the first columns of a state, which show changes of bytes


def _state_of(tensors: Sequence[Any]) -> tuple[list[Any], ...]:
    """Versions, storages, places and kinds of plain tensors, as one list of each. Runs each time a pipeline is passed."""
    return (
        list(map(version_of, tensors)),
        list(map(storage_id, tensors)),
        list(map(torch.Tensor.data_ptr, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        list(map(torch.Tensor.size, tensors)),
        list(map(_dtype_of, tensors)),
        list(map(_needs_grad, tensors)),
        list(map(type, tensors)),
    )


def _state_of_any(tensor: Any) -> tuple[object, ...]:
    """The state of one tensor of any kind, or of an array."""
    if isinstance(tensor, np.ndarray):
        place = tensor.__array_interface__["data"][0], tensor.shape, tensor.strides
        return type(tensor), tensor.dtype, tensor.flags.writeable, place
    with as_plain_tensors():
        return type(tensor), tensor.requires_grad, _version_of(tensor), tuple(map(_place_of, _parts_of(tensor)))


def _version_of(tensor: torch.Tensor) -> int:
    """The version counter; 0 if the tensor has none."""
    if nn.parameter.is_lazy(tensor) or tensor.is_inference() or tensor.is_nested:
        return 0
    return int(version_of(tensor))


def _place_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where a tensor is in memory, with its shape, stride and dtype."""
    return storage_id(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _parts_of(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors with a storage in a tensor: usually the tensor itself, or those that a wrapper subclass holds, or none."""
    if (
        isinstance(tensor, np.ndarray)
        or nn.parameter.is_lazy(tensor)
        or tensor.layout is not torch.strided
        or tensor.is_nested
    ):
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts_of(getattr(tensor, name))
    elif type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        yield tensor


def has_storage(tensor: Any) -> bool:
    """Whether an object is a plain strided tensor, which is a view of a storage."""
    if isinstance(tensor, np.ndarray) or nn.parameter.is_lazy(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_nested and type(tensor) in (torch.Tensor, nn.Parameter)


def _is_special(tensor: Any) -> bool:
    """Whether an object has no version counter: an inference tensor or an array."""
    return isinstance(tensor, np.ndarray) or tensor.is_inference()
