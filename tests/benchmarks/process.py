"""Takes one trial in a new process, which starts Ray (not for `facts`), and prints the result as one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from benchmarks import measures, names
from benchmarks.trial import MARK, Trial


def main() -> None:
    """Take the trial that the first argument describes, and print its result."""
    print(MARK + json.dumps(outcome(Trial(**json.loads(sys.argv[1])))), flush=True)


def outcome(trial: Trial) -> dict[str, Any]:
    """The result of the trial, or the message of its failure."""
    try:
        return _measure(trial)
    except Exception as error:  # an error of a system is a result too
        return {"failure": said(error)}


def said(error: BaseException) -> str:
    """The class and the first line of an error, or of its cause if Ray has wrapped the error."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return said(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _measure(trial: Trial) -> dict[str, Any]:
    if trial.measure == "facts":
        return measures.facts(trial.model)
    measure = names.names if trial.measure == "names" else getattr(measures, trial.measure)
    with tempfile.TemporaryDirectory() as folder, _ray(trial):
        return {"samples": measure(trial, Path(folder))}


@contextmanager
def _ray(trial: Trial) -> Iterator[None]:
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
