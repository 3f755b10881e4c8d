"""On a machine with a GPU: whatever goes in comes out the same there, but for its device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observing import difference, observe
from test_faithful import DTYPES, KINDS, SIZE, Box

import zerocopy

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),  # torch's, of prototypes
]


def in_main_memory(observation: Any) -> Any:
    """What was observed, as if it had been on the CPU."""
    if isinstance(observation, (list, tuple)):
        return type(observation)(map(in_main_memory, observation))
    return "cpu" if observation == "cuda" else observation


def assert_same(original: Any) -> None:
    expected = observe(original)
    publication = zerocopy.publish(original)
    loaded = publication.load(device="cuda")
    assert not difference(expected, in_main_memory(observe(loaded)))
    back = zerocopy.publish(loaded).load()
    assert not difference(expected, observe(back))


@pytest.mark.parametrize("kind", KINDS)
def test_comes_out_the_same(kind: str) -> None:
    """Everything that can be observed is equal on the GPU, and again after it was published from there."""
    assert_same(KINDS[kind]())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Every dtype of torch, with all its bits."""
    tensor = torch.arange(SIZE * SIZE * 16, dtype=torch.int64).view(torch.uint8)[: SIZE * SIZE * dtype.itemsize]
    assert_same(Box([tensor.clone().view(torch.uint8).view(dtype), torch.empty(0, dtype=dtype)]))
