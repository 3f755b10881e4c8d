"""Do functions and methods run as Ray tasks, in every way to call them?"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipelines
import pytest
import ray
import torch
from conftest import CPUS, run_python, wait_until
from torch import nn

import zerocopy
from zerocopy.errors import ArgumentError, CannotTravelError, PublicationLostError
from zerocopy.testing import assert_zero_copy

pytestmark = pytest.mark.usefixtures("cluster")


def test_every_way_to_call() -> None:
    """Direct calls, `remote`, `options`, `map` and `local` give the same answer, for an instance and for a publication."""
    search = pipelines.search(width=32)
    expected = search(2.0)
    for given in (search, zerocopy.publish(search)):
        assert pipelines.answer(given, 2.0) == expected
        assert ray.get(pipelines.answer.remote(given, query=2.0)) == expected
        assert pipelines.answer.options(num_cpus=2, name="other")(given, 2.0) == expected
        assert list(pipelines.answer.map(given, [2.0, 2.0])) == [expected] * 2
        assert pipelines.answer.local(given, 2.0) == expected


def test_runs_elsewhere_with_shared_weights() -> None:
    """A call runs in another process, where the pipeline is a view of the store."""

    @zerocopy.task
    def look(pipeline: pipelines.Search, module: nn.Module) -> int:
        assert_zero_copy(pipeline)
        assert_zero_copy(module)
        return os.getpid()

    assert look(pipelines.search(width=32), pipelines.encoder(32)) != os.getpid()


def test_metadata_survives() -> None:
    """A task keeps the name, docstring and signature of its function or method."""
    assert pipelines.answer.__name__ == "answer"
    assert pipelines.answer.__doc__ == "Answer a query."
    assert str(inspect.signature(pipelines.answer)) == "(pipeline: 'Search', query: 'float') -> 'float'"
    search = pipelines.search(width=8)
    assert str(inspect.signature(search.rank)) == "(query: 'float', scale: 'float' = 1.0) -> 'float'"
    assert search.rank.__doc__ == "Rank remotely."


def test_methods() -> None:
    """A method runs remotely with `self` loaded, also an inherited method and one that calls `super()`."""
    search = pipelines.search(width=32)
    assert search.rank(2.0, scale=2.0) == 2 * search(2.0)
    assert ray.get(search.rank.remote(2.0)) == pipelines.Search.rank(search, 2.0) == search(2.0)
    assert list(search.rank.map([1.0, 2.0])) == [search(1.0), search(2.0)]
    assert search.rank.options(num_cpus=2)(2.0) == search.rank.local(2.0) == search(2.0)
    remote, inner = search.where()
    assert remote == inner != os.getpid()
    narrow = pipelines.search(width=32, cls=pipelines.Narrow)
    assert narrow.rank(2.0) == narrow(2.0) == -search(2.0)


def test_inside_a_worker_calls_run_in_place() -> None:
    """Recursion and calls between tasks need no second worker, so they cannot wait for each other."""
    assert pipelines.factorial(20) == 2432902008176640000

    @zerocopy.task
    def outer(publication: Any) -> tuple[int, int, float]:
        return os.getpid(), where(), pipelines.answer(publication, 1.0)

    search = pipelines.search(width=8)
    outer_pid, inner_pid, value = outer(search)
    assert outer_pid == inner_pid
    assert value == search(1.0)


@zerocopy.task
def where() -> int:
    return os.getpid()


@zerocopy.task
def schedule() -> tuple[int, int]:
    return os.getpid(), ray.get(where.remote())


def test_references_inside_a_worker() -> None:
    """A direct call inside a worker resolves references, like a remote call."""

    @zerocopy.task
    def outer(value: int) -> int:
        return add_one(ray.put(value))

    @zerocopy.task
    def add_one(value: int) -> int:
        return value + 1

    assert outer(1) == 2


def test_defaults_of_pipeline_arguments() -> None:
    """The default of an argument is always accepted, for every annotation."""

    @zerocopy.task
    def optional(query: float, pipeline: pipelines.Search = None) -> bool:  # type: ignore[assignment]
        return pipeline is None

    assert optional(1.0)
    assert optional(1.0, pipeline=None)


def test_remote_always_schedules() -> None:
    """`.remote()` inside a worker runs in another process."""
    outer, inner = schedule()
    assert outer != inner


def test_generators() -> None:
    """A direct call of a generator function returns Ray's generator of references."""
    search = pipelines.search(width=8)
    results = pipelines.stream(search, 3)
    assert isinstance(results, ray.ObjectRefGenerator)
    assert [ray.get(ref) for ref in results] == [search(number) for number in range(3)]
    assert list(pipelines.stream.local(search, 2)) == [search(0), search(1)]


