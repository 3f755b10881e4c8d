"""Is every write detected? A pipeline that is passed always arrives with its current bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import ray
import torch
from torch import nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MinMaxObserver
from torch.nn.functional import batch_norm
from torch.optim.swa_utils import AveragedModel

import zerocopy
from zerocopy import shared

pytestmark = pytest.mark.usefixtures("cluster")


class Net(nn.Module):
    """A module with large and small weights, statistics, an observer and an inference tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(256, 256)
        self.small = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.words = nn.Embedding(1000, 64)
        self.observer = MinMaxObserver()
        self.fake = FusedMovingAvgObsFakeQuantize()
        with torch.inference_mode():
            self.register_buffer("table", torch.zeros(64, 64))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.large(self.words(words).repeat(1, 4))
        return self.norm(self.small(hidden[:, :8]))


@zerocopy.pipeline
class Trained:
    net: nn.Module = shared()


def step(optimizer: Callable[..., Any], **options: Any) -> Callable[[Net], None]:
    def train(net: Net) -> None:
        stepped = optimizer(net.parameters(), **options)
        net(torch.arange(16)).square().sum().backward()
        stepped.step()
        stepped.zero_grad()

    return train


def with_closure(net: Net) -> None:
    optimizer = torch.optim.LBFGS(net.small.parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        lost = net.small(torch.ones(1, 8)).square().sum()
        lost.backward()
        return lost

    optimizer.step(loss)
    optimizer.zero_grad()


def numpy_view(net: Net) -> None:
    net.large.weight.detach().numpy()[:] += 1


def in_c(net: Net) -> None:
    weight = net.small.weight
    ctypes.memset(weight.data_ptr(), 1, weight.nbytes)


def statistics(net: Net) -> None:
    """Update the statistics with a function that does not change the batch counter, which has a version counter."""
    norm = net.norm
    batch_norm(torch.randn(32, 8) + 5, norm.running_mean, norm.running_var, training=True)


def inference_tensor(net: Net) -> None:
    with torch.inference_mode():
        net.table += 1


def vector(net: Net) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(net.small.parameters()) * 2, net.small.parameters())


def average(net: Net) -> None:
    twin = AveragedModel(net.small)
    for own, other in zip(net.small.parameters(), twin.parameters(), strict=True):
        own.data.lerp_(other.data + 1, 0.5)


WRITES: dict[str, Callable[[Net], object]] = {
    "a fused step of AdamW": step(torch.optim.AdamW, lr=0.01, fused=True),
    "a fused step of SGD": step(torch.optim.SGD, lr=0.01, fused=True),
    "a fused step of Adam over a few rows": step(torch.optim.Adam, lr=1e-4, fused=True),
    "a step for each tensor": step(torch.optim.AdamW, lr=0.01, foreach=True),
    "a step with a closure": with_closure,
    "a dense write to .data": lambda net: net.large.weight.data.mul_(2),
    "one element of a small tensor by .data": lambda net: net.small.weight.data[3, 3].fill_(7),
    "another .data": lambda net: setattr(net.large.weight, "data", net.large.weight.data + 1),
    "NumPy": numpy_view,
    "code in C": in_c,
    "statistics of a normalization": statistics,
    "a batch in train mode": lambda net: net.train()(torch.arange(8)),
    "an observer": lambda net: net.observer(torch.randn(4)),
    "an observer in C++": lambda net: net.fake(torch.randn(4)),
    "an inference tensor": inference_tensor,
    "a vector of all parameters": vector,
    "an average": average,
    "an initialization": lambda net: nn.init.constant_(net.large.weight, 3),
    "another storage": torch.no_grad()(lambda net: net.small.bias.set_(torch.ones(8))),
}

# Only the kernel can detect a write without torch to a few elements of a large tensor.
FEW: dict[str, Callable[[Net], object]] = {
    "one element of a large tensor by .data": lambda net: net.large.weight.data[100, 101].fill_(7),
    "one element of a large tensor by NumPy": lambda net: net.large.weight.detach().numpy().__setitem__((100, 101), 7),
}


def content(net: nn.Module) -> dict[str, list[float]]:
    return {name: tensor.float().flatten().tolist() for name, tensor in net.state_dict().items()}


def passed(pipeline: Any) -> Any:
    """The pipeline as it arrives when it is passed."""
    return ray.get(ray.put(pipeline))


