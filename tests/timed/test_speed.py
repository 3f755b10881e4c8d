"""Is zerocopy fast enough? The limits are ratios within one run, for noisy machines too. `nox -s bench` prints the figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import ray
from conftest import run_python, wait_until
from torch import nn

import zerocopy
from zerocopy._split.introspect import Subject, introspect

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.alone]


def ratio(call: Callable[[], Any], baseline: Callable[[], Any], rounds: int = 25) -> float:
    """How many times longer than the baseline a call takes. Each round makes both calls, so that a slow moment affects both."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    ratios = [seconds(call) / seconds(baseline) for _ in range(rounds + 3)]
    return median(ratios[3:])


def stack(blocks: int, width: int = 8) -> nn.Module:
    """A model with five modules and four tensors per block."""
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), nn.Dropout()) for _ in range(blocks)]
    ).eval()


@zerocopy.task(num_cpus=0)
def echo(model: nn.Module, value: int) -> int:
    return value


@ray.remote(num_cpus=0)
def nothing(value: int) -> int:
    return value


def test_loading_grows_with_modules() -> None:
    """Load time and skeleton bytes are linear in the number of modules."""
    small, large = stack(40), stack(320)
    assert ratio(zerocopy.publish(large).load, zerocopy.publish(small).load) < 14
    sizes = [len(introspect(Subject(model)).shared.payload) for model in (small, large)]
    assert sizes[1] < 9 * sizes[0]


def test_loading_does_not_grow_with_bytes() -> None:
    """A model with 12,000 times the bytes loads in about the same time."""
    small, large = stack(20, 8), stack(20, 1024)
    assert ratio(zerocopy.publish(large).load, zerocopy.publish(small).load) < 3


def test_loading_large_models_does_not_grow_with_bytes() -> None:
    """A large model with 128 times the bytes of another large model loads in about the same time."""

    def published(width: int) -> zerocopy.Publication:
        return zerocopy.publish(nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(8)]))

    assert ratio(published(2048).load, published(181).load) < 4


def test_loading_costs_what_unpickling_modules_does() -> None:
    """A load takes at most twice the time that pickle needs for the modules without weights."""
    model = stack(200)
    publication = zerocopy.publish(model)
    bare = ray.cloudpickle.dumps(model.to("meta"))
    assert ratio(publication.load, lambda: ray.cloudpickle.loads(bare)) < 2


def test_a_warm_task_call_costs_little_more_than_none() -> None:
    """A warm task call with a publication, or with the model, takes little longer than an empty Ray task."""
    model = stack(60)
    publication = zerocopy.publish(model)
    assert ratio(lambda: echo(publication, 1), lambda: ray.get(nothing.remote(1)), 60) < 3
    assert ratio(lambda: echo(model, 1), lambda: ray.get(nothing.remote(1)), 60) < 4


def test_publishing_costs_little_more_than_putting(store_use: Callable[[], int]) -> None:
    """Publishing 50 MB takes less than three times as long as `ray.put` of the same bytes."""

    def publish() -> float:
        model = stack(12, 1024)
        start = time.perf_counter()
        publication = zerocopy.publish(model)
        taken = time.perf_counter() - start
        publication.close()
        return taken

    def put() -> float:
        views = [tensor.detach().numpy() for tensor in stack(12, 1024).parameters()]
        start = time.perf_counter()
        ref = ray.put(views)
        taken = time.perf_counter() - start
        del ref
        return taken

    def taken(call: Callable[[], float]) -> float:
        """Measure a call, and wait until the store is empty, so that the next call uses warm pages: new pages are slow."""
        seconds = call()
        assert wait_until(lambda: store_use() < 1_000_000)
        return seconds

    ratios = [taken(publish) / taken(put) for _ in range(6)]
    assert median(ratios[1:]) < 3


def test_importing_is_light() -> None:
    """`import zerocopy` takes a small part of the time that torch and Ray take."""
    program = (
        "import time; start = time.perf_counter(); import torch, ray; middle = time.perf_counter(); import zerocopy\n"
        "print((time.perf_counter() - middle) / (middle - start))"
    )
    assert any(float(run_python(program).stdout) < 0.15 for _ in range(3))
