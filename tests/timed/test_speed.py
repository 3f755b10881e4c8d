"""The budget, as ratios within one run and wide enough for a noisy machine. `nox -s bench` prints the figures."""

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
    """How many times as long a call takes: the median of rounds that make both, so that a slow moment hits both."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    ratios = [seconds(call) / seconds(baseline) for _ in range(rounds + 3)]
    return median(ratios[3:])


def stack(blocks: int, width: int = 8) -> nn.Module:
    """Five modules and four tensors a block."""
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
    """A model of 16,000 times the bytes loads in about the same time."""
    small, large = stack(20, 8), stack(20, 1024)
    assert ratio(zerocopy.publish(large).load, zerocopy.publish(small).load) < 3


def test_loading_large_models_does_not_grow_with_bytes() -> None:
    """A model of 128 times the bytes, large from the start, loads about as fast."""

    def published(width: int) -> zerocopy.Publication:
        return zerocopy.publish(nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(8)]))

    assert ratio(published(2048).load, published(181).load) < 4


def test_loading_costs_what_unpickling_modules_does() -> None:
    """A load takes no more than twice the time that pickle needs for the modules alone, without any weights."""
    model = stack(200)
    publication = zerocopy.publish(model)
    bare = ray.cloudpickle.dumps(model.to("meta"))
    assert ratio(publication.load, lambda: ray.cloudpickle.loads(bare)) < 2


def test_a_warm_task_call_costs_little_more_than_none() -> None:
    """A call given a publication, or the model itself, over a Ray task that does nothing."""
    model = stack(60)
    publication = zerocopy.publish(model)
    assert ratio(lambda: echo(publication, 1), lambda: ray.get(nothing.remote(1)), 60) < 3
    assert ratio(lambda: echo(model, 1), lambda: ray.get(nothing.remote(1)), 60) < 4


def test_publishing_costs_little_more_than_putting(store_use: Callable[[], int]) -> None:
    """Publishing 100 MB over a bare put of the same bytes."""

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
        """Into pages of the store that were used before: they are slow when they are touched for the first time."""
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
