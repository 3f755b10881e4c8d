"""How are figures computed from the results of the trials? Each figure has a unit, a median and a spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import attrs

from benchmarks.models import STATED

Results = Mapping[str, Any]  # what `runner` collects; the JSON file contains the same
Read = Callable[[Mapping[str, Any], int], float]  # takes the figures of a trial and the model's bytes


@attrs.frozen
class Figure:
    """One column of a table.

    Attributes:
        title: the heading of the column.
        unit: `x` (a ratio), `ms`, `rows/s` or `yes/no`.
        measure: the kind of trial that it comes from.
        read: computes the figure from the result of a trial. Raises KeyError if the trial does not have the figure.
        workers: if given, only trials with this number of workers count.
        since: if given, the same figure with this number of workers, in the same repeat, is subtracted.
        reference: if given, the figure is divided by the same figure of this system, in the same repeat.
    """

    title: str
    unit: str
    measure: str
    read: Read
    workers: int | None = None
    since: int | None = None
    reference: str = ""


@attrs.frozen
class Summary:
    """A median and its spread."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """The summary of one or more values."""
        return cls(median(values), min(values), max(values))

    def text(self, unit: str) -> str:
        """The median, and if the values differ, the lowest and the highest one. For `yes/no`: yes, no or at times."""
        if unit == "yes/no":
            return {0.0: "no", 1.0: "yes"}.get(self.median, "at times") if self.low == self.high else "at times"
        middle, low, high = (_digits(value, unit) for value in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"


def _digits(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _taken(figures: Mapping[str, Any], size: int) -> float:
    return float(figures["taken"]) / size


def _milliseconds(key: str) -> Read:
    return lambda figures, _: figures[key] * 1000


def _over(key: str, other: str) -> Read:
    return lambda figures, _: figures[key] / figures[other]


PEAK = Figure("peak while publishing / model", "x", "memory", lambda told, size: told["peak"] / size)
SEEN = Figure("write seen by others", "yes/no", "memory", lambda told, _: float(told["seen"]))
PUBLISH = Figure("publish, ms", "ms", "times", _milliseconds("publish"))
PUBLISH_RATIO = Figure("publish / ray.put of the bytes", "x", "times", _over("publish", "put"))
FIRST_LOAD = Figure("first load, ms", "ms", "times", _milliseconds("first_load"))
LOAD_RATIO = attrs.evolve(FIRST_LOAD, title="first load / zerocopy's", unit="x", reference="zerocopy")
SECOND_LOAD = Figure("second load, ms", "ms", "times", _milliseconds("second_load"))
FORWARD = Figure("first forward, ms", "ms", "times", _milliseconds("forward"))
STEADY_1 = Figure("batch of 1", "x", "times", lambda told, _: float(told["steady_1"]))
STEADY_32 = Figure("batch of 32", "x", "times", lambda told, _: float(told["steady_32"]))
CALL = Figure("call / no-op call", "x", "calls", _over("handle_call", "nothing_call"))
INSTANCE_CALL = Figure("call with the model itself / no-op call", "x", "calls", _over("instance_call", "nothing_call"))
CALL_TIME = Figure("call, ms", "ms", "calls", _milliseconds("handle_call"))
NOTHING_TIME = Figure("no-op call, ms", "ms", "calls", _milliseconds("nothing_call"))
ROWS = Figure("map_batches, rows/s", "rows/s", "rows", lambda told, _: float(told["rows"]))


def tables(results: Results) -> dict[str, list[Figure]]:
    """The columns of each table of a model, by the title of the table."""
    return {
        "Memory over the model's bytes": [*_memory(results), PEAK, SEEN],
        "Load, as more workers use the model": [load_at(count) for count in worker_counts(results)],
        "Publish, load and run": [PUBLISH, PUBLISH_RATIO, FIRST_LOAD, LOAD_RATIO, SECOND_LOAD, FORWARD],
        "Steady forward over that of a private copy": [STEADY_1, STEADY_32],
        "Calls and rows": [NOTHING_TIME, CALL_TIME, CALL, INSTANCE_CALL, ROWS],
    }


def summary_figures(results: Results) -> dict[str, Figure]:
    """The figures at the beginning of the page, by title. The page shows them for all models, side by side."""
    counts = [count for count in worker_counts(results) if count <= 4]
    memory = {f"Memory over the model's bytes, with {count} workers": memory_at(count) for count in counts[-1:]}
    load = {f"Load in a worker, with {count} workers, ms": load_at(count) for count in counts[-1:]}
    steady = {"Steady forward over that of a private copy, in batches of 32": STEADY_32}
    return {
        **memory,
        **(load or {"Load in a worker, ms": FIRST_LOAD}),
        "A task call given the model, over an empty one": CALL,
        **steady,
    }


def memory_at(workers: int) -> Figure:
    """The memory that the process tree has gained with this number of workers, divided by the model's bytes."""
    return Figure(f"{workers} worker{'s' * (workers > 1)}", "x", "memory", _taken, workers)


