"""On a machine with a GPU, can pipelines be loaded onto it, used and written there, published from there, and freed?"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import wait_until
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy._publish.publish import publish_automatically
from zerocopy._run.reuse import CACHE, CallLoads
from zerocopy._store import uploads
from zerocopy.errors import DeviceError
from zerocopy.memory import private_bytes
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),  # torch warns about TorchScript and nested tensors
]
WIDTH = 1024
WEIGHTS = 2 * 4 * (WIDTH * WIDTH + WIDTH)
INPUT = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)).eval()


@zerocopy.pipeline
class Search:
    """Shared weights, a shared table and array, and copied fields."""

    encoder: nn.Module = shared()
    index: torch.Tensor = shared(factory=lambda: torch.arange(50_000.0))
    numbers: np.ndarray = shared(factory=lambda: np.arange(50_000))
    own: torch.Tensor = copied(factory=lambda: torch.ones(3))
    notes: list[str] = copied(factory=list)


def devices_of(obj: nn.Module) -> set[str]:
    return {str(tensor.device) for tensor in obj.state_dict().values()}


def sums(module: nn.Module) -> list[float]:
    return [float(tensor.double().sum()) for tensor in module.state_dict().values()]


# On the GPU.


def test_a_pipeline_goes_to_the_gpu() -> None:
    """A load on a GPU puts shared and copied tensors there and arrays in main memory; bytes, modes and flags stay the same."""
    encoder = net()
    encoder[1].train()
    encoder[0].weight.requires_grad_(False)
    loaded = zerocopy.publish(Search(encoder)).load(device="cuda")
    assert devices_of(loaded.encoder) == {"cuda:0"}
    assert (loaded.index.device.type, loaded.own.device.type) == ("cuda", "cuda")
    assert type(loaded.numbers) is np.ndarray
    assert (loaded.numbers == np.arange(50_000)).all()
    loaded.numbers[0] = 7
    for (name, ours), theirs in zip(loaded.encoder.named_parameters(), encoder.parameters(), strict=True):
        assert type(ours) is nn.Parameter
        assert torch.equal(ours.cpu(), theirs), name
        assert ours.requires_grad == theirs.requires_grad, name
    assert [m.training for m in loaded.encoder.modules()] == [m.training for m in encoder.modules()]
    assert torch.equal(loaded.index.cpu(), torch.arange(50_000.0))


def test_it_answers_as_one_that_was_moved() -> None:
    """A transformer loaded on a GPU gives the same bits as the original after `.cuda()`."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
    original = nn.TransformerEncoder(layer, 6).eval()
    tokens = torch.randn(8, 64, 384, device="cuda")
    loaded = zerocopy.publish(original).load(device="cuda")
    with torch.inference_mode():
        assert torch.equal(loaded(tokens), original.cuda()(tokens))