@pytest.mark.parametrize("write", WRITES)
def test_a_write_arrives_when_the_pipeline_is_passed_again(write: str) -> None:
    """A write in the publishing process, where weights are in ordinary memory, arrives when the pipeline is passed again."""
    trained = Trained(Net())
    before = content(passed(trained).net)
    WRITES[write](trained.net)
    assert content(passed(trained).net) == content(trained.net) != before


@pytest.mark.parametrize("write", WRITES)
def test_a_write_arrives_in_a_new_pipeline_over_the_same_modules(write: str) -> None:
    """A new pipeline over changed modules arrives with the current weights, not with those of an earlier pipeline."""
    trained = Trained(Net())
    before = content(passed(trained).net)
    WRITES[write](trained.net)
    assert content(passed(Trained(trained.net)).net) == content(trained.net) != before


@pytest.mark.parametrize("write", WRITES | FEW)
def test_a_write_to_a_loaded_pipeline_arrives(write: str) -> None:
    """A loaded model that is trained is passed on with the trained weights, also if it was passed on before."""
    publication = zerocopy.publish(Trained(Net()))
    loaded = publication.load()
    before = content(passed(loaded).net)
    (WRITES | FEW)[write](loaded.net)
    assert content(passed(loaded).net) == content(loaded.net) != before
    assert content(publication.load().net) == before


@pytest.mark.parametrize("write", WRITES | FEW)
def test_a_write_to_an_adopted_pipeline_arrives(write: str) -> None:
    """A write also arrives if the publisher's own weights are views of the store."""
    trained = Trained(Net())
    publication = zerocopy.publish(trained, adopt=True)
    before = content(passed(trained).net)
    (WRITES | FEW)[write](trained.net)
    assert content(passed(trained).net) == content(trained.net) != before
    assert content(publication.load().net) == before


@pytest.mark.parametrize("write", FEW)
def test_publish_compares_every_byte(write: str) -> None:
    """`publish` detects a write without torch to a few elements in ordinary memory, because it compares every byte."""
    trained = Trained(Net())
    zerocopy.publish(trained)
    FEW[write](trained.net)
    assert content(zerocopy.publish(trained).load().net) == content(trained.net)


@zerocopy.task
def use(trained: Trained, write: str | None) -> dict[str, list[float]]:
    """Return the content before this call writes."""
    found = content(trained.net)
    if write is not None:
        trained.net.train()
        (WRITES | FEW)[write](trained.net)
    return found


def test_later_calls_of_a_worker_see_no_write() -> None:
    """A task call gets the published weights, no matter what earlier calls in its process have written."""
    trained = Trained(Net().eval())
    publication = zerocopy.publish(trained)
    expected = content(trained.net)
    for write in [*WRITES, *FEW, None]:
        assert use(publication, write) == expected, write
        assert use(publication, None) == expected, write


KEPT: dict[str, Any] = {}
KEEPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a detached twin": lambda weight: weight.detach(),
    "what .data gives": lambda weight: weight.data,
    "a view": lambda weight: weight.view(-1),
    "a NumPy array": lambda weight: weight.detach().numpy(),
    "a storage": lambda weight: torch.empty(0).set_(weight.untyped_storage()),
}


@zerocopy.task
def keep_or_write(trained: Trained, keep: str, write: bool) -> dict[str, list[float]]:
    """Return the content before this call keeps a view of the weights, or writes through the view of an earlier call."""
    found = content(trained.net)
    if write:
        KEPT[keep][...] = 99
    else:
        KEPT[keep] = KEEPS[keep](trained.net.large.weight)
    return found


def test_later_calls_see_no_write_by_what_an_earlier_call_has_kept() -> None:
    """If a call keeps a view of a load, this load is not reused, because a write through the view can happen at any time."""
    publication = zerocopy.publish(Trained(Net().eval().requires_grad_(False)))
    expected = content(publication.load().net)
    for keep in KEEPS:
        for write in (False, True, False, True):
            assert keep_or_write(publication, keep, write) == expected, keep


def test_a_few_rows_of_a_large_embedding_arrive() -> None:
    """A fused step that changes only a few rows, and no version counter, is detected."""
    trained = Trained(nn.Embedding(100_000, 16))
    optimizer = torch.optim.SGD(trained.net.parameters(), lr=1.0, fused=True)
    passed(trained)
    trained.net(torch.tensor([54_321])).sum().backward()
    optimizer.step()
    assert torch.equal(passed(trained).net.weight, trained.net.weight)
