"""What happens in a worker: it loads, runs, writes, and times itself."""

from __future__ import annotations

import copy
import gc
import os
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import models, systems

MARK = 7.0  # what one worker writes, and another looks for
STEADY_SECONDS, PAIRS, MOST_PAIRS = 15.0, 5, 25  # how long, and how often, forwards are repeated


class Worker:
    """One worker of a trial, started as a Ray actor."""

    def __init__(self, system: str) -> None:
        self._system = systems.find(system)
        self._loaded: list[nn.Module] = []

    def warm(self, handle: Any) -> None:
        """Load and run a tiny model, so that imports and one-time set-up are paid, and let it go."""
        models.run(self._system.load(handle))
        gc.collect()

    def load(self, handle: Any) -> float:
        """Load, and keep; seconds."""
        start = time.perf_counter()
        self._loaded.append(self._system.load(handle))
        return time.perf_counter() - start

    def forward(self) -> float | None:
        """Run the first loaded model on one row; seconds, or None if it does not tell its inputs."""
        start = time.perf_counter()
        ran = models.run(self._loaded[0])
        return time.perf_counter() - start if ran else None

    def steady(self, rows: int) -> float | None:
        """Seconds of a forward of the first loaded model, over those of a private copy of it: the median of pairs, taken in turn.

        None if it does not tell its inputs, or if one forward takes too long to be repeated.
        """
        loaded = self._loaded[0]
        private = copy.deepcopy(loaded)
        slowest = max(_seconds(loaded, rows), _seconds(private, rows))  # both are warm now
        if not models.run(loaded, rows) or slowest > STEADY_SECONDS / PAIRS:
            return None
        count = min(MOST_PAIRS, int(STEADY_SECONDS / slowest / 2) + PAIRS)
        return median(_seconds(loaded, rows) / _seconds(private, rows) for _ in range(count))

    def use(self) -> None:
        """Run the model, and read all of its memory."""
        self.forward()
        with torch.inference_mode():
            for tensor in (*self._loaded[0].parameters(), *self._loaded[0].buffers()):
                tensor.sum()
        gc.collect()

    def write(self) -> None:
        """Write to the model's first parameter, in place."""
        with torch.inference_mode():
            next(self._loaded[0].parameters()).view(-1)[0] = MARK

    def sees(self) -> bool:
        """Whether the first parameter holds what another worker wrote."""
        return next(self._loaded[0].parameters()).detach().view(-1)[0].item() == MARK


def _seconds(model: nn.Module, rows: int) -> float:
    start = time.perf_counter()
    models.run(model, rows)
    return time.perf_counter() - start


class Batches:
    """The class that Ray Data makes its workers from."""

    def __init__(self, system: str, twin: Any, handle: Any) -> None:
        models.run(systems.find(system).load(twin))
        self._start = time.perf_counter()
        self._model = systems.find(system).load(handle)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the model on as many rows, and tell who did, and when."""
        count = len(batch["id"])
        models.run(self._model, count)
        seconds = time.perf_counter() - self._start
        return {"worker": np.full(count, os.getpid()), "seconds": np.full(count, seconds)}
