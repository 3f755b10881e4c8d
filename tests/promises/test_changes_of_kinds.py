"""Do changes of special tensors arrive: subclasses, TorchScript, arrays, several storages over one memory?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import zerocopy
from zerocopy import shared
from zerocopy._store import object_store

pytestmark = pytest.mark.usefixtures("cluster")
SIDE = 300  # rows and columns of a weight, which is then too large to be compared completely


@zerocopy.pipeline
class Holder:
    """A pipeline with one shared field of any kind."""

    value: Any = shared()


def passed(value: Any) -> Any:
    return ray.get(ray.put(value))


class Scaled(nn.Parameter):
    """A parameter of a subclass."""


class Marked(torch.Tensor):
    """A tensor of a subclass."""


def holding(weight: torch.Tensor) -> nn.Module:
    module = nn.Module()
    if isinstance(weight, nn.Parameter):
        module.weight = weight
    else:
        module.register_buffer("weight", weight)
    return module


SUBCLASSES: dict[str, Callable[[], nn.Module]] = {
    "a parameter": lambda: holding(Scaled(torch.ones(SIDE, SIDE))),
    "a tensor": lambda: holding(torch.ones(SIDE, SIDE).as_subclass(Marked)),
    "a wrapper": lambda: holding(
        nn.Parameter(TwoTensor(torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)), requires_grad=False)
    ),
}
CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "another .data": lambda module: setattr(module.weight, "data", module.weight.data + 1),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "written": lambda module: module.weight.detach().add_(1),
}


def plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.a + 2 * weight.b if isinstance(weight, TwoTensor) else weight.detach().as_subclass(torch.Tensor)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("adopt", [False, True], ids=["in ordinary memory", "adopted"])
def test_changes_of_subclasses_arrive(kind: str, change: str, adopt: bool) -> None:
    """Changes of tensor subclasses, and of the tensors that they wrap, arrive like changes of plain tensors."""
    pipeline = Holder(SUBCLASSES[kind]())
    publication = zerocopy.publish(pipeline, adopt=adopt)
    passed(pipeline)
    CHANGES[change](pipeline.value)
    expected, found = plain(pipeline.value.weight), plain(passed(pipeline).value.weight)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
    publication.close()


PROGRAM_CHANGES: dict[str, Callable[[Any], object]] = {
    "double": lambda program: program.double(),
    "eval": lambda program: program.eval(),
    "another .data": lambda program: setattr(program.inner.weight, "data", program.inner.weight.data + 1),
    "frozen": lambda program: [parameter.requires_grad_(False) for parameter in program.parameters()],
    "a buffer replaced": lambda program: setattr(program, "shift", program.shift + 1),
    "load_state_dict": lambda program: program.load_state_dict(
        {name: tensor + 1 for name, tensor in program.state_dict().items()}
    ),
}


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(SIDE, SIDE)
        self.register_buffer("shift", torch.zeros(SIDE))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.inner(batch) + self.shift


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns about TorchScript
@pytest.mark.parametrize("change", PROGRAM_CHANGES)
def test_changes_of_programs_arrive(change: str) -> None:
    """Changes of the tensors and modes of a TorchScript program arrive, although it has no Python members."""
    pipeline = Holder(torch.jit.script(Scripted()))
    passed(pipeline)
    PROGRAM_CHANGES[change](pipeline.value)
    found, program = passed(pipeline).value, pipeline.value
    assert (found.training, found.inner.weight.requires_grad) == (program.training, program.inner.weight.requires_grad)
    for name, tensor in program.state_dict().items():
        assert found.state_dict()[name].dtype is tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("holder", ["a field", "an attribute of a module"])
def test_another_array_arrives(holder: str) -> None:
    """A new array at the address and with the id of an old array is detected as a change."""
    module = nn.Linear(4, 4)
    pipeline = Holder(np.zeros(SIDE * SIDE) if holder == "a field" else module)
    module.table = np.zeros(SIDE * SIDE)
    for number in range(1, 12):
        passed(pipeline)
        if holder == "a field":
            pipeline.value = None
            pipeline.value = np.zeros(SIDE * SIDE)
            table = pipeline.value
        else:
            module.table = None
            table = module.table = np.zeros(SIDE * SIDE)
        table[12_345] = number
        found = passed(pipeline).value
        assert np.array_equal(found if holder == "a field" else found.table, table)


@pytest.mark.parametrize("twin", ["an array first", "two tensors over an array", "DLPack"])
def test_a_step_over_any_storage_of_a_memory_arrives(twin: str) -> None:
    """A fused optimizer step over one row is detected, also if torch has several storages over the same memory."""
    table = np.ones((1000, 64), np.float32)
    tensor = torch.from_numpy(table)
    other = torch.from_dlpack(tensor) if twin == "DLPack" else torch.from_numpy(table)
    stepped = nn.Embedding.from_pretrained(other, freeze=False)
    first = table if twin == "an array first" else nn.Embedding.from_pretrained(tensor, freeze=False)
    pipeline = Holder([first, stepped])
    passed(pipeline)
    optimizer = torch.optim.Adam(stepped.parameters(), lr=0.1, fused=True)
    stepped(torch.tensor([501])).sum().backward()
    optimizer.step()
    assert torch.equal(passed(pipeline).value[1].weight, stepped.weight)


def test_another_shape_arrives() -> None:
    """A change of shape arrives, also if strides and the number of elements stay the same."""
    pipeline = Holder(nn.Linear(1, 8, bias=False))
    passed(pipeline)
    pipeline.value.weight.data = pipeline.value.weight.data.t()
    assert passed(pipeline).value.weight.shape == (1, 8)


@pytest.mark.parametrize("by_hand", [False, True], ids=["passed", "published"])
def test_a_write_during_publishing_arrives_next_time(by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of another thread after the bytes were read counts as a change."""
    pipeline = Holder(nn.Linear(SIDE, SIDE))
    put = object_store.put

    def put_and_write(value: object) -> Any:
        reference = put(value)
        with torch.no_grad():
            pipeline.value.weight.add_(1)
        return reference

    with monkeypatch.context() as patched:
        patched.setattr(object_store, "put", put_and_write)
        publication = zerocopy.publish(pipeline) if by_hand else passed(pipeline)
    assert torch.equal(passed(pipeline).value.weight, pipeline.value.weight)
    del publication
