"""How do the tensors of a published pipeline become views of the store, so that its process keeps no second copy of the weights?

Each tensor keeps its identity: its `.data` is set to a view of a private mapping of the bytes, which are already in the store. A
storage stays where it is if other code has a view of it, because that view cannot be moved.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zerocopy._compat.cpython import other_threads_may_compute
from zerocopy._compat.linux import give_back_heap
from zerocopy._compat.torch import base_of, id_of_storage, storage_use_count, tensor_use_count
from zerocopy._split.introspect import Introspection
from zerocopy._store.manifest import Placement
from zerocopy._store.mapping import Mapped, detach_all, map_private
from zerocopy._store.read import buffers_of
from zerocopy._store.storages import COPIED, Storage
from zerocopy._store.tensors import TensorSpec, base_over, spec_of, strided
from zerocopy.errors import OutOfMemoryError

GRACE_SECONDS = 10.0  # how long replaced memory is kept, for operators that run in other threads


def _keep_for_a_while(replaced: list[Any]) -> None:
    def release() -> None:
        replaced.clear()
        give_back_heap()

    timer = threading.Timer(GRACE_SECONDS, release)
    timer.daemon = True
    timer.start()


def _is_used_elsewhere(tensor: torch.Tensor, known: Sequence[torch.Tensor]) -> bool:
    """Whether C++ code refers to a tensor, for example an array that shares its memory through DLPack."""
    views = sum(base_of(other) is tensor for other in known)
    accumulates = 1 if tensor.requires_grad and tensor.is_leaf else 0  # the node that may accumulate its gradient
    return tensor_use_count(tensor) > 1 + views + accumulates


class Adoption:
    """The adoption of one pipeline's tensors, shard by shard. Until it is finished, it can be undone."""

    def __init__(self, found: Introspection) -> None:
        self._storages = found.table.storages
        self._known = found.table.objects
        self._views: dict[int, dict[int, tuple[Any, TensorSpec]]] = defaultdict(dict)
        for tensor, spec in zip(found.table.objects, found.table.specs, strict=True):
            self._views[spec.storage][id(tensor)] = tensor, spec
            base = base_of(tensor) if isinstance(tensor, torch.Tensor) else None
            if base is not None:  # only its views refer to the base tensor
                self._views[spec.storage].setdefault(
                    id(base), (base, spec_of(base, spec.storage, self._storages[spec.storage]))
                )
        self._movable = {i for i, storage in enumerate(self._storages) if self._is_movable(i, storage)}
        self._mapped: list[Mapped] = []

    def is_possible(self) -> bool:
        """Whether any memory can be released. Memory that was adopted before cannot."""
        return bool(self._movable)

    def _is_movable(self, index: int, storage: Storage) -> bool:
        """Whether only the known tensors are views of a storage: no other tensor, no NumPy array."""
        source = storage.source
        if not isinstance(source, torch.UntypedStorage) or source.device.type != "cpu" or source.nbytes() <= COPIED:
            return False
        tensors = [tensor for tensor, _ in self._views[index].values()]
        if not all(
            isinstance(t, torch.Tensor) and not (t.is_inference() or t.is_conj() or t.is_neg()) for t in tensors
        ):
            return False
        users = len(tensors) + 1  # and `source` itself
        if not source.resizable() or storage_use_count(id_of_storage(source)) != users:
            return False
        return not any(_is_used_elsewhere(tensor, tensors) for tensor in tensors)

    def take(self, placed: Mapping[int, Placement]) -> None:
        """Turn the tensors of storages into views of one shard, given the place of each storage.

        Raises:
            IsolationError: private mappings are not possible here.
        """
        movable = {index: place for index, place in placed.items() if index in self._movable}
        if not movable:
            return
        shard = next(iter(movable.values())).shard
        memory, offsets = mapped = map_private(buffers_of(shard), shard=shard, required=True)
        self._mapped.append(mapped)
        with torch.inference_mode(False), torch.no_grad():
            for index, place in movable.items():
                self._point(index, (memory, offsets[place.buffer] + place.offset, self._storages[index].nbytes))
        replaced = [self._storages[index].forget() for index in movable]
        if other_threads_may_compute():  # they may use memory that nothing else keeps
            _keep_for_a_while(replaced)
        del replaced
        give_back_heap()

    def _point(self, index: int, region: tuple[Any, int, int]) -> None:
        views = self._views[index].values()
        base = base_over(region, next(iter(views))[1].dtype)
        for tensor, spec in views:
            tensor.data = strided(base, spec)

    def memory(self) -> list[Any]:
        """The mapped memory that the adopted tensors are views of."""
        return [mapped.memory for mapped in self._mapped]

    def undo(self) -> None:
        """Give private memory back to the tensors adopted so far. If there is not enough, they stay views of the store."""
        with contextlib.suppress(OutOfMemoryError):
            detach_all(self.memory())