def test_large_weights_are_copied_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads copy large weights in pieces, on the CUDA stream of the caller; the last piece of a tensor may be smaller."""
    monkeypatch.setattr(uploads, "LEAST", 1)
    monkeypatch.setattr(uploads, "PIECE", 100_000)
    tensors = [torch.randn(size) for size in (1, 333, 24_999, 25_000, 25_001, 1_000_003)]
    publication = zerocopy.publish(nn.ParameterList(tensors))
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        loaded = publication.load(device="cuda")
    assert not any(ours.is_inference() for ours in loaded)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(loaded, tensors, strict=True))


def test_ties_and_views() -> None:
    """Tensors that share memory also share it on the GPU, so a write to one is visible in the other."""
    module = net()
    module[2].weight = module[0].weight
    module.register_buffer("view", module[0].weight.detach()[2:5].t())
    loaded = zerocopy.publish(module).load(device="cuda")
    assert loaded[2].weight is loaded[0].weight
    assert loaded.view.stride() == module.view.stride()
    loaded.view.fill_(7)
    assert (loaded[0].weight[2:5] == 7).all()
    assert not (loaded[0].weight[0] == 7).any()


def scripted() -> Any:
    return torch.jit.script(net())


PROGRAMS: dict[str, Callable[[], Any]] = {
    "scripted": scripted,
    "traced": lambda: torch.jit.trace(net(), INPUT),
    "frozen": lambda: torch.jit.freeze(scripted()),
    "exported": lambda: torch.export.export(net(), (INPUT,)),
}


def run_program(program: Any, value: torch.Tensor) -> torch.Tensor:
    return (program.module() if isinstance(program, torch.export.ExportedProgram) else program)(value).detach()


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs(kind: str) -> None:
    """A program that was made on the CPU runs on the GPU."""
    program = PROGRAMS[kind]()
    loaded = zerocopy.publish(program).load(device="cuda")
    found = run_program(loaded, INPUT.cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), run_program(program, INPUT), rtol=1e-3, atol=1e-3)


def test_what_torch_packs_stays_in_main_memory() -> None:
    """Modules with packed weights stay in main memory, as in torch: on a GPU torch would end the process."""
    original = nn.ModuleList(
        [torch.ao.nn.quantized.Conv2d(3, 64, 3), torch.ao.nn.quantized.Linear(64, 64), nn.Linear(9, 9)]
    )
    loaded = zerocopy.publish(original).load(device="cuda")
    for ours, theirs in zip(loaded[:2], original[:2], strict=True):
        assert torch.equal(ours.weight().int_repr(), theirs.weight().int_repr())
    assert devices_of(loaded[2]) == {"cuda:0"}


def test_devices_of_fields() -> None:
    """A field's own device has priority; `fields=` can load onto a GPU; `cuda` and `cuda:0` are one device."""

    @zerocopy.pipeline
    class Split:
        encoder: nn.Module = shared(device="cuda")
        index: torch.Tensor = shared()
        table: torch.Tensor = shared(device="cpu")

    encoder = net()
    publication = zerocopy.publish(Split(encoder, torch.ones(100), torch.ones(100)))
    for device, index in ((None, "cpu"), ("cuda", "cuda:0")):
        loaded = publication.load(device=device)
        assert devices_of(loaded.encoder) == {"cuda:0"}
        assert (str(loaded.index.device), str(loaded.table.device)) == (index, "cpu")
    part = publication.load(device="cuda", fields=["index"])
    assert str(part.index.device) == "cuda:0"
    with pytest.raises(AttributeError, match="fields"):
        part.encoder
    tied = zerocopy.publish(Split(encoder, encoder[0].weight.detach(), torch.ones(100))).load(device="cuda:0")
    assert tied.index.data_ptr() == tied.encoder[0].weight.data_ptr()


@pytest.mark.parametrize("name", ["cuda:7", torch.device("cuda", 7)], ids=str)
def test_a_gpu_that_is_not_there(name: Any) -> None:
    """A missing GPU is an error that names it, and the process can continue to use its other devices."""
    publication = zerocopy.publish(Search(net()))
    with pytest.raises(DeviceError, match="This process has no device 'cuda:7': .*ask Ray for a GPU with num_gpus=1"):
        publication.load(device=name)
    assert devices_of(publication.load(device="cuda").encoder) == {"cuda:0"}


# Memory of a load.


def plasma_maps() -> list[str]:
    """Private mappings of the store in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "plasma" in line and line.split()[1].endswith("p")]


def test_nothing_is_left_behind(store_use: Callable[[], int]) -> None:
    """A load on a GPU copies no page in main memory, leaves no mapping, and frees GPU and store when it is dropped."""
    torch.zeros(1, device="cuda")
    publication = zerocopy.publish(net())
    publication.load(device="cuda")
    gc.collect()
    gpu, maps, private = torch.cuda.memory_allocated(), len(plasma_maps()), private_bytes()
    loaded = publication.load(device="cuda")
    assert WEIGHTS <= torch.cuda.memory_allocated() - gpu < 1.1 * WEIGHTS
    assert len(plasma_maps()) == maps
    assert private_bytes() - private < WEIGHTS / 4
    publication.close()
    assert not wait_until(lambda: store_use() < WEIGHTS / 2, seconds=1), (
        "a loaded pipeline keeps its weights, as everywhere"
    )
    zerocopy.unshare(loaded)
    assert wait_until(lambda: store_use() < WEIGHTS / 2)
    assert float(loaded[0].weight.double().sum()) == float(net()[0].weight.double().sum())
    del loaded
    gc.collect()
    assert torch.cuda.memory_allocated() <= gpu


def test_reports() -> None:
    """`assert_zero_copy` reports tensors on a GPU, because they are not views of the store; memory reports count main memory."""
    publication = zerocopy.publish(net())
    one, other = publication.load(device="cuda"), publication.load(device="cuda")
    with pytest.raises(
        AssertionError, match=r"sequential\[0\].weight is not a view of the object store: it is on cuda:0"
    ):
        assert_zero_copy(one)
    assert shares_memory(one, one)
    assert not shares_memory(one, other)
    assert "this process" in str(zerocopy.memory_report())


# In tasks and actors.


@zerocopy.task(device="auto")
def where(model: Any) -> tuple[str, bool]:
    return str(model[0].weight.device), torch.cuda.is_available()


@zerocopy.actor(device="auto")
class Automatic:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def where(self) -> set[str]:
        return devices_of(self.model)


def test_auto() -> None:
    """`auto` is the GPU, or part of a GPU, that Ray assigned to the task or actor; without a GPU it is the CPU."""
    publication = zerocopy.publish(net())
    assert where(publication)[0] == "cpu"
    assert where.options(num_gpus=0.25)(publication)[0] == "cuda:0"
    assert where.options(num_gpus=1)(publication)[0] == "cuda:0"
    for options, expected in (({}, "cpu"), ({"num_gpus": 0.25}, "cuda:0")):
        actor = Automatic.options(num_cpus=0.1, **options).remote(publication)
        assert ray.get(actor.where.remote()) == {expected}
        ray.kill(actor)


@zerocopy.actor(device="cuda", num_gpus=0.25, num_cpus=0.1)
class Worker:
    """One of several actors on a GPU."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def sums(self) -> tuple[set[str], list[float]]:
        return devices_of(self.search.encoder), sums(self.search.encoder)

    def write(self) -> None:
        for tensor in self.search.encoder.state_dict().values():
            tensor.zero_()

    def train(self) -> None:
        optimizer = torch.optim.AdamW(self.search.encoder.parameters(), lr=0.1, fused=True)
        self.search.encoder.train()(INPUT.cuda()).square().sum().backward()
        optimizer.step()


