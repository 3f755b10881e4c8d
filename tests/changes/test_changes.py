"""Which changes of a pipeline does zerocopy detect when the pipeline is passed again, and what does it write then?"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pipelines
import pytest
import ray
import torch
from torch import nn

import zerocopy
from zerocopy import shared

pytestmark = pytest.mark.usefixtures("cluster")


def test_changes_that_are_seen(publishings: list[int]) -> None:
    """zerocopy compares identity, storage, version, modes and `requires_grad`, and writes only changed weights again."""
    search = pipelines.search(width=64)
    changes = [
        (lambda: search.encoder.eval(), 0),
        (lambda: search.encoder.requires_grad_(False), 0),
        (lambda: search.encoder[0].weight.zero_(), 5),
        (lambda: setattr(search.encoder[0], "bias", nn.Parameter(torch.ones(64), requires_grad=False)), 5),
        (lambda: search.encoder.append(nn.Linear(64, 64)), 2),
        (lambda: setattr(search, "index", torch.ones(3, 64)), 1),
        (lambda: setattr(search, "encoder", nn.Linear(64, 64)), 2),
        (lambda: setattr(search.index, "data", torch.ones(1, 64)), 3),
    ]
    with torch.no_grad():
        for change, _ in [(lambda: None, 5), *changes]:
            change()
            assert ray.get(pipelines.plain_answer.remote(search, 1.0)) == search(1.0)
            arrived = (
                ray.get(pipelines.top_k_and_mode.remote(search)) if isinstance(search.encoder, nn.Sequential) else None
            )
            assert arrived in (
                None,
                (5, search.encoder.training, search.encoder[0].weight.requires_grad) if arrived else None,
            )
    assert len(publishings) == 1 + len(changes)


@zerocopy.pipeline
class Parts:
    """A pipeline with one shared field, which takes any value."""

    value: Any = shared()


@ray.remote
def total(parts: Parts) -> list[float]:
    def walk(value: Any) -> list[float]:
        if isinstance(value, torch.Tensor):
            return [float(value.detach().float().sum()), *value.shape]
        if isinstance(value, nn.Module):
            return [len(value._forward_hooks), *(item for tensor in value.parameters() for item in walk(tensor))]
        if isinstance(value, dict):
            return [item for key, part in value.items() for item in (len(str(key)), *walk(part))]
        if hasattr(value, "__dict__"):
            return walk(vars(value))
        return [item for part in value for item in walk(part)] if isinstance(value, (list, deque)) else [value]

    return walk(parts.value)


def full(number: float) -> torch.Tensor:
    return torch.full((4, 4), float(number))


def lin(number: float) -> nn.Linear:
    module = nn.Linear(4, 4, bias=False)
    nn.init.constant_(module.weight, number)
    return module


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "a module appended to a list": (lambda: [lin(1)], lambda v: v.append(lin(2))),
    "a module replaced in a list": (lambda: [lin(1), lin(2)], lambda v: v.__setitem__(0, lin(3))),
    "modules swapped in a list": (lambda: [lin(1), lin(2)], lambda v: v.reverse()),
    "modules swapped in a ModuleList": (
        lambda: nn.ModuleList([lin(1), lin(2)]),
        lambda v: (lambda a, b: (v.__setitem__(0, b), v.__setitem__(1, a)))(v[0], v[1]),
    ),
    "a key renamed": (lambda: {"b": full(1)}, lambda v: v.update(longer=v.pop("b"))),
    "a nested value": (lambda: {"deep": {"er": [full(1)]}}, lambda v: v["deep"]["er"].append(full(2))),
    "a deque": (lambda: deque([full(1)]), lambda v: v.append(full(5))),
    "an attribute of an object": (lambda: SimpleNamespace(m=lin(1)), lambda v: setattr(v, "m", lin(2))),
    "a plain value beside a tensor": (lambda: {"t": full(1), "scale": 2.0}, lambda v: v.update(scale=3.0)),
    "a hook": (lambda: lin(1), lambda v: v.register_forward_hook(total_hook)),
    "a pruned parameter": (lambda: lin(1), lambda v: setattr(v.weight, "data", v.weight.data[:3])),
    "parameters swapped": (
        lambda: nn.Sequential(lin(1), lin(2)),
        lambda v: (lambda a, b: (setattr(v[0], "weight", b), setattr(v[1], "weight", a)))(v[0].weight, v[1].weight),
    ),
}


def total_hook(module: nn.Module, args: object, output: object) -> None: ...


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_identity_arrives(change: str) -> None:
    """Every object that is replaced, added, swapped or renamed in a shared value arrives, passed or published by hand."""
    make, mutate = CHANGES[change]
    for by_hand in (False, True):
        parts = Parts(make())
        send = zerocopy.publish if by_hand else (lambda it: it)
        first = send(parts)
        before = ray.get(total.remote(first.load() if by_hand else first))
        mutate(parts.value)
        second = send(parts)
        after = ray.get(total.remote(second.load() if by_hand else second))
        expected = ray.get(total.remote(pickle.loads(pickle.dumps(parts))))
        assert after == expected != before


def double(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def test_a_hook_that_is_removed() -> None:
    """A hook runs in workers as long as the pipeline has it, and no longer."""
    search = pipelines.search(width=64)
    plain = search(1.0)
    handle = search.encoder.register_forward_hook(double)
    assert ray.get(pipelines.plain_answer.remote(search, 1.0)) == search(1.0) != plain
    handle.remove()
    assert ray.get(pipelines.plain_answer.remote(search, 1.0)) == plain


def test_reused_addresses_are_not_mistaken() -> None:
    """A new storage at the address of a freed one is detected as a change."""
    parts = Parts(lin(1))
    for number in range(2, 8):
        for _ in range(2):
            parts.value.weight.data = parts.value.weight.data * 0 + number
        assert ray.get(total.remote(parts))[1] == 16 * number


def test_unchanged_means_not_published(publishings: list[int]) -> None:
    """Reading, running or passing a pipeline does not publish it again."""
    search = pipelines.search(width=64)
    for _ in range(3):
        ray.get(pipelines.plain_answer.remote(search, 1.0))
        search(3.0)
        str(zerocopy.plan(search))
    assert publishings == [5]