def test_several_results() -> None:
    """With Ray's `num_returns` a call returns that many results."""

    @zerocopy.task(num_returns=2)
    def split(value: str) -> list[str]:
        return value.split()

    assert ray.get(split.remote("left right")) == ["left", "right"] == split("left right")


def test_map_is_lazy_ordered_and_bounded() -> None:
    """`map` takes items only when results are requested, and at most `max_in_flight` items ahead."""
    taken: list[int] = []

    def items() -> Iterator[float]:
        for number in range(12):
            taken.append(number)
            yield float(number)

    @zerocopy.task
    def slow_first(scale: int, number: float) -> float:
        time.sleep(0.3 if number == 0 else 0)
        return number * scale

    results = slow_first.map(10, items(), max_in_flight=3)
    assert taken == []
    assert next(results) == 0.0
    assert len(taken) == 4
    assert list(results) == [10.0 * number for number in range(1, 12)]


def test_map_shows_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A progress bar counts results on a terminal; other outputs show nothing."""
    search = pipelines.search(width=8)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    list(pipelines.answer.map(search, [1.0, 2.0, 3.0]))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    list(pipelines.answer.map(search, [1.0, 2.0, 3.0]))
    shown = capsys.readouterr().err
    assert "answer" in shown
    assert "3/3" in shown
    list(pipelines.answer.map(search, [1.0, 2.0, 3.0], progress=False))
    assert capsys.readouterr().err == ""


def test_map_stops_at_the_first_error(tmp_path: Path) -> None:
    """`map` raises the first error and cancels the calls that still run or wait."""

    @zerocopy.task(num_cpus=CPUS, max_retries=0)  # one call at a time
    def fail_at_two(number: int) -> int:
        if number == 2:
            raise KeyError("two")
        time.sleep(4 if number > 2 else 0)
        (tmp_path / str(number)).touch()
        return number

    results = fail_at_two.map(range(8), max_in_flight=6)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(results)
    assert ray.get(where.options(num_cpus=CPUS).remote())
    assert len(list(tmp_path.iterdir())) <= 2 + 1, "one more may have been running"


def test_map_over_pipelines_and_several_results() -> None:
    """`map` takes pipelines as items and tasks with several results, but no generator functions."""
    searches = [pipelines.search(width=8, top_k=number) for number in range(3)]

    @zerocopy.task
    def top_k(pipeline: pipelines.Search) -> int:
        return pipeline.top_k

    assert list(top_k.map(searches)) == [0, 1, 2]

    @zerocopy.task(num_returns=2, max_retries=0)
    def split(text: str) -> list[str]:
        left, right = text.split()
        return [left, right]

    assert list(split.map(["a b", "c d"])) == [["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match="not enough values"):
        list(split.map(["a b", "broken", "c d", "e f"]))
    with pytest.raises(ArgumentError, match="stream is a generator function"):
        pipelines.stream.map(searches[0], [1, 2])


def test_copied_fields_are_fresh_in_every_call() -> None:
    """A change that one call makes to its pipeline never reaches the next call."""

    @zerocopy.task
    def spoil(pipeline: pipelines.Search) -> tuple[dict[str, Any], float]:
        before = dict(pipeline.settings), float(pipeline.encoder[0].bias.detach().sum())
        pipeline.settings["spoiled"] = True
        with torch.no_grad():
            pipeline.encoder[0].bias.fill_(100)
        return before

    publication = zerocopy.publish(pipelines.search(width=8))
    first = spoil(publication)
    assert [spoil(publication) for _ in range(4)] == [first] * 4


def test_errors_keep_their_class() -> None:
    """An error of the function, or of a load in the worker, can be caught by its class."""

    @zerocopy.task(max_retries=0)
    def divide(pipeline: pipelines.Search, by: int) -> float:
        return 1 / by

    search = pipelines.search(width=8)
    with pytest.raises(ZeroDivisionError):
        divide(search, 0)

    @ray.remote
    def publish_and_end() -> tuple[zerocopy.Publication, int]:
        import threading

        publication = zerocopy.publish(pipelines.search(width=8))
        threading.Timer(0.5, os._exit, [0]).start()
        return publication, os.getpid()

    lost, pid = ray.get(publish_and_end.remote())
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists())
    time.sleep(4)  # until Ray notices the end: Ray 2.60 needs less than 1 s, Ray 2.53 needs more
    with pytest.raises(PublicationLostError, match="the process that published them ended"):
        divide(lost, 1)
    with pytest.raises(PublicationLostError):
        lost.load()


def test_local_copies_as_a_remote_call_would() -> None:
    """`local` runs in this process and, like a remote call, does not change the caller's arguments."""

    @zerocopy.task
    def change(pipeline: pipelines.Search, items: list[int]) -> tuple[int, list[int]]:
        pipeline.settings["changed"] = True
        items.append(1)
        return os.getpid(), items

    search, items = pipelines.search(width=8), [0]
    assert change.local(search, items) == (os.getpid(), [0, 1])
    assert (search.settings, items) == ({"mode": "exact"}, [0])


