"""Does the publisher's own pipeline use the store after `publish(..., adopt=True)`?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn

import zerocopy
from zerocopy import shared
from zerocopy._store import object_store
from zerocopy.memory import private_bytes
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = pytest.mark.usefixtures("cluster")

WIDTH = 1024
LAYERS = 16
MODEL_BYTES = LAYERS * WIDTH * (WIDTH + 1) * 4


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])


def test_no_second_copy() -> None:
    """After adoption the publisher has no private copy of its weights, and its results stay the same."""
    zerocopy.publish(layers(), adopt=True)  # the first adoption allocates some memory once
    model, value = layers(), torch.ones(1, WIDTH)
    answer = model(value).detach()
    ids = [id(parameter) for parameter in model.parameters()]
    before = private_bytes()
    publication = zerocopy.publish(model, adopt=True)
    assert before - private_bytes() > 0.9 * MODEL_BYTES
    assert_zero_copy(model)
    assert [id(parameter) for parameter in model.parameters()] == ids
    assert torch.equal(model(value), answer)
    assert torch.equal(publication.load()(value), answer)
    assert shares_memory(model, publication.load())


def test_the_peak_is_below_a_quarter_more() -> None:
    """During adoption the peak of memory is at most a quarter above the weights: private memory shrinks as the store grows."""
    model = layers()
    peaks = [0]
    put, written = object_store.put, [0]

    def counting_put(value: Any) -> Any:
        ref = put(value)
        if isinstance(value, tuple):
            written[0] += sum(memoryview(buffer.raw()).nbytes for buffer in value[0])
            peaks.append(private_bytes() - start + written[0])
        return ref

    start = private_bytes() - MODEL_BYTES
    try:
        object_store.put = counting_put
        zerocopy.publish(model, adopt=True)
    finally:
        object_store.put = put
    assert len(peaks) > 8
    assert max(peaks) < 1.25 * MODEL_BYTES


def test_training_goes_on_in_private() -> None:
    """After adoption an existing optimizer still works, and its writes never reach the store or another load."""
    model = layers()[:2]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    publication = zerocopy.publish(model, adopt=True)
    before = publication.load()[0].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(publication.load()[0].weight, before)
    second = zerocopy.publish(model)
    assert torch.equal(second.load()[0].weight, model[0].weight)


def test_ties_views_and_strides_stay() -> None:
    """After adoption tensors over one storage still share it, and keep their strides, flags and attributes."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(float(WIDTH * WIDTH)).view(WIDTH, WIDTH)
            self.weight = nn.Parameter(base)
            self.same = self.weight
            self.register_buffer("row", base[3])
            self.register_buffer("turned", base.t())
            self.low = nn.Parameter(torch.randn(WIDTH, WIDTH).bfloat16(), requires_grad=False)
            self.weight.tag = "mine"

    model = Tied()
    twin = copy.deepcopy(model)
    zerocopy.publish(model, adopt=True)
    assert_zero_copy(model)
    assert model.same is model.weight
    assert model.weight.tag == "mine"
    assert not model.low.requires_grad
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.stride() == theirs.stride()
    with torch.no_grad():
        model.weight[3, 0] = -1
    assert model.row[0] == -1
    assert model.turned[0, 3] == -1


def test_memory_that_others_see_stays() -> None:
    """A storage with a view outside the pipeline, also a NumPy array, is published but not moved."""
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    view = model[0].weight.detach()
    array = model[1].weight.detach().numpy()
    zerocopy.publish(model, adopt=True)
    with torch.no_grad():
        model[0].weight.fill_(5)
        model[1].weight.fill_(6)
    assert view[0, 0] == 5
    assert array[0, 0] == 6
    assert_zero_copy(model[2])


def test_a_pipeline(store_use: Callable[[], int]) -> None:
    """Shared tensors of a pipeline are adopted, its arrays are not, and publishing again writes nothing."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        index: torch.Tensor = shared()
        table: Any = shared()

    search = Search(nn.Linear(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH), np.ones((WIDTH, WIDTH)))
    zerocopy.publish(search)
    publication = zerocopy.publish(search, adopt=True)
    used = store_use()
    assert_zero_copy(search.encoder)
    assert shares_memory(search.index, publication.load().index)
    assert zerocopy.publish(search, adopt=True).reference == zerocopy.publish(search).reference
    assert store_use() <= used
    zerocopy.unshare(search)
    with pytest.raises(AssertionError):
        assert_zero_copy(search.encoder)
    assert search.index.sum() == WIDTH * WIDTH


@pytest.mark.parametrize("fails_at", [1, 4, "manifest"])
def test_a_failure_leaves_the_pipeline_whole(fails_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If writing to the store fails at any point, the pipeline has private memory as before, and works."""
    model, value = layers(), torch.ones(1, WIDTH)
    answer = model(value).detach()
    calls = [0]
    put = object_store.put

    def failing_put(content: Any) -> Any:
        calls[0] += 1
        if calls[0] == fails_at or (fails_at == "manifest" and content[1] is not None):
            raise ray.exceptions.ObjectStoreFullError
        return put(content)

    monkeypatch.setattr(object_store, "put", failing_put)
    with pytest.raises(ray.exceptions.ObjectStoreFullError):
        zerocopy.publish(model, adopt=True)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_zero_copy(model)
    assert torch.equal(model(value), answer)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(zerocopy.publish(model, adopt=True).load()[0].weight, model[0].weight)


def test_publishing_leaves_storages_resizable() -> None:
    """A published tensor can still be resized, because publishing does not make a NumPy view of its storage."""
    model = nn.Linear(WIDTH, WIDTH)
    zerocopy.publish(model)
    assert model.weight.untyped_storage().resizable()
