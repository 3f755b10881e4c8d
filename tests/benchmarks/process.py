"""One fresh process: it starts Ray, takes one measure of one system over one model, and prints one line of JSON."""

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
    """The figures of the trial, or a failure's words."""
    try:
        return _measure(trial)
    except Exception as error:  # whatever a system raises is its result
        return {"failure": said(error)}


def said(error: BaseException) -> str:
    """An error's class and first line; of an error that Ray carried, those of its cause."""
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