def load_at(workers: int) -> Figure:
    """The load time of the workers that were added last to reach this number of workers."""
    return Figure(
        f"load with {workers} worker{'s' * (workers > 1)}, ms", "ms", "memory", _milliseconds("load"), workers
    )


def worker_counts(results: Results) -> list[int]:
    """The numbers of workers with which memory was measured, in ascending order."""
    return sorted({trial["workers"] for trial in results["trials"] if trial["measure"] == "memory"})


def _memory(results: Results) -> Iterator[Figure]:
    counts = worker_counts(results)
    yield from map(memory_at, counts)
    if len(counts) > 1:
        title = f"growth from {counts[0]} to {counts[-1]}"
        yield attrs.evolve(memory_at(counts[-1]), title=title, since=counts[0])


def summary(results: Results, model: str, system: str, figure: Figure) -> Summary | None:
    """A figure over all repeats, or None if no trial has it."""
    told = values(results, model, system, figure)
    return Summary.of(list(told.values())) if told else None


def values(results: Results, model: str, system: str, figure: Figure) -> dict[int, float]:
    """A figure by repeat, for the repeats that have it. If several trials of a repeat have it, it is their median."""
    if figure.since is not None:
        less = values(results, model, system, attrs.evolve(figure, workers=figure.since, since=None))
        more = values(results, model, system, attrs.evolve(figure, since=None))
        return {repeat: more[repeat] - less[repeat] for repeat in more if repeat in less}
    if figure.reference:
        others = values(results, model, figure.reference, attrs.evolve(figure, reference=""))
        own = values(results, model, system, attrs.evolve(figure, reference=""))
        return {repeat: own[repeat] / others[repeat] for repeat in own if repeat in others}
    return _told(results, model, system, figure)


def _told(results: Results, model: str, system: str, figure: Figure) -> dict[int, float]:
    size, found = results["models"][model]["bytes"], dict[int, list[float]]()
    for trial in trials(results, model, system, figure):
        try:
            value = figure.read(trial["figures"], size)
        except KeyError:  # the trial has failed, or its system has no such figure
            continue
        found.setdefault(trial["repeat"], []).append(value)
    return {repeat: median(values) for repeat, values in found.items()}


def trials(results: Results, model: str, system: str, figure: Figure) -> Iterator[Mapping[str, Any]]:
    """The trials from which a figure is read."""
    for trial in results["trials"]:
        same = (trial["model"], trial["system"], trial["measure"]) == (model, system, figure.measure)
        if same and figure.workers in (None, trial["workers"]):
            yield trial


def family(results: Results) -> list[str]:
    """The Llamas that differ only in depth, fewest modules first."""
    depths = (model for model in results["models"] if STATED.fullmatch(model))
    return sorted(depths, key=lambda model: int(results["models"][model]["modules"]))
