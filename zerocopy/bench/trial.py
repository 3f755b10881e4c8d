"""One fresh process: it starts Ray, takes one measure of one system over one model, and prints one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

MARK = "zerocopy-bench: "  # starts the line that counts: Ray and Ray Data may print too


@attrs.frozen
class Trial:
    """What to measure.

    Attributes:
        model: a name that `models.find` knows.
        system: a name that `systems.find` knows.
        measure: a function of `measures`, or `facts`, which needs no system.
        workers: how many workers.
        counts: how many of them use the model, one after the other, when memory is measured.
        store: bytes of the object store.
        effort: a factor for how often short things are repeated: 1 in a full run.
    """

    model: str
    system: str = ""
    measure: str = "facts"
    workers: int = 1
    counts: Sequence[int] = ()
    store: int = 0
    effort: float = 1.0


def main() -> None:
    """Measure what the first argument says, and print what came of it: figures, or a failure's words."""
    trial = Trial(**json.loads(sys.argv[1]))
    try:
        told = _measure(trial)
    except Exception as error:  # whatever a system raises is its result
        told = {"failure": said(error)}
    print(MARK + json.dumps(told), flush=True)


def said(error: BaseException) -> str:
    """An error's class and first line; of an error that Ray carried, those of its cause."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return said(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _measure(trial: Trial) -> dict[str, Any]:
    from zerocopy.bench import measures

    if trial.measure == "facts":
        return measures.facts(trial.model)
    measure = getattr(measures, trial.measure)
    with tempfile.TemporaryDirectory() as folder, _ray(trial):
        return {"samples": measure(trial, Path(folder))}


@contextmanager
def _ray(trial: Trial) -> Iterator[None]:
    import ray

    ray.init(
        "local",
        num_cpus=trial.workers,
        object_store_memory=trial.store,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
