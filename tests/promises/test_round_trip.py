"""Are random pipelines equal to the original after a round trip through the store, and do writes stay in one load?"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from observing import difference, observe
from torch import nn

import zerocopy
from zerocopy import copied, shared

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.filterwarnings("ignore")]

EXAMPLES = int(os.environ.get("ZEROCOPY_EXAMPLES", "300"))  # a longer run: ZEROCOPY_EXAMPLES=5000
ELSEWHERE = 20  # each 20th example is also loaded in another process
CHECKS = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.int64,
    torch.int8, torch.uint8, torch.uint16, torch.bool,
]  # fmt: skip
FLAGS = st.booleans()
SHAPES = st.lists(st.integers(0, 5), max_size=3)
NAMES = st.lists(st.sampled_from("abc"), min_size=1, unique=True)
KEYS = st.lists(st.text(max_size=2), unique=True, max_size=3)
LABELS = st.text(max_size=3)
PLAIN = st.one_of(st.integers(), LABELS, st.none(), FLAGS)
_count = itertools.count()


@zerocopy.pipeline
class Random:
    """Shared and copied parts that may refer to each other."""

    model: nn.Module = shared()
    parts: Any = shared()
    own: Any = copied()
    label: str = copied(default="random")


class Block(nn.Module):
    """A module with members of every kind."""

    def forward(self) -> list[str]:
        """The sums of its parameters and buffers and the outputs of its linear layers, also of the blocks inside it."""
        members = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        found = [str(member.detach().to(torch.complex64).sum().item()) for member in members]
        for child in self.children():
            if isinstance(child, nn.Linear):
                found.append(str(child(torch.ones(1, 2, dtype=child.weight.dtype)).detach().tolist()))
            for block in child if isinstance(child, nn.ModuleList) else [child]:
                found += block() if isinstance(block, Block) else []
        return found


def pick(draw: st.DrawFn, items: list[Any]) -> Any:
    """One of the items. `sampled_from` would create a strategy at each draw and describe every item."""
    return items[draw(st.integers(0, len(items) - 1))]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(SHAPES)
    count = torch.Size(shape).numel()
    tensor = torch.arange(count, dtype=torch.float64).reshape(shape).to(pick(draw, DTYPES))
    return pick(draw, views(tensor))


def views(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself, and views of it with other offsets, strides and dtypes."""
    found = [tensor, tensor.detach(), tensor.unsqueeze(0).expand(2, *tensor.shape)]
    if tensor.dim() >= 2:
        found.append(tensor.transpose(0, -1))
    if tensor.dim() and tensor.shape[0] > 1:
        found += [tensor[1:], tensor[::2]]
    if tensor.dtype is torch.complex64:
        found += [tensor.conj(), tensor.conj().imag]
    return found


POOLS = st.lists(tensors(), min_size=1, max_size=4)


def pool_of(draw: st.DrawFn) -> list[torch.Tensor]:
    """Tensors that are used several times, and views of them."""
    own = draw(POOLS)
    return own + [pick(draw, views(tensor.detach())) for tensor in own]


def block_of(draw: st.DrawFn, pool: list[torch.Tensor], depth: int = 2) -> nn.Module:
    block = Block()
    floating = [tensor for tensor in pool if tensor.dtype.is_floating_point or tensor.dtype.is_complex]
    parameters = [nn.Parameter(tensor, requires_grad=draw(FLAGS)) for tensor in floating[:3]]
    for name in draw(NAMES):
        kind = draw(st.integers(0, 5))
        if kind == 0 and parameters:
            block.register_parameter(name, pick(draw, parameters))
        elif kind == 1:
            block.register_buffer(name, pick(draw, [*pool, None]), persistent=draw(FLAGS))
        elif kind == 2:
            setattr(block, name, value_of(draw, pool))
        elif kind == 3 and depth:
            setattr(block, name, block_of(draw, pool, depth - 1))
        elif kind == 4:
            setattr(block, name, nn.Linear(2, 3, dtype=pick(draw, [torch.float32, torch.bfloat16])))
        elif depth:
            inner = block_of(draw, pool, depth - 1)
            setattr(block, name, nn.ModuleList([inner, nn.BatchNorm1d(2), inner]))
    return block.train(draw(FLAGS))


def value_of(draw: st.DrawFn, pool: list[Any], depth: int = 3) -> Any:
    """An object of the pool or plain data, alone or in containers."""
    kind = draw(st.integers(0, 4 if depth else 1))
    if kind == 0:
        return pick(draw, pool)
    if kind == 1:
        return draw(PLAIN)
    if kind == 2:
        return [value_of(draw, pool, depth - 1) for _ in range(draw(st.integers(0, 3)))]
    if kind == 3:
        return value_of(draw, pool, depth - 1), value_of(draw, pool, depth - 1)
    return {key: value_of(draw, pool, depth - 1) for key in draw(KEYS)}


@st.composite
def pipelines(draw: st.DrawFn) -> Random:
    pool = pool_of(draw)
    model = block_of(draw, pool)
    mentioned = [*pool, *model.modules()]
    return Random(model, value_of(draw, mentioned), value_of(draw, mentioned), label=draw(LABELS))


@ray.remote
def observed(publication: zerocopy.Publication) -> Any:
    return observe(publication.load())


@CHECKS
@given(pipelines())
def test_what_comes_out_is_what_went_in(pipeline: Random) -> None:
    """A loaded pipeline has the types, identities, storages, bytes, strides, flags and modes of the original in every process."""
    expected = observe(pipeline)
    with zerocopy.publish(pipeline) as publication:
        loaded = publication.load()
        assert not difference(expected, observe(loaded))
        assert list(loaded.model.state_dict()) == list(pipeline.model.state_dict())
        assert loaded.model() == pipeline.model()
        if next(_count) % ELSEWHERE == 0:
            assert not difference(expected, ray.get(observed.remote(publication)))
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):  # compared only if pickle succeeds
        pickled = pickle.loads(pickle.dumps(pipeline))
        assert list(pickled.model.state_dict()) == list(loaded.model.state_dict())
        assert pickled.model() == loaded.model()
        assert (pickled.label, repr(pickled.parts)) == (loaded.label, repr(loaded.parts))


@pytest.mark.long
@CHECKS
@given(pipelines(), st.data())
def test_writes_change_nothing_elsewhere(pipeline: Random, data: st.DataObject) -> None:
    """A write to one load never reaches another load or the original."""
    expected = observe(pipeline)
    with zerocopy.publish(pipeline) as publication:
        written, other = publication.load(), publication.load()
        for tensor in [*written.model.parameters(), *written.model.buffers()]:
            if tensor.numel() and data.draw(FLAGS):
                tensor.data.view(-1)[:1].zero_() if tensor.is_contiguous() else None
                with torch.no_grad(), contextlib.suppress(RuntimeError):  # torch refuses to fill overlapping memory
                    tensor.copy_(torch.ones_like(tensor))
        assert not difference(expected, observe(other))
        assert not difference(expected, observe(publication.load()))
    assert not difference(expected, observe(pipeline))