def test_references_as_arguments() -> None:
    """Object references as arguments are resolved, as in Ray."""
    search = pipelines.search(width=8)
    assert pipelines.answer(search, ray.put(2.0)) == search(2.0)
    assert pipelines.answer.local(search, ray.put(2.0)) == search(2.0)


def test_tasks_as_values() -> None:
    """A task or a bound task method can be an argument, and can be called in the worker."""

    @ray.remote
    def call(function: Callable[..., float], *args: Any) -> float:
        return function(*args)

    search = pipelines.search(width=8)
    assert ray.get(call.remote(pipelines.factorial, 5)) == 120
    assert ray.get(call.remote(search.rank, 2.0)) == search(2.0)

    @zerocopy.task
    def local(number: float) -> float:
        return number + 1

    assert ray.get(call.remote(local, 2.0)) == 3.0


def test_local_functions_with_closures() -> None:
    """A task defined inside a function works with variables and remote functions of that function."""
    offset = 10

    @ray.remote
    def double(number: int) -> int:
        return 2 * number

    @zerocopy.task
    def outer(number: int) -> int:
        return ray.get(double.remote(number)) + offset + (outer(number - 1) if number else 0)

    assert outer(2) == 4 + 2 + 0 + 30


def test_annotations_for_type_checkers_only() -> None:
    """An annotation with a name that exists only under TYPE_CHECKING is not checked; other annotations are."""
    assert pipelines.annotated_for_type_checkers(1, nn.Linear(1, 1)) == "Linear"
    with pytest.raises(ArgumentError, match="expects torch.nn.modules.module.Module for 'module', got 'str'"):
        pipelines.annotated_for_type_checkers(1, "no")


def test_bad_arguments_are_refused_here() -> None:
    """A call raises an error in the caller's process if an argument cannot be pickled."""
    search = pipelines.search(width=8, settings={"stream": (number for number in ())})
    with pytest.raises(CannotTravelError, match=r"search.settings\['stream'\]"):
        pipelines.answer.remote(search, 1.0)