def test_actors_on_one_gpu_are_isolated() -> None:
    """A write of one actor on a GPU never reaches other actors on this GPU, the store or the publisher."""
    search = Search(net())
    publication = zerocopy.publish(search)
    before = sums(publication.load().encoder)
    with Worker.pool(3, publication) as pool:
        first, second, _ = pool.actors
        untouched = ray.get([actor.sums.remote() for actor in pool.actors])
        ray.get([first.write.remote(), second.train.remote()])
        written = ray.get([actor.sums.remote() for actor in pool.actors])
    assert [devices for devices, _ in untouched] == [{"cuda:0"}] * 3
    assert untouched[0] == untouched[1] == untouched[2] == written[2]
    assert not any(written[0][1])
    assert written[1] != untouched[1]
    assert sums(publication.load().encoder) == sums(search.encoder) == before


@zerocopy.task(device="cuda", num_gpus=0.25, max_calls=0)
def kept(model: nn.Module, change: Callable[[Any], Any] | None = None) -> tuple[int, int, list[float]]:
    """Ray ends the worker of a GPU's task after each call, unless `max_calls` is 0."""
    found = os.getpid(), model[0].weight.data_ptr(), sums(model)
    if change is not None:
        change(model)
    return found


@zerocopy.task(device="cuda", num_gpus=0.25)
def ordinary(model: nn.Module) -> tuple[int, list[float]]:
    return os.getpid(), sums(model)


@zerocopy.task(device="cuda", num_gpus=0.25, max_calls=0, reuse=False)
def fresh(model: nn.Module) -> list[float]:
    found = sums(model)
    model[0].weight.data.zero_()
    return found


