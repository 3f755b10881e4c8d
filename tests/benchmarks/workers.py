"""What happens in a worker? It loads and runs a model, writes to it, and measures its own times."""

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

MARK = 7.0  # one worker writes it, and another one looks for it
# Forwards are repeated in as many pairs as fit into the seconds, and `PAIRS` more, but at most `MOST_PAIRS`.
STEADY_SECONDS, PAIRS, MOST_PAIRS = 15.0, 5, 25


class Worker:
    """One worker of a trial, started as a Ray actor."""

    def __init__(self, system: str) -> None:
        self._system = systems.find(system)
        self._loaded: list[nn.Module] = []

    def warm(self, handle: Any) -> None:
        """Load, run and drop a tiny model, so that imports and one-time set-up are done."""
        models.run(self._system.load(handle))
        gc.collect()

    def load(self, handle: Any) -> float:
        """Load a model, and keep it. Returns seconds."""
        start = time.perf_counter()
        self._loaded.append(self._system.load(handle))
        return time.perf_counter() - start

    def forward(self) -> float | None:
        """Run the first loaded model on one row. Returns seconds, or None if its inputs are not known."""
        start = time.perf_counter()
        ran = models.run(self._loaded[0])
        return time.perf_counter() - start if ran else None

    def steady(self, rows: int) -> float | None:
        """The time of a forward of the first loaded model, divided by that of a private copy. The two take turns.

        Returns:
            The median ratio. None if the inputs are not known, or a forward takes more than `STEADY_SECONDS / PAIRS`.
        """
        loaded = self._loaded[0]
        private = copy.deepcopy(loaded)
        slowest = max(_seconds(loaded, rows), _seconds(private, rows))  # both are warm now
        if not models.run(loaded, rows) or slowest > STEADY_SECONDS / PAIRS:
            return None
        count = min(MOST_PAIRS, int(STEADY_SECONDS / slowest / 2) + PAIRS)
        return median(_seconds(loaded, rows) / _seconds(private, rows) for _ in range(count))

    def use(self) -> None:
        """Run the first loaded model, and read all of its weights."""
        self.forward()
        with torch.inference_mode():
            for tensor in (*self._loaded[0].parameters(), *self._loaded[0].buffers()):
                tensor.sum()
        gc.collect()

    def write(self) -> None:
        """Write to the first parameter of the model, in place."""
        with torch.inference_mode():
            next(self._loaded[0].parameters()).view(-1)[0] = MARK

    def sees(self) -> bool:
        """Whether the first parameter contains what another worker has written."""
        return next(self._loaded[0].parameters()).detach().view(-1)[0].item() == MARK


def _seconds(model: nn.Module, rows: int) -> float:
    start = time.perf_counter()
    models.run(model, rows)
    return time.perf_counter() - start


class Batches:
    """The class for `map_batches`. Each worker of Ray Data has one instance."""

    def __init__(self, system: str, twin: Any, handle: Any) -> None:
        models.run(systems.find(system).load(twin))
        self._start = time.perf_counter()
        self._model = systems.find(system).load(handle)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the model on a batch. Each row gets the id of this process, and the seconds since the load began."""
        count = len(batch["id"])
        models.run(self._model, count)
        seconds = time.perf_counter() - self._start
        return {"worker": np.full(count, os.getpid()), "seconds": np.full(count, seconds)}
