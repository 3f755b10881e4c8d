"""Has a load that its process keeps changed, or does other code refer to it?

The kernel shows whether mapped memory was written. Places, members and modes show other changes. For memory on a device, version
counters and the steps of optimizers show changes. Reference counts show whether a module or a tensor has escaped: the code that
holds it may change it at any later time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from zerocopy._changes.contents import Contents
from zerocopy._changes.members import HeldMembers, has_members
from zerocopy._changes.tensor_states import TensorStates, has_storage
from zerocopy._compat.cpython import reference_counts
from zerocopy._compat.torch import storage_id, storage_use_count
from zerocopy._split import paths, programs
from zerocopy._store.mapping import PrivateMap
from zerocopy._store.tensors import TensorTable


class Kept:
    """The modules and tensors of one load, and their recorded state. Keeps them alive."""

    def __init__(self, roots: Sequence[Any], tensors: Iterable[torch.Tensor], memory: Iterable[Any] = ()) -> None:
        """Count the references now. At this time, only the load may refer to the objects, and no variable of the caller.

        Args:
            roots: the loaded objects: modules, with everything that they have registered, and tensors.
            tensors: the tensors of the load.
            memory: the mapped memory that the tensors are views of. If it is not private, writes to it cannot be detected, so the
                load always counts as changed.
        """
        self._is_isolated = all(isinstance(one, PrivateMap) for one in memory)
        self._modules = list(paths.registered_below(paths.modules_among(roots)).values())
        self._tensors = _each_once([*tensors, *_tensors_of(self._modules)])
        self._classes = list(map(type, self._modules))
        self._members = HeldMembers([vars(module) for module in self._modules if has_members(module)])
        self._without_members = [module for module in self._modules if not has_members(module)]
        self._references = self._count_references()
        self._recorded: tuple[TensorStates, Contents, list[bool], list[int]] | None = None

    def record(self) -> None:
        """Record the present state. Before this call, the load counts as changed."""
        self._members.record_modes()
        table = TensorTable()
        for tensor in filter(has_storage, self._tensors):
            table.add(tensor)
        states, contents, modes = TensorStates(self._tensors), Contents(table), self._modes_without_members()
        del table  # its Python objects for storages count as uses, and older releases of torch do not keep them
        self._recorded = states, contents, modes, self._count_uses()

    def is_unchanged(self, breath: float = 0.0) -> bool:
        """Whether everything is as recorded, and no other code refers to any part of it.

        Args:
            breath: seconds to sleep after each part, so that other threads can run. Without it, the interpreter would let them
                wait longer.
        """
        try:
            for part_is_unchanged in self._parts_unchanged():
                if not part_is_unchanged:
                    return False
                if breath:
                    time.sleep(breath)
        except Exception:  # comparing a member with its replacement may raise any error
            return False
        return True

    def _parts_unchanged(self) -> Iterator[bool]:
        if self._recorded is None or not self._is_isolated:
            yield False
            return
        states, contents, modes, uses = self._recorded
        yield states.are_unchanged(self._tensors) and self._modes_without_members() == modes
        yield all(tensor.grad is None for tensor in self._tensors) and list(map(type, self._modules)) == self._classes
        yield from self._members.parts_unchanged()
        yield self._count_references() == self._references and self._count_uses() == uses
        yield contents.are_unchanged()

    def _modes_without_members(self) -> list[bool]:
        return [getattr(module, "training", False) for module in self._without_members]  # a frozen program has no mode

    def _count_references(self) -> list[int]:
        return reference_counts((*self._modules, *self._tensors))

    def _count_uses(self) -> list[int]:
        """The use count of each storage. Views and detached twins of a tensor refer to its storage, not to the tensor."""
        return list(map(storage_use_count, map(storage_id, filter(has_storage, self._tensors))))


def _each_once(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def _tensors_of(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor | None]:
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            yield from programs.tensors_of(module)
        else:
            yield from module._parameters.values()
            yield from module._buffers.values()