def write(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.add_(1)


def test_tasks_on_a_gpu() -> None:
    """Tasks can use a part of a GPU; if the worker stays alive, later calls reuse its load unless a call wrote to it."""
    publication = zerocopy.publish(net())
    expected = sums(publication.load(device="cuda"))
    assert len({ordinary(publication)[0] for _ in range(2)}) == 2
    assert ordinary(publication)[1] == expected
    calls = [kept(publication) for _ in range(8)]
    assert len({(pid, place) for pid, place, _ in calls}) <= 4
    calls += [kept(publication, write) for _ in range(4)]
    calls += ray.get([kept.remote(publication, write) for _ in range(8)])
    assert all(found == expected for _, _, found in calls)
    assert [fresh(publication) for _ in range(3)] == [expected] * 3


def step(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.train()(INPUT.cuda()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a write": write,
    "a write to a view": lambda model: model[0].weight.detach()[0].fill_(1),
    "a fused step": step,
    "a batch norm that counts": lambda model: (model.train()(INPUT.cuda()), model.eval()),
    "a parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(WIDTH, WIDTH, device="cuda"))),
    "the CPU": lambda model: model.cpu(),
    "half precision": lambda model: model.half(),
}


@pytest.fixture
def reused() -> Iterator[Callable[..., Any]]:
    """Runs calls in this process like the calls of a task in its worker."""

    def call(publication: zerocopy.Publication, function: Callable[[Any], Any]) -> Any:
        loads = CallLoads()
        result = function(loads.load(publication, "cuda"))
        loads.release()
        return result

    yield call
    with CACHE._lock:
        CACHE._entries.clear()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_stays_in_its_call(reused: Callable[..., Any], change: str) -> None:
    """A later call in the same process does not see what an earlier call wrote on the GPU."""
    publication = zerocopy.publish(net())
    before = reused(publication, sums)
    for _ in range(3):
        reused(publication, CHANGES[change])
        assert reused(publication, sums) == before


def test_loads_are_reused_and_evicted(reused: Callable[..., Any]) -> None:
    """Calls use at most two loads in turn; some time after the last call, the GPU memory is free again."""
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    publication = zerocopy.publish(net())
    places = {reused(publication, lambda model: model[0].weight.data_ptr()) for _ in range(8)}
    assert len(places) <= 2
    assert torch.cuda.memory_allocated() - before < 2.2 * WEIGHTS  # memory of earlier tests may be freed meanwhile
    assert wait_until(lambda: torch.cuda.memory_allocated() <= before, seconds=10)
    assert wait_until(lambda: torch.cuda.memory_reserved() <= reserved, seconds=3)


# From the GPU.


@zerocopy.task
def on_the_cpu(search: Any) -> tuple[set[str], list[float]]:
    encoder = search.encoder if isinstance(search, Search) else search
    return devices_of(encoder), sums(encoder)


def test_published_from_the_gpu() -> None:
    """A pipeline on a GPU can be published; without `device` it is loaded on the CPU, also in workers without a GPU."""
    original = net()
    search = Search(net().cuda(), index=torch.ones(5000, device="cuda").expand(3, 5000))
    for adopt in (False, True):
        publication = zerocopy.publish(search, adopt=adopt)
        loaded, moved = publication.load(), publication.load(device="cuda")
        assert_zero_copy(loaded)
        for ours, there, theirs in zip(
            loaded.encoder.parameters(), moved.encoder.parameters(), original.parameters(), strict=True
        ):
            assert ours.device.type == "cpu"
            assert there.device.type == "cuda"
            assert torch.equal(ours, theirs)
            assert torch.equal(there.cpu(), theirs)
        assert loaded.index.stride() == (0, 1)
        assert loaded.own.device.type == "cpu"
        assert devices_of(search.encoder) == {"cuda:0"}
    assert on_the_cpu(publication) == on_the_cpu(search) == ({"cpu"}, sums(original))


@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_from_the_gpu(kind: str) -> None:
    """A published program that was made on a GPU runs on the GPU and on the CPU."""
    moved, value = net().cuda(), INPUT.cuda()
    program: Any = {
        "scripted": lambda: torch.jit.script(moved),
        "traced": lambda: torch.jit.trace(moved, value),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(moved)),
        "exported": lambda: torch.export.export(moved, (value,)),
    }[kind]()
    publication = zerocopy.publish(program)
    expected = run_program(program, value)
    torch.testing.assert_close(run_program(publication.load(device="cuda"), value), expected)
    found = run_program(publication.load(), INPUT)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected.cpu(), rtol=1e-3, atol=1e-3)


def test_changes_on_the_gpu(publishings: list[int]) -> None:
    """An unchanged pipeline is published once; writes and optimizer steps are detected, and writes to `.data` by `publish`."""
    search = Search(net().cuda())
    first = publish_automatically(search).reference
    assert publish_automatically(search).reference == first
    assert len(publishings) == 1
    write(search.encoder)
    second = publish_automatically(search)
    assert second.reference != first
    assert publishings[1:] == [1]
    assert sums(second.load(device="cuda").encoder) == sums(search.encoder)
    step(search.encoder)
    third = publish_automatically(search)
    assert sums(third.load(device="cuda").encoder) == sums(search.encoder)
    search.encoder[2].weight.data.mul_(2)
    assert sums(zerocopy.publish(search).load(device="cuda").encoder) == sums(search.encoder)


def test_a_loaded_pipeline_is_passed_on() -> None:
    """A pipeline that was loaded onto a GPU and written there arrives in another process with these writes."""
    loaded = zerocopy.publish(Search(net())).load(device="cuda")
    assert on_the_cpu(loaded) == ({"cpu"}, sums(net()))
    write(loaded.encoder)
    assert on_the_cpu(loaded) == ({"cpu"}, sums(loaded.encoder.cpu()))
