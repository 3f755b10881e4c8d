"""What happens in a worker: it loads, runs, writes, and times itself."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import models, systems

MARK = 7.0  # what one worker writes, and another looks for


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
