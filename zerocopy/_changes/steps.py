"""How often has an optimizer stepped over a storage?

Fused optimizers write without moving a version counter, and a step may change a few elements only. But torch calls a hook after
the steps of every optimizer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from zerocopy._compat.torch import storage_id

# By id of the storage. The id may be given to another one: only differences mean something.
_steps: dict[int, int] = {}


def count_steps(storage_ids: Iterable[int]) -> list[int]:
    """How often optimizers have stepped over each of these storages, from the first time on that this is asked."""
    _install()
    return [_steps.get(storage, 0) for storage in storage_ids]


@functools.cache
def _install() -> None:
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for storage in _storage_ids_of(parameter):
                _steps[storage] = _steps.get(storage, 0) + 1


def _storage_ids_of(parameter: Any) -> Iterator[int]:
    """Of a subclass that wraps other tensors those of all of them; none of a sparse one."""
    with contextlib.suppress(RuntimeError):  # also NotImplementedError
        yield storage_id(parameter)
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _storage_ids_of(getattr(parameter, name))
