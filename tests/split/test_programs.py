"""Are the weights of TorchScript and exported programs in the store only once, and not also in their code?"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import ray
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.filterwarnings("ignore")]  # TorchScript is deprecated
WIDTH = 512
INPUT = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)


class Net(nn.Module):
    """A module with tied weights, a plain tensor attribute, a list of tensors, buffers and a second method."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.rest = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
        self.rest[0].weight = self.first.weight
        self.plain = torch.randn(WIDTH, WIDTH)
        self.many = [torch.randn(WIDTH, WIDTH)]
        self.scale = 3

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(value)) @ self.plain + self.many[0].sum() * self.scale

    @torch.jit.export
    def other(self, value: torch.Tensor) -> torch.Tensor:
        return value @ self.plain


def scripted() -> Any:
    return torch.jit.script(Net().eval())


def traced() -> Any:
    return torch.jit.trace(Net().eval(), INPUT)


def frozen() -> Any:
    return torch.jit.freeze(scripted(), preserved_attrs=["other"])


def reloaded() -> Any:
    return torch.jit.load(io.BytesIO(scripted().save_to_buffer()))


PROGRAMS = {"scripted": scripted, "traced": traced, "frozen": frozen, "loaded from a file": reloaded}


@zerocopy.pipeline
class Pipeline:
    program: Any = shared()
    label: str = copied(default="a")


@ray.remote
def run(publication: zerocopy.Publication) -> tuple[Any, Any, int]:
    from zerocopy.memory import private_bytes

    publication.load().program(INPUT)  # compiled once
    before = private_bytes()
    loaded = publication.load()
    grown = private_bytes() - before
    assert_zero_copy(loaded)
    with torch.inference_mode():
        answers = [loaded.program(INPUT) for _ in range(3)]
        second = loaded.program.other(INPUT) if hasattr(loaded.program, "other") else None
    assert torch.equal(answers[0], answers[2])
    return answers[0].numpy(), second, grown


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_share_their_weights(kind: str) -> None:
    """A program gives the same answers in another process, with all its methods, over views of the store."""
    program = PROGRAMS[kind]()
    pipeline = Pipeline(program)
    expected = program(INPUT)
    publication = zerocopy.publish(pipeline)
    assert torch.equal(program(INPUT), expected), "publishing changed the original"
    found, second, grown = ray.get(run.remote(publication))
    torch.testing.assert_close(torch.tensor(found), expected.detach())
    if second is not None:
        torch.testing.assert_close(second, program.other(INPUT).detach())
    weights = WIDTH * WIDTH * 4
    assert publication.shared_bytes > (2 if kind != "frozen" else 1) * weights
    assert len(publication.content().outer.skeleton.payload) < 5000
    assert grown < weights


def test_isolation_and_ties() -> None:
    """A write in one loaded program is visible in its tied weight, and never reaches another load."""
    program = scripted()
    publication = zerocopy.publish(program)
    one, other = publication.load(), publication.load()
    assert shares_memory(one, other)
    with torch.no_grad():
        one.first.weight.fill_(1)
    assert (dict(one.named_parameters(remove_duplicate=False))["rest.0.weight"] == 1).all()
    assert torch.equal(other.first.weight, program.first.weight)
    assert torch.equal(publication.load()(INPUT), program(INPUT))


def test_found_by_the_automatic_rule_and_published_once() -> None:
    """A program in an undeclared attribute is shared, and passing it again writes nothing until it changes."""

    @zerocopy.pipeline
    class Search:
        def __init__(self) -> None:
            self.programs = {"only": scripted()}

    search = Search()
    (entry,) = (entry for entry in zerocopy.plan(search).entries if entry.policy == "shared")
    count = len(search.programs["only"].state_dict()) + 2  # its plain tensors
    assert (entry.path, entry.tensors, entry.dtypes) == ("search.programs['only']", count, ("float32", "int64"))
    sent = [zerocopy._publish.publish.publish_automatically(search).reference for _ in range(3)]
    assert len(set(sent)) == 1
    with torch.no_grad():
        search.programs["only"].first.bias.add_(1)
    assert zerocopy._publish.publish.publish_automatically(search).reference != sent[0]


def test_parts_and_functions() -> None:
    """`fields=` loads a program with its weights; a scripted function is pickled as its code."""

    @zerocopy.pipeline
    class Search:
        program: Any = shared()
        other: nn.Module = shared()
        function: Callable[[torch.Tensor], torch.Tensor] = copied()

    search = Search(scripted(), nn.Linear(4, 4), torch.jit.script(double))
    publication = zerocopy.publish(search)
    part = publication.load(fields=["program", "function"])
    assert torch.equal(part.program(INPUT), search.program(INPUT))
    assert torch.equal(part.function(INPUT), INPUT * 2)


def double(value: torch.Tensor) -> torch.Tensor:
    return value * 2


class Exported(nn.Module):
    """A module with parameters, a buffer, a non-persistent buffer, a constant and a lifted tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(WIDTH, WIDTH))
        self.register_buffer("hidden", torch.randn(WIDTH, WIDTH), persistent=False)
        self.plain = torch.randn(WIDTH, WIDTH)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.linear(value) @ self.table + (value @ self.plain) @ self.hidden + torch.ones(WIDTH)


@ray.remote
def run_exported(publication: zerocopy.Publication) -> Any:
    loaded = publication.load()
    assert_zero_copy(loaded)
    program = loaded.program if isinstance(loaded, Pipeline) else loaded
    return program.module()(INPUT).detach().numpy(), {name: type(value) for name, value in program.state_dict.items()}


def test_exported_programs() -> None:
    """An exported program, alone and in a pipeline, gives the same results over shared parameters, buffers and constants."""
    model = Exported().eval()
    program = torch.export.export(model, (INPUT,))
    for given in (program, Pipeline(program)):
        publication = zerocopy.publish(given)
        assert publication.shared_bytes >= 4 * WIDTH * WIDTH * 4
        found, types = ray.get(run_exported.remote(publication))
        torch.testing.assert_close(torch.tensor(found), model(INPUT).detach())
        assert types == {name: type(value) for name, value in program.state_dict.items()}


class Constants(nn.Module):
    """A complex buffer, and more small buffers of one shape than their dtype has exact integers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(4, WIDTH // 2), torch.rand(4, WIDTH // 2)))
        for number in range(30):
            self.register_buffer(f"part{number}", torch.full((WIDTH * 2,), float(number)).to(dtype))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_real(torch.view_as_complex(value.reshape(4, -1, 2)) * self.turns).sum()
        return turned + self.part1.float().sum() + 100 * self.part17.float().sum() + 10000 * self.part29.float().sum()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.uint8, torch.bool], ids=str
)
def test_constants_of_every_dtype(dtype: torch.dtype) -> None:
    """A frozen program gets its own constants back, complex ones too, and those of a dtype with few exact integers."""
    program = torch.jit.freeze(torch.jit.script(Constants(dtype).eval()))
    assert torch.equal(zerocopy.publish(program).load()(INPUT), program(INPUT))
