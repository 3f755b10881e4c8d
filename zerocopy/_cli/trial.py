"""How is a model measured in workers that share it, and in workers with a copy each?"""

from __future__ import annotations

import gc
import os
import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import ray
import ray.exceptions
import torch

import zerocopy
from zerocopy._cli.adopted import publish_adopted
from zerocopy._cli.inputs import Inputs, inputs_of, run
from zerocopy._compat.linux import give_back_heap
from zerocopy._store import object_store

ROUNDS, ROUND_SECONDS = 20, 5.0  # the limits of steady forwards: a number, and seconds

Handle: TypeAlias = list[Any]  # holds a publication, or a reference to a pickle, so that Ray does not fetch it


@attrs.frozen
class Figures:
    """The results of a measurement.

    Attributes:
        workers: how many ran.
        memory: bytes that they took together, in addition to what they took before they had the model: their private memory, and
            the store's pages once.
        publish: seconds to put the model into the store; for copies, also to pickle it.
        load: seconds until a worker had the model: the median of all, which load at the same time.
        first: seconds of the first forward, None if no inputs for it are known.
        steady: median seconds of the later forwards.
    """

    workers: int
    memory: int
    publish: float
    load: float
    first: float | None
    steady: float | None


class Worker:
    """Loads a model, runs it, and reports how long that took."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = None

    def warm(self) -> int:
        """Import and run what all models need. Returns the process id."""
        torch.nn.Linear(8, 8)(torch.ones(1, 8))
        gc.collect()
        return os.getpid()

    def load(self, handle: Handle) -> float:
        """Load the model. Returns the seconds."""
        start = time.perf_counter()
        (given,) = handle
        shared = isinstance(given, zerocopy.Publication)
        self._model = given.load() if shared else pickle.loads(object_store.get(given))
        seconds = time.perf_counter() - start
        del given, handle
        gc.collect()
        give_back_heap()
        return seconds

    def forward(self, inputs: Inputs | None, rounds: int) -> list[float]:
        """Run some forwards. Returns the seconds of each. If no inputs are known, the weights are read instead."""
        inputs = inputs_of(self._model) if inputs is None else inputs
        if inputs is None:
            _read(self._model)
            return []
        taken: list[float] = []
        while len(taken) < rounds and (len(taken) < 2 or sum(taken) < ROUND_SECONDS):
            start = time.perf_counter()
            run(self._model, inputs)
            taken.append(time.perf_counter() - start)
        return taken


def _read(model: Any) -> None:
    if isinstance(model, torch.nn.Module):
        with torch.inference_mode():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.sum()


class Late(Exception):
    """The time limit passed before a measurement was complete."""


@attrs.frozen
class Trial:
    """How to measure.

    Attributes:
        workers: the number of workers.
        inputs: the arguments of the model; None for those that the model itself declares.
        end: when to give up, on the clock of `time.monotonic`.
    """

    workers: int
    inputs: Inputs | None
    end: float

    def shared(self, model: Any) -> Figures:
        """Publish a model, which this process then has only in the store, and measure workers that share it.

        Raises:
            Late: the time limit has passed.
        """
        return self._measure(lambda: [publish_adopted(model)])

    def copies(self, pickled: Callable[[], bytes], seconds: float) -> Figures:
        """The same, but each worker unpickles a copy.

        Args:
            seconds: how long pickling took.

        Raises:
            Late: the time limit has passed.
        """
        found = self._measure(lambda: [object_store.put(pickled())])
        return attrs.evolve(found, publish=found.publish + seconds)

    def _measure(self, put: Callable[[], Handle]) -> Figures:
        cpus = ray.cluster_resources().get("CPU", 1.0)
        share = min(1.0, int(100 * cpus / self.workers) / 100)
        actor: Any = ray.remote(num_cpus=share)(Worker)
        workers = [actor.remote(max(1, int(cpus / self.workers))) for _ in range(self.workers)]
        try:
            return self._figures(workers, put)
        finally:
            for worker in workers:
                ray.kill(worker)

    def _figures(self, workers: list[Any], put: Callable[[], Handle]) -> Figures:
        pids = self._all([worker.warm.remote() for worker in workers])
        before = zerocopy.memory_report(pids).private
        start = time.perf_counter()
        handle = put()
        publish = time.perf_counter() - start
        load = statistics.median(self._all([worker.load.remote(handle) for worker in workers]))
        for worker in workers[1:]:
            self._all([worker.forward.remote(self.inputs, 1)])
        (taken,) = self._all([workers[0].forward.remote(self.inputs, ROUNDS)])  # alone, so that nothing slows it
        report = zerocopy.memory_report(pids)
        memory = report.private - before + report.shared
        first, steady = (taken[0], statistics.median(taken[1:])) if taken else (None, None)
        return Figures(len(workers), memory, publish, load, first, steady)

    def _all(self, refs: list[Any]) -> list[Any]:
        try:
            found: list[Any] = ray.get(refs, timeout=max(0.0, self.end - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            raise Late from error
        return found
