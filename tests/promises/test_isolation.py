"""Do writes stay isolated? A write in one worker never reaches another worker, a later load or the publisher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import run_python
from torch import nn

import zerocopy
from zerocopy import errors, shared

pytestmark = pytest.mark.usefixtures("cluster")


@zerocopy.pipeline
class Model:
    net: nn.Module = shared()
    table: np.ndarray = shared()


def model() -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), np.ones(50_000))


def in_place(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(1)


def under_inference_mode(model: Model) -> None:
    with torch.inference_mode():
        model.net[0].weight.mul_(0)


def through_data(model: Model) -> None:
    model.net[0].weight.data.fill_(7)
    model.net[0].bias.data[:] = 7


def load_state_dict(model: Model) -> None:
    model.net.load_state_dict({name: torch.zeros_like(value) for name, value in model.net.state_dict().items()})


def optimizer_step(model: Model) -> None:
    optimizer = torch.optim.SGD(model.net.parameters(), lr=10)
    model.net(torch.ones(4, 64)).square().sum().backward()
    optimizer.step()


def batch_norm_in_train_mode(model: Model) -> None:
    model.net.train()
    model.net(torch.full((8, 64), 100.0))


def array_write(model: Model) -> None:
    model.table[:] = -1


WRITES = [
    in_place, under_inference_mode, through_data, load_state_dict, optimizer_step, batch_norm_in_train_mode, array_write,
]  # fmt: skip


def content(model: Model) -> list[bytes]:
    return [*(value.numpy(force=True).tobytes() for value in model.net.state_dict().values()), model.table.tobytes()]


@zerocopy.actor(num_cpus=0.1)
class Holder:
    def hold(self, publication: zerocopy.Publication) -> list[bytes]:
        self.model = publication.load()
        return self.content()

    def content(self) -> list[bytes]:
        return content(self.model)

    def write(self, how: Callable[[Model], None]) -> bool:
        before = self.content()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            how(self.model)
        return self.content() != before


@pytest.fixture(scope="module")
def workers(cluster: None) -> Iterator[tuple[Any, Any]]:
    with Holder.pool(2) as pool:
        yield pool[0], pool[1]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_stay_where_they_were_made(write: Callable[[Model], None], workers: tuple[Any, Any]) -> None:
    """Every kind of write works without a warning, and never reaches another pipeline."""
    writer, reader = workers
    original = model()
    expected = content(original)
    publication = zerocopy.publish(original)
    early = publication.load()
    assert ray.get([worker.hold.remote(publication) for worker in workers]) == [expected, expected]
    assert ray.get(writer.write.remote(write)), "the write had no effect where it was made"
    assert ray.get(reader.content.remote()) == expected
    assert content(early) == expected
    assert content(publication.load()) == expected
    assert content(original) == expected
    assert ray.get(writer.hold.remote(publication)) == expected


def test_a_write_in_the_publisher_reaches_nobody() -> None:
    """The publisher's tensors have their own memory, so its writes never reach a loaded pipeline."""
    original = model()
    expected = content(original)
    publication = zerocopy.publish(original)
    for write in WRITES:
        write(original)
    assert content(publication.load()) == expected


def test_writes_of_one_load_stay_within_ties() -> None:
    """Within one load, a write to a tensor is visible in the tensors that are tied to it."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    loaded = zerocopy.publish(net).load()
    with torch.no_grad():
        loaded[0].weight.fill_(3)
    assert loaded[1].weight.sum() == 3 * 64


FALLBACK = """
import os, sys, warnings
import ray, torch
from torch import nn
import zerocopy
import zerocopy.errors
from zerocopy._store import mapping

def no_raylet():
    return iter(())

mapping.raylets = no_raylet
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
publication = zerocopy.publish(nn.Linear(64, 64))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    one, other = publication.load(), publication.load()
    torch.testing.assert_close(one.weight, other.weight)
    print([w.category.__name__ for w in caught])
with torch.no_grad():
    one.weight.fill_(5)
print("seen by others:", bool((other.weight == 5).all()))
os.environ["ZEROCOPY_REQUIRE_ISOLATION"] = "1"
try:
    publication.load()
except zerocopy.errors.IsolationError as error:
    print("refused:", error)
"""


def test_fallback_and_the_setting_against_it(address: str) -> None:
    """Without private mappings zerocopy uses Ray's mapping and warns once; with ZEROCOPY_REQUIRE_ISOLATION it raises an error."""
    done = run_python(FALLBACK, "-", address)
    fell_back, seen, refused = done.stdout.splitlines()
    assert fell_back == "['IsolationWarning']", done.stderr
    assert seen == "seen by others: True"
    assert refused.startswith(
        "refused: The object store cannot be mapped privately in this process: it cannot open the store's file through a raylet"
    )
    assert "unset ZEROCOPY_REQUIRE_ISOLATION" in refused


def test_the_publisher_may_require_isolation_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZEROCOPY_REQUIRE_ISOLATION of the publisher also applies to readers: one that cannot map privately raises an error."""
    monkeypatch.setenv("ZEROCOPY_REQUIRE_ISOLATION", "1")
    publication = zerocopy.publish(model())
    monkeypatch.delenv("ZEROCOPY_REQUIRE_ISOLATION")

    @ray.remote
    def load_without_raylet(publication: Any) -> str:
        from zerocopy._store import mapping

        found, mapping.raylets = mapping.raylets, lambda: iter(())
        mapping._descriptors.clear()
        try:
            publication.load()
        except errors.IsolationError as error:
            return str(error)
        finally:
            mapping.raylets = found
        return "loaded"

    assert "it cannot open the store's file through a raylet" in ray.get(load_without_raylet.remote(publication))
