"""How much memory and time does a user's own model take, shared and with a copy in each worker?

The measurement takes two minutes at most.
"""

from __future__ import annotations

import gc
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any

import attrs
import click
import psutil

from zerocopy._cli.cluster import joined_or_started, own_address_option
from zerocopy._cli.inputs import as_inputs
from zerocopy._cli.objects import Target, named
from zerocopy._cli.show import format_option, show, units_option
from zerocopy._cli.sizing import Weights, store_bytes
from zerocopy._cli.trial import Figures, Late, Trial
from zerocopy._compat.linux import give_back_heap
from zerocopy._publish.verify import plan
from zerocopy._store.object_store import arguments_fraction
from zerocopy._tables import as_text, format_bytes
from zerocopy._words import first_line

SECONDS = 115.0  # the time limit for all measurements
SPARE = 0.8  # the part of the free memory for copies


@click.command()
@click.argument("target", metavar="MODULE:OBJECT", callback=named)
@click.option(
    "--input", "input_", metavar="MODULE:FUNCTION", callback=named, help="Function that returns the model's input."
)
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Processes that have the model.")
@own_address_option("to measure on")
@format_option
@units_option
def bench(target: Target, input_: Target | None, workers: int, address: str | None, shown_as: str) -> None:
    """Measure a model of your own, shared and copied.

    MODULE:OBJECT makes the model. Workers share it first; then each worker has a copy. This takes two minutes at most.

    Memory is what the workers take above what they took before: what each has as its own, and the store's pages once, as the
    kernel tells (smaps). Load is the median of workers that load at the same time. Forwards run in one worker, the others idle;
    they need --input (a tensor, a tuple of arguments, or a dict of them), or a model that says what it takes: `dummy_inputs` of
    transformers, `example_input_array` of Lightning, or `example_inputs(rows)`. Copies are pickled, as plain Ray does it; where
    not all of them fit the memory, fewer run, and the rest is computed.

    \b
    Examples:
      zerocopy bench my_models:build
      zerocopy bench my_models:build --input my_models:make_batch --workers 8
      zerocopy bench my_models:build --format json
    """
    inputs = None if input_ is None else as_inputs(input_.made())
    model = target.made()
    planned = plan(model)
    weights = Weights(planned.shared_bytes, planned.copied_bytes)
    end = time.monotonic() + SECONDS
    with joined_or_started(address, store_bytes(weights, workers, arguments_fraction()), os.cpu_count()):
        shared = _shared(Trial(workers, inputs, end), model)
        start = time.monotonic()
        pickled, why = _pickled(model)
        seconds = time.monotonic() - start
        del model
        gc.collect()
        give_back_heap()
        copies = None
        if pickled is not None:
            copies, why = _copies(Trial(_fitting(workers, len(pickled[0])), inputs, end), pickled, seconds)
    result = _Result(target.name, weights, workers, shared, copies, why)
    show(shown_as, result.to_dict(), result.text)


def _shared(trial: Trial, model: Any) -> Figures:
    try:
        return trial.shared(model)
    except Late as error:
        raise click.ClickException(
            "The workers that share the model did not finish within two minutes. Hint: use fewer --workers."
        ) from error


def _pickled(model: Any) -> tuple[list[bytes] | None, str]:
    """The model as plain pickle writes it, in a list from which it can be removed; or None and the reason."""
    try:
        return [pickle.dumps(model, protocol=5)], ""
    except Exception as error:  # an error of the user's classes
        return None, f"Plain copies were not measured: pickle says {first_line(error)}"


def _copies(trial: Trial, pickled: list[bytes], seconds: float) -> tuple[Figures | None, str]:
    try:
        return trial.copies(pickled.pop, seconds), ""
    except Late:
        return None, "Plain copies were not measured: two minutes were over."


def _fitting(workers: int, nbytes: int) -> int:
    """How many copies fit into the free memory. While a copy is unpickled, its bytes are in memory too."""
    room = SPARE * psutil.virtual_memory().available
    return max(1, min(workers, int(room / max(nbytes, 1) / 2)))


@attrs.frozen
class _Result:
    """The measurements of a model."""

    name: str
    weights: Weights
    workers: int
    shared: Figures
    copies: Figures | None
    why: str  # why there are no figures of copies

    @property
    def memory_of_copies(self) -> int:
        """The memory of copies in all workers. It is computed if fewer workers ran, or none."""
        if self.copies is None:
            return self.workers * (self.weights.shared + self.weights.copied)
        return self.copies.memory * self.workers // self.copies.workers

    @property
    def is_computed(self) -> bool:
        """Whether `memory_of_copies` was computed, and not measured."""
        return self.copies is None or self.copies.workers != self.workers

    def to_dict(self) -> dict[str, Any]:
        """All values as data: bytes and seconds."""
        return {
            "model": self.name,
            "shared_bytes": self.weights.shared,
            "copied_bytes": self.weights.copied,
            "workers": self.workers,
            "zerocopy": attrs.asdict(self.shared),
            "plain": None if self.copies is None else attrs.asdict(self.copies),
            "plain_memory": self.memory_of_copies,
            "plain_memory_is_computed": self.is_computed,
            "notes": list(self._notes()),
        }

    def text(self) -> str:
        """A table, and notes."""
        title = f"{self.name}: {format_bytes(self.weights.shared)} shared, {format_bytes(self.weights.copied)} copied"
        headers = (f"{self.workers} workers" if self.workers > 1 else "1 worker", "zerocopy", "plain copies", "ratio")
        table = as_text(headers, list(self._rows()), right=headers[1:])
        return "\n".join([f"{title}\n", table, *(f"\n{note}" for note in self._notes())])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        plain, computed = self.memory_of_copies, " (computed)" if self.is_computed else ""
        ratio = _ratio(plain, self.shared.memory)
        yield "memory", format_bytes(self.shared.memory), format_bytes(plain) + computed, ratio
        for what in ("publish", "load", "first", "steady"):
            ours, theirs = getattr(self.shared, what), getattr(self.copies, what, None)
            title = f"{what} forward" if what in ("first", "steady") else what
            yield title, _seconds(ours), _seconds(theirs), _ratio(theirs, ours)

    def _notes(self) -> Iterator[str]:
        if self.why:
            yield self.why
        if self.copies is not None and self.is_computed:
            yield f"{self.copies.workers} copies were measured: more do not fit the memory that was free."
        if self.shared.first is None:
            yield "No forward was run: the model does not say what it takes. --input module:function makes it."


def _seconds(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count * 1000:,.1f} ms" if count < 1 else f"{count:,.2f} s"


def _ratio(theirs: float | None, ours: float | None) -> str:
    """How much more the copies take."""
    return "" if theirs is None or not ours else f"{theirs / ours:,.1f} x"
