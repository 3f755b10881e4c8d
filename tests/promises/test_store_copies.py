"""Does passing on a pipeline that came from the store write only the storages that changed?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
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


TINY = 1  # one storage, the batch counter: each load copies it, and writing its few bytes again costs nothing

# A change of the pipeline, and how many of its 13 storages are then written: a layer has two.
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
    """After a change of a loaded or adopted pipeline, passing it on writes only the changed storages, and only once."""
    pipeline = Two(stack())
    publication = zerocopy.publish(pipeline, adopt=kind == "adopted")
    if kind != "adopted":
        pipeline = publication.load()
    if kind == "loaded in another pipeline":
        pipeline = Two(pipeline.first, zerocopy.publish(nn.Linear(128, 128)).load())
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
    """The store has one set of weights when three replicas freeze their loaded models and pass them on."""
    publication = zerocopy.publish(pipelines.encoder(1024))
    before = store_use()
    kept = []
    for _ in range(3):
        replica = publication.load().requires_grad_(False)
        kept.append((replica, ray.put(Two(replica))))
    assert store_use() - before < 1_000_000 < publication.shared_bytes


def test_a_shallow_copy_shares_the_weights(publishings: list[int]) -> None:
    """Passing a shallow copy of a loaded pipeline, or a pipeline with some of its modules, writes no weights."""
    loaded = zerocopy.publish(Two(stack())).load()
    del publishings[:]
    for pipeline in (copy.copy(loaded), Two(loaded.first[0]), Two(loaded.first[1], loaded.first[2].weight)):
        passed(pipeline)
    assert sum(publishings) <= TINY


def test_what_is_changed_in_ordinary_memory_is_written_alone(publishings: list[int]) -> None:
    """In the publishing process, a changed layer is also written without the other layers."""
    pipeline = Two(stack())
    passed(pipeline)
    del publishings[:]
    for position in (0, 1, 0):
        pipeline.first[position].weight.data.mul_(2)
        assert torch.equal(passed(pipeline).first[position].weight, pipeline.first[position].weight)
    assert publishings == [1, 1, 1]


def test_superseded_weights_are_freed(store_use: Callable[[], int]) -> None:
    """Old weights leave the store: if a small part of them is still needed, it is written again with the new weights."""
    pipeline = Two(pipelines.encoder(1024), torch.ones(1000))
    size = zerocopy.plan(pipeline).shared_bytes
    before = store_use()
    for number in range(4):
        with torch.no_grad():
            for parameter in pipeline.first.parameters():
                parameter.fill_(number)
        passed(pipeline)
    assert wait_until(lambda: store_use() - before < 1.1 * size, 20)


@pytest.mark.parametrize("kind", ["loaded twice", "adopted beside a load", "published beside a load", "arrays"])
def test_two_loads_in_one_pipeline_stay_two(kind: str) -> None:
    """Two loads of the same weights in one pipeline still have separate memory in the process that receives it."""
    model: Any = np.zeros(5000) if kind == "arrays" else nn.Linear(64, 64)
    publication = zerocopy.publish(Two(model), adopt=kind == "adopted beside a load")
    first = model if "beside" in kind else publication.load().first
    found = passed(Two(first, publication.load().first))
    for one, other in ((found.first, found.second), (found.second, found.first)):
        ours, theirs = (part if kind == "arrays" else part.weight.detach() for part in (one, other))
        before = theirs.copy() if kind == "arrays" else theirs.clone()
        ours += 1
        assert bool((theirs == before).all())


@pytest.mark.parametrize("by_hand", [False, True], ids=["passed", "published"])
def test_a_version_keeps_no_older_ones(by_hand: bool, store_use: Callable[[], int]) -> None:
    """If parts of a pipeline change often, the store keeps at most about twice the bytes of its last version."""
    pipeline = Two(pipelines.encoder(512, seed=1), pipelines.encoder(512, seed=2))
    size = zerocopy.plan(pipeline).shared_bytes
    before = store_use()
    for number in range(24):
        part = pipeline.second if number % 2 else pipeline.first
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.fill_(number)
        if by_hand:
            zerocopy.publish(pipeline).close()
        else:
            passed(pipeline)
    assert wait_until(lambda: store_use() - before < 2.2 * size, 20)


def test_half_of_an_old_shard_is_needed_in_every_version(store_use: Callable[[], int]) -> None:
    """An object in the store is dropped when less than half of its bytes are needed, also if a later version inherited it."""
    layers = 12
    pipeline = Two(nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(layers))))
    size = zerocopy.plan(pipeline).shared_bytes
    before = store_use()
    passed(pipeline)
    for first in range(layers - 1, -1, -1):
        for layer in pipeline.first[first:]:
            layer.weight.data.add_(1)
        passed(pipeline)
        assert wait_until(lambda: store_use() - before < 2.2 * size, 20), first


@pytest.mark.parametrize("adopt", [False, True], ids=["loaded", "adopted"])
def test_what_was_written_once_is_published_once(adopt: bool, publishings: list[int]) -> None:
    """A loaded pipeline that was written and passed on is not published again until the next write."""
    pipeline = Two(stack())
    publication = zerocopy.publish(pipeline, adopt=adopt)
    pipeline = pipeline if adopt else publication.load()
    for layer in pipeline.first:
        layer.weight.data.add_(1)
    passed(pipeline)
    del publishings[:]
    for _ in range(3):
        passed(pipeline)
    assert publishings == []
    pipeline.first[0].weight.data[3, 3] = 7
    assert torch.equal(passed(pipeline).first[0].weight, pipeline.first[0].weight)
    assert publishings in ([1], [1 + TINY])