MAIN = """
from __future__ import annotations
import sys
import ray, torch
from torch import nn
import zerocopy
from zerocopy import Copied, Shared, copied, shared
from zerocopy.testing import assert_zero_copy

SCALE = 3

@zerocopy.pipeline
class Search:
    encoder: Shared[nn.Module]
    top_k: Copied[int] = 5

    @zerocopy.task
    def rank(self, query: float) -> float:
        assert_zero_copy(self)
        return float(self.encoder(torch.ones(1, 8) * query).detach().sum()) * SCALE

@zerocopy.task
def answer(search: Search, query: float) -> float:
    return search.rank(query) + helper(0)

@zerocopy.task
def helper(number):
    return number if number > 2 else helper(number + 1)

@zerocopy.actor(num_cpus=0.5)
class Worker:
    def __init__(self, search: Search):
        self.search = search
    def ask(self, query: float) -> float:
        return self.search.rank(query)

ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
search = Search(encoder=nn.Linear(8, 8))
expected = float(search.encoder(torch.ones(1, 8)).detach().sum()) * SCALE
close = lambda value, other: abs(value - other) < 1e-4
worker = Worker.remote(search)
with Worker.pool(1, search) as pool:
    print(
        close(search.rank(1.0), expected),
        close(answer(search, 1.0), expected + 3),
        close(ray.get(worker.ask.remote(1.0)), expected),
        close(next(pool.map("ask", [1.0])), expected),
        type(zerocopy.publish(search).load()) is Search,
        "<table>" in zerocopy.plan(search)._repr_html_(),
    )
"""


@pytest.mark.long
def test_everything_in_main(address: str) -> None:
    """Pipelines, tasks and actors that are defined in `__main__` work, also without a file as in a notebook."""
    done = run_python(MAIN, "-", address)
    assert done.stdout.split() == ["True"] * 6, done.stdout + done.stderr


@zerocopy.task
def kind_of_handle(search: zerocopy.Publication[pipelines.Search]) -> tuple[str, float]:
    return type(search).__name__, search.load(fields=["encoder"]).encoder[0].weight.sum().item()


@zerocopy.task
def kinds(
    optional: zerocopy.Publication[pipelines.Search] | None,
    either: pipelines.Search | zerocopy.Publication,
    name: str = "",
) -> list[str]:
    return [type(optional).__name__, type(either).__name__, name]


def test_a_parameter_can_ask_for_the_publication() -> None:
    """A parameter annotated as `zerocopy.Publication` gets the publication; one that also allows a pipeline gets the pipeline."""
    search = pipelines.search(width=8)
    publication = zerocopy.publish(search)
    expected = ("Publication", search.encoder[0].weight.sum().item())
    assert kind_of_handle(publication) == ray.get(kind_of_handle.remote(search)) == expected
    assert kind_of_handle.local(publication) == expected
    assert kinds(publication, publication, name="a") == ["Publication", "Search", "a"]
    assert kinds(None, search) == ["NoneType", "Search", ""]

    class Local: ...

    @zerocopy.task
    def of_a_class_that_no_module_has(search: zerocopy.Publication[Local]) -> str:
        return type(search).__name__

    assert of_a_class_that_no_module_has(publication) == "Publication"


class Holder(zerocopy.Actor):
    def __init__(self, search: zerocopy.Publication) -> None:
        self.search = search

    def labels(self) -> list[str]:
        return [type(self.search).__name__, type(self.search.load()).__name__]


def test_an_actor_can_ask_for_the_publication() -> None:
    """An actor with a publication can load later or only a part, and its handle keeps the weights."""
    search = pipelines.search(width=8)
    publication = zerocopy.publish(search)
    holder = Holder.options(num_cpus=0.1).remote(publication)
    publication.close()
    del search
    assert ray.get(holder.labels.remote()) == ["Publication", "Search"]
