"""Do task calls reuse a load of their worker process, unless the load was changed or something still refers to it?"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import ray
import torch
from conftest import wait_until
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy._changes.kept import Kept
from zerocopy._run.reuse import CACHE, CallLoads, Event, Limits, LoadCache, State, next_state

pytestmark = pytest.mark.usefixtures("cluster")

WIDTH = 600


def modules() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)).eval()


@zerocopy.pipeline
class Search:
    encoder: nn.Module = shared()
    notes: list[str] = copied(factory=list)
    index: Any = shared(default=None)


@zerocopy.task
def place(model: Any) -> int:
    """The address of a loaded weight: each load has its own mapping."""
    return (model.encoder if isinstance(model, Search) else model)[0].weight.data_ptr()


@zerocopy.task(reuse=False)
def fresh_place(model: nn.Module) -> int:
    return model[0].weight.data_ptr()


@zerocopy.task
def apply(model: nn.Module, change: Callable[[Any], Any]) -> None:
    change(model)


@zerocopy.task
def look(model: nn.Module) -> Any:
    first = model[0]
    flags = (
        [(type(module), module.training) for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    hooks = [len(module._forward_hooks) for module in model]
    extra = len(model), len(list(model.buffers())), hooks, getattr(first, "scale", None)
    weights = [float(tensor.detach().double().sum()) for tensor in model.state_dict().values()]
    return flags, extra, weights, first.weight.grad is None


@zerocopy.task
def nested(model: nn.Module, publication: list[Any]) -> tuple[int, int]:
    return model[0].weight.data_ptr(), place(publication[0])


@zerocopy.task
def note(search: Search) -> list[str]:
    search.notes.append("seen")
    return search.notes


@zerocopy.task
def fail(model: nn.Module) -> None:
    raise ValueError("no")


@zerocopy.task
def write_index(search: Search) -> float:
    search.index[0] += 1
    return float(search.index[0])


escaped: list[Any] = []


@ray.remote(num_cpus=0.1)
class Process:
    """One actor process that runs task calls in itself. Ray pickles actor classes by value, with their globals."""

    def call(self, task: Any, *arguments: Any) -> Any:
        return task(*arguments)

    def kept(self) -> int:
        from zerocopy._run import reuse

        return len(reuse.CACHE._entries)

    def keep_for(self, seconds: float) -> None:
        from zerocopy._run import reuse

        reuse.CACHE.limits = attrs.evolve(reuse.CACHE.limits, idle_seconds=seconds)

    def escaped_sum(self) -> float:
        import test_reuse

        return float(test_reuse.escaped[0].weight.detach().sum())


@pytest.fixture(scope="module")
def process(cluster: None) -> Any:
    process = Process.remote()
    ray.get(process.keep_for.remote(600))  # long enough for a slow machine
    return process


@pytest.fixture(scope="module")
def empty_process(cluster: None) -> Any:
    """A process that keeps no loads before and after each test that uses it."""
    return Process.remote()


def call(process: Any, task: Any, *arguments: Any) -> Any:
    return ray.get(process.call.remote(task, *arguments))


def test_calls_reuse_one_load(process: Any) -> None:
    """Calls in one process use at most two loads in turn; with `reuse=False` each call has its own."""
    publication = zerocopy.publish(modules())
    places = {call(process, place, publication) for _ in range(8)}
    assert len(places) <= 2
    assert call(process, fresh_place, publication) not in places


def test_ray_tasks_reuse_too() -> None:
    """Calls that run as Ray tasks also reuse loads, for publications, modules and pipelines."""
    module, search = modules(), Search(modules())
    for given in (zerocopy.publish(module), module, search):
        places = [place(given) for _ in range(12)]
        assert len(set(places)) < 6


def write(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.add_(1)


def keep(module: nn.Module, args: object, output: object) -> None: ...


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a write": write,
    "a write to a view": lambda model: model[0].weight.detach()[0].fill_(1),
    "a batch norm that counts": lambda model: model.train()(torch.randn(4, WIDTH)),
    "a mode": lambda model: model[2].train(),
    "requires_grad": lambda model: model[0].weight.requires_grad_(False),
    "a gradient": lambda model: model[0](torch.ones(1, WIDTH)).sum().backward(),
    "a parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(WIDTH, WIDTH))),
    "a child": lambda model: model.append(nn.ReLU()),
    "a buffer": lambda model: model.register_buffer("more", torch.ones(3)),
    "a hook": lambda model: model[0].register_forward_hook(print),
    "a hook that goes": lambda model: model[2]._forward_hooks.clear(),
    "an attribute": lambda model: setattr(model[0], "scale", 3.0),
    "a class": lambda model: setattr(model[0], "__class__", nn.Bilinear),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_stays_in_its_call(process: Any, change: str) -> None:
    """A change that a call makes never reaches the next call in the same process."""
    model = modules()
    model[2].register_forward_hook(keep)
    publication = zerocopy.publish(model)
    before = call(process, look, publication)
    call(process, apply, publication, CHANGES[change])
    assert [call(process, look, publication) for _ in range(3)] == [before] * 3  # loads take turns


def test_what_escapes_is_not_used_again(process: Any) -> None:
    """A module that a call has stored somewhere is not reused in later calls."""
    publication = zerocopy.publish(modules())

    def keep(model: Any) -> None:
        import test_reuse

        test_reuse.escaped[:] = [model[0]]

    call(process, apply, publication, keep)
    total = ray.get(process.escaped_sum.remote())
    call(process, apply, publication, write)
    assert ray.get(process.escaped_sum.remote()) == total


def test_one_call_at_a_time(process: Any) -> None:
    """A call inside another call has its own load."""
    publication = zerocopy.publish(modules())
    outer, inner = call(process, nested, publication, [publication])
    assert outer != inner


def test_a_load_in_use_is_not_validated() -> None:
    """A change that a call makes is detected, also if the process validates its loads during the call."""
    publication = zerocopy.publish(modules())
    before = float(publication.load()[0].weight.detach().sum())
    loads = CallLoads()
    reference = weakref.ref(loads.load(publication, None))  # now no strong reference to the model is visible
    CACHE.validate()
    for entry in loads._entries:
        with pytest.raises(RuntimeError, match="IN_USE cannot be CHECK_STARTED"):
            entry.note(Event.CHECK_STARTED)
    write(reference())
    loads.release()
    again = CallLoads().load(publication, None)
    assert float(again[0].weight.detach().sum()) == before


def test_what_is_kept_is_unchanged_until_written_or_held() -> None:
    """A load counts as changed until it is recorded, while other code refers to a part of it, and after a write."""
    roots = [modules()]
    kept = Kept(roots, roots[0].parameters())
    assert not kept.is_unchanged()
    kept.record()
    assert kept.is_unchanged()
    held = roots[0][0].weight
    assert not kept.is_unchanged()
    del held
    assert kept.is_unchanged()
    write(roots[0])
    assert not kept.is_unchanged()


def test_states_follow_one_another() -> None:
    """Six pairs of a state and an event are allowed; any other pair raises an error."""
    possible = {}
    for state in State:
        for event in Event:
            try:
                possible[state.name, event.name] = next_state(state, event).name
            except RuntimeError:
                continue
    assert possible == {
        ("NEW", "JOINED"): "IN_USE",
        ("IN_USE", "RELEASED"): "UNCHECKED",
        ("UNCHECKED", "CHECK_STARTED"): "CHECKING",
        ("CHECKING", "FOUND_UNCHANGED"): "UNCHANGED",
        ("CHECKING", "FOUND_CHANGED"): "CHANGED",
        ("UNCHANGED", "ACQUIRED"): "IN_USE",
    }


def test_a_cache_keeps_to_its_limits() -> None:
    """A cache keeps at most the publications and copies of its limits, and evicts them when they are idle."""
    cache = LoadCache(Limits(publications=2, copies=1, idle_seconds=0.2))
    for publication in [zerocopy.publish(modules()) for _ in range(3)]:
        calls = [CallLoads(cache), CallLoads(cache)]
        for loads in calls:
            loads.load(publication, None)
        for loads in calls:
            loads.release()
    assert [len(copies) for copies in cache._entries.values()] == [1, 1]
    assert wait_until(lambda: not cache._entries, seconds=5)


def test_an_error_keeps_nothing(empty_process: Any) -> None:
    """The loads of a call that failed are not kept."""
    with pytest.raises(ValueError, match="no"):
        call(empty_process, fail, zerocopy.publish(modules()))
    assert ray.get(empty_process.kept.remote()) == 0


def test_copied_fields_are_fresh(process: Any) -> None:
    """Copied fields are fresh in every call, also if the shared part is reused."""
    publication = zerocopy.publish(Search(modules()))
    assert [call(process, note, publication) for _ in range(3)] == [["seen"]] * 3
    assert len({call(process, place, publication) for _ in range(6)}) <= 2


def test_arrays_are_loaded_afresh(process: Any) -> None:
    """A pipeline with a shared NumPy array is loaded for each call, because no version counter shows a write to the array."""
    publication = zerocopy.publish(Search(modules(), index=np.zeros(100_000)))
    assert [call(process, write_index, publication) for _ in range(3)] == [1.0] * 3


def test_a_worker_keeps_few_and_not_for_long(empty_process: Any, store_use: Callable[[], int]) -> None:
    """A worker keeps loads of four publications at most, and frees those of a closed publication after a while."""
    process = empty_process
    ray.get(process.keep_for.remote(60.0))  # longer than a busy machine needs for the calls
    publications = [zerocopy.publish(modules()) for _ in range(6)]
    for publication in publications:
        call(process, place, publication)
    assert 0 < ray.get(process.kept.remote()) <= 4
    assert store_use() > 6 * 4 * WIDTH * WIDTH
    ray.get(process.keep_for.remote(0.1))
    for publication in publications:
        publication.close()
    assert wait_until(lambda: store_use() < 100_000)
    assert ray.get(process.kept.remote()) == 0
