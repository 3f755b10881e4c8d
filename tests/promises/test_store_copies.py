"""What came from the store and has its bytes is never written again: only changed storages are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import ray
import torch
from conftest import wait_until
from torch import nn

import zerocopy
from zerocopy import copied, shared

pytestmark = pytest.mark.usefixtures("cluster")


@zerocopy.pipeline
class Two:
    first: nn.Module = shared()
    second: Any = shared(default=None)
    settings: dict[str, int] = copied(factory=dict)


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)), nn.BatchNorm1d(128))


def set_layer(module: nn.Sequential, position: int, layer: nn.Module) -> None:
    module[position] = layer


def fused_step(module: nn.Sequential) -> None:
    parameters = list(module[1].parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()
    optimizer.zero_grad()


TINY = 1  # storage, the counter of batches: each load copies it, and to write its bytes again costs nothing

# What is done to a pipeline, and how many storages of its 13 are then written: a layer has two.
CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], int]] = {
    "frozen": (lambda module: module.requires_grad_(False), 0),
    "frozen in part": (lambda module: module[0].requires_grad_(False), 0),
    "put into another mode": (lambda module: module.eval(), 0),
    "given a hook": (lambda module: module.register_forward_hook(print), 0),
    "given an attribute": (lambda module: setattr(module, "name", "new"), 0),
    "a layer removed": (lambda module: module.pop(1), 0),
    "layers swapped": (lambda module: set_layer(module, 0, module[1]), 0),
    "a layer tied": (lambda module: setattr(module[0], "weight", module[1].weight), 0),
    "a view registered": (lambda module: module.register_buffer("view", module[0].weight.detach()[:2]), 0),
    "written as it was": (lambda module: module[0].weight.data.mul_(1), 0),
    "cast in part": (lambda module: module[0].half(), 2),
    "a layer replaced": (lambda module: set_layer(module, 2, nn.Linear(128, 128)), 2),
    "a layer appended": (lambda module: module.append(nn.Linear(128, 128)), 2),
    "a layer trained": (fused_step, 2),
    "one element written": (lambda module: module[3].weight.data[5, 5].fill_(9), 1),
    "run in train mode": (lambda module: module.train()(torch.randn(4, 128)), 2),
}


def passed(pipeline: Any) -> Any:
    return ray.get(ray.put(pipeline))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["loaded", "adopted", "loaded in another pipeline"])
def test_only_changed_storages_are_written(kind: str, change: str, publishings: list[int]) -> None:
    """A pipeline that came from the store is passed on after a change, by hand and automatically, and after another one."""
    pipeline = Two(stack())
    publication = zerocopy.publish(pipeline, adopt=kind == "adopted")
    if kind != "adopted":
        pipeline = publication.load()
    if kind == "loaded in another pipeline":
        pipeline = Two(pipeline.first, publication.load().first[0])
    mutate, changed = CHANGES[change]
    del publishings[:]
    mutate(pipeline.first)
    found = passed(pipeline).first.state_dict()
    for name, tensor in pipeline.first.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert sum(publishings) in {changed, changed + TINY}
    del publishings[:]
    zerocopy.publish(pipeline).load()
    passed(pipeline)
    assert sum(publishings) in {0, TINY}


def test_replicas_that_freeze_their_models_share_one_copy(store_use: Callable[[], int]) -> None:
    """Three loads are frozen and passed on, as replicas of Serve do by themselves: the store holds one set of weights."""
    publication = zerocopy.publish(pipelines.encoder(1024))
    before = store_use()
    kept = []
    for _ in range(3):
        replica = publication.load().requires_grad_(False)
        kept.append((replica, ray.put(Two(replica))))
    assert store_use() - before < 1_000_000 < publication.shared_bytes


def test_a_shallow_copy_shares_the_weights(publishings: list[int]) -> None:
    """A copy of a loaded pipeline, and a pipeline over some of its modules, write nothing but their structure."""
    loaded = zerocopy.publish(Two(stack())).load()
    del publishings[:]
    for pipeline in (copy.copy(loaded), Two(loaded.first[0]), Two(loaded.first[1], loaded.first[2].weight)):
        passed(pipeline)
    assert sum(publishings) <= TINY


def test_what_is_changed_in_ordinary_memory_is_written_alone(publishings: list[int]) -> None:
    """In the process that publishes, too, a changed layer is written without the others."""
    pipeline = Two(stack())
    passed(pipeline)
    del publishings[:]
    for position in (0, 1, 0):
        pipeline.first[position].weight.data.mul_(2)
        assert torch.equal(passed(pipeline).first[position].weight, pipeline.first[position].weight)
    assert publishings == [1, 1, 1]


def test_superseded_weights_are_freed(store_use: Callable[[], int]) -> None:
    """What is needed of old weights is written again where most of them is not: the store does not keep both."""
    pipeline = Two(pipelines.encoder(1024), torch.ones(1000))
    size = zerocopy.plan(pipeline).shared_bytes
    before = store_use()
    for number in range(4):
        with torch.no_grad():
            for parameter in pipeline.first.parameters():
                parameter.fill_(number)
        passed(pipeline)
    assert wait_until(lambda: store_use() - before < 1.1 * size, 20)
