"""How many steps have optimizers made on a storage?

The steps are counted, so that a change of weights is found without reading them. Fused optimizers do not increase version
counters, and a step may change only a few elements. But torch calls a hook after each step of every optimizer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from zerocopy._compat.torch import storage_id

# By id of the storage. Another storage may get the same id later, so only differences have a meaning.
_steps: dict[int, int] = {}


def count_steps(storage_ids: Iterable[int]) -> list[int]:
    """The number of optimizer steps on each of these storages, counted since the first call of this function."""
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
    """Ids of a parameter's storages. A subclass that wraps tensors has the storages of all of them; a sparse tensor has none."""
    with contextlib.suppress(RuntimeError):  # also NotImplementedError
        yield storage_id(parameter)
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _storage_ids_of(getattr(parameter, name))
