"""On a machine with a GPU, is every object the same there after loading, except for its device?"""

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
    pytest.mark.filterwarnings("ignore"),  # torch warns of prototypes
]


def in_main_memory(observation: Any) -> Any:
    """The observation with "cpu" in place of "cuda"."""
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
    """Everything that can be observed of an object is equal on the GPU, and equal again after it was published from there."""
    assert_same(KINDS[kind]())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Every dtype of torch keeps all its bits on the GPU."""
    tensor = torch.arange(SIZE * SIZE * 16, dtype=torch.int64).view(torch.uint8)[: SIZE * SIZE * dtype.itemsize]
    assert_same(Box([tensor.clone().view(torch.uint8).view(dtype), torch.empty(0, dtype=dtype)]))
