"""What is promised of publications holds for those that have a name: all kinds, isolation, partial loads, devices, passing."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pipelines
import pytest
import ray
import test_faithful
import test_isolation
import torch
from hypothesis import given, settings
from observing import difference, observe
from test_faithful import COPIED, DTYPES, KINDS
from test_isolation import WRITES, content
from test_round_trip import CHECKS, Random
from test_round_trip import pipelines as random_pipelines
from torch import nn
from versions import Numbered, numbered

import zerocopy
from zerocopy import copied, shared
from zerocopy.errors import ArgumentError, DeviceError, NotPublishedError
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch's, of prototypes
]


@zerocopy.actor(num_cpus=0.1)
class Process:
    """Another process, in which pipelines are looked up and loaded."""

    def observe(self, name: str) -> tuple[Any, str]:
        """All that can be observed of the newest version, and which of its tensors is not a view of the store."""
        warnings.simplefilter("ignore")
        loaded = zerocopy.lookup(name).load(verify=True)
        try:
            assert_zero_copy(loaded)
        except AssertionError as error:
            return observe(loaded), str(error)
        return observe(loaded), ""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


@pytest.fixture(scope="module")
def process(cluster: None) -> Iterator[Any]:
    with Process.pool(1) as pool:
        yield pool[0]


def assert_same(original: Any, name: str, process: Any, *, is_shared: bool = True) -> None:
    expected = observe(original)
    version = zerocopy.publish(original, name=name).version
    found, private = ray.get(process.observe.remote(name))
    assert not difference(expected, found)
    assert not is_shared or not private
    loaded = zerocopy.lookup(name).load(verify=True)
    assert not difference(expected, observe(loaded))
    assert zerocopy.version_of(loaded) == version
    assert zerocopy.publish(original, name=name).version == version  # its digest does not change


@pytest.mark.parametrize("kind", KINDS)
def test_comes_out_the_same(kind: str, name: str, process: Any) -> None:
    """Every kind, looked up and loaded here and in another process; published again it is the same version."""
    assert_same(KINDS[kind](), name, process, is_shared=kind not in COPIED)


def test_dtypes(name: str, process: Any) -> None:
    """Every dtype of torch, with all its bits."""
    tensors = [test_faithful.noise().view(torch.uint8)[:, : 4 * dtype.itemsize].clone().view(dtype) for dtype in DTYPES if dtype.itemsize <= 16]
    assert_same(test_faithful.Box([*tensors, *[torch.empty(0, dtype=dtype) for dtype in DTYPES]]), name, process)
