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


def seconds(call: Callable[[], Any], times: int = 25) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(times + 3):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken[3:])


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
    ratio = seconds(zerocopy.publish(large).load) / seconds(zerocopy.publish(small).load)
    assert ratio < 14, ratio
    sizes = [len(introspect(Subject(model)).shared.payload) for model in (small, large)]
    assert sizes[1] < 9 * sizes[0]


def test_loading_does_not_grow_with_bytes() -> None:
    """A model of 16,000 times the bytes loads in about the same time."""
    small, large = stack(20, 8), stack(20, 1024)
    ratio = seconds(zerocopy.publish(large).load) / seconds(zerocopy.publish(small).load)
    assert ratio < 3, ratio


def test_loading_large_models_does_not_grow_with_bytes() -> None:
    """A model of 128 times the bytes, large from the start, loads about as fast."""

    def load_seconds(width: int) -> float:
        model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(8)])
        return seconds(zerocopy.publish(model).load)

    assert load_seconds(2048) < 4 * load_seconds(181)


def test_loading_costs_what_unpickling_modules_does() -> None:
    """A load takes no more than twice the time that pickle needs for the modules alone, without any weights."""
    model = stack(200)
    publication = zerocopy.publish(model)
    bare = ray.cloudpickle.dumps(model.to("meta"))
    assert seconds(publication.load) < 2 * seconds(lambda: ray.cloudpickle.loads(bare))


def test_a_warm_task_call_costs_little_more_than_none() -> None:
    """A call given a publication, or the model itself, over a Ray task that does nothing."""
    model = stack(60)
    publication = zerocopy.publish(model)
    baseline = seconds(lambda: ray.get(nothing.remote(1)), 60)
    assert seconds(lambda: echo(publication, 1), 60) < 3 * baseline
    assert seconds(lambda: echo(model, 1), 60) < 4 * baseline


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

    for call in (publish, put):
        taken(call)
    ratio = median(taken(publish) for _ in range(5)) / median(taken(put) for _ in range(5))
    assert ratio < 3, ratio


def test_importing_is_light() -> None:
    """`import zerocopy` takes a small part of the time that torch and Ray take."""
    program = (
        "import time; start = time.perf_counter(); import torch, ray; middle = time.perf_counter(); import zerocopy\n"
        "print((time.perf_counter() - middle) / (middle - start))"
    )
    assert any(float(run_python(program).stdout) < 0.15 for _ in range(3))
