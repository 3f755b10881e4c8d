"""How is each figure measured inside a trial? Memory, times, calls of tasks, and rows per second."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import ray
import torch
from torch import nn

from benchmarks import memory as processes
from benchmarks import models, systems, workers
from benchmarks.trial import Trial

ROUNDS = 6  # calls are timed in rounds, in which the kinds of calls take turns
CALLS = 50  # the maximum that counts, for each kind in a round
ROUND_SECONDS = 1.0  # a kind gets no more calls in a round after this time
WARM = 3  # the first calls of each kind in a round do not count
PUTS = 3
SPARE = 32 << 20  # bytes of the store to use beside the model's, because a publication has more than the model's bytes

# Each sample has `figures`. If a trial has several samples, `sample` or `workers` distinguishes them.
Samples: TypeAlias = list[dict[str, Any]]


def facts(name: str) -> dict[str, Any]:
    """The bytes of a model, the number of its modules, and whether its inputs are known, so that it can run."""
    model = models.find(name).build()
    size = sum(storage.nbytes() for storage in models.storages(model))
    return {"bytes": size, "modules": sum(1 for _ in model.modules()), "runs": models.run(model)}


class Stage:
    """The set-up of a trial that compares systems: a system, a model, and workers.

    The system has published a tiny model, and the workers have used it, so that imports and one-time set-up are done.
    """

    def __init__(self, trial: Trial, folder: Path) -> None:
        self.trial = trial
        self.folder = folder
        self.system = systems.find(trial.system)
        self.model = models.find(trial.model)
        actor: Any = ray.remote(num_cpus=1)(workers.Worker)
        self.workers = [actor.remote(trial.system) for _ in range(trial.workers)]
        twin = self.model.twin()
        handle = self.publish(twin, self.model.twin)
        ray.get([worker.warm.remote(handle) for worker in self.workers])

    def publish(self, model: nn.Module, build: systems.Build) -> Any:
        """Publish a model with the system."""
        return self.system.publish(model, build, self.folder)

    def dismiss(self) -> None:
        """End the workers, because tasks and Ray Data need their CPUs."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers.clear()


def memory(trial: Trial, folder: Path) -> Samples:
    """The memory that the process tree gains for each number of workers, and the peak while the model is published.

    Also the load times, and whether one worker sees what another one writes to the weights.
    """
    stage, root = Stage(trial, folder), os.getpid()
    gc.collect()
    base = processes.settled(root)
    publishing = [root, *processes.raylets(root)]
    alone = processes.resident(publishing)
    model = stage.model.build() if stage.system.publishes else nn.Module()
    with processes.Peak(publishing) as peak:
        handle = stage.publish(model, stage.model.build)
    common = {"peak": peak.bytes - alone} if stage.system.publishes else {}
    if not stage.system.keeps:
        del model
    gc.collect()
    samples: Samples = []
    using = 0
    for count in trial.counts:
        loads = [ray.get(worker.load.remote(handle)) for worker in stage.workers[using:count]]
        ray.get([worker.use.remote() for worker in stage.workers[using:count]])
        using = count
        figures = {**common, "taken": processes.settled(root) - base, "load": median(loads)}
        samples.append({"workers": count, "figures": figures})
    if using > 1:
        ray.get(stage.workers[0].write.remote())
        samples[-1]["figures"]["seen"] = ray.get(stage.workers[1].sees.remote())
    return samples


def times(trial: Trial, folder: Path) -> Samples:
    """For each worker, seconds to put the model's bytes, to publish the model, to load it twice and to run it once.

    For the first worker, also the time of steady forwards, divided by that of a private copy.
    """
    stage = Stage(trial, folder)
    return [
        {"sample": number, "figures": _times(stage, worker, is_steady=number == 0)}
        for number, worker in enumerate(stage.workers)
    ]


def _times(stage: Stage, worker: Any, is_steady: bool) -> dict[str, float]:
    figures: dict[str, float | None] = {}
    model = stage.model.build() if stage.system.publishes else nn.Module()
    if stage.system.publishes:
        figures["put"] = _put_seconds(model)
    start = time.perf_counter()
    handle = stage.publish(model, stage.model.build)
    if stage.system.publishes:
        figures["publish"] = time.perf_counter() - start
    figures["first_load"] = ray.get(worker.load.remote(handle))
    figures["second_load"] = ray.get(worker.load.remote(handle))
    figures["forward"] = ray.get(worker.forward.remote())
    if is_steady:
        figures["steady_1"] = ray.get(worker.steady.remote(1))
        figures["steady_32"] = ray.get(worker.steady.remote(32)) if figures["steady_1"] else None
    ray.kill(worker)
    return {name: value for name, value in figures.items() if value is not None}


def calls(trial: Trial, folder: Path) -> Samples:
    """Median seconds of warm calls, one at a time: of tasks that receive the model, and of a task that does nothing."""
    stage = Stage(trial, folder)
    stage.dismiss()
    model = stage.model.build()
    kinds = {"nothing": _nothing, **stage.system.calls(model, stage.publish(model, stage.model.build))}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(max(2, round(ROUNDS * trial.effort))):
        for kind, call in kinds.items():
            taken[kind] += _seconds(call)
    return [{"figures": {f"{kind}_call": median(seconds) for kind, seconds in taken.items()}}]


def rows(trial: Trial, folder: Path) -> Samples:
    """Rows per second of Ray Data's `map_batches` with a pool of workers.

    Each worker is timed from the start of its load to the end of its last batch. All imports are done before. The rate
    of the pool is the sum of the rates of its workers.
    """
    stage = Stage(trial, folder)
    stage.dismiss()
    twin = stage.publish(stage.model.twin(), stage.model.twin)
    model = stage.model.build() if stage.system.publishes else nn.Module()
    handle = stage.publish(model, stage.model.build)
    ray.data.DataContext.get_current().enable_progress_bars = False
    count = max(8 * trial.workers, round(stage.model.rows * trial.effort))
    mapped = ray.data.range(count, override_num_blocks=min(count // 8, 32)).map_batches(
        workers.Batches,
        fn_constructor_kwargs={"system": trial.system, "twin": twin, "handle": handle},
        compute=ray.data.ActorPoolStrategy(size=trial.workers),
        batch_size=8,
        num_cpus=0.5,
    )
    return [{"figures": {"rows": _rate(mapped.take_all())}}]


def _rate(told: list[dict[str, Any]]) -> float:
    by_worker: dict[int, list[float]] = {}
    for row in told:
        by_worker.setdefault(row["worker"], []).append(row["seconds"])
    return sum(len(seconds) / max(seconds) for seconds in by_worker.values())


@ray.remote
def _no_operation() -> None: ...


def _nothing() -> None:
    ray.get(_no_operation.remote())


def _seconds(call: Callable[[], Any]) -> list[float]:
    """The seconds of each call in a round, without the first calls, which start or find a worker."""
    taken: list[float] = []
    while len(taken) < WARM + 1 or (len(taken) < WARM + CALLS and sum(taken) < ROUND_SECONDS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken[WARM:]


def _put_seconds(model: nn.Module) -> float:
    """Median seconds to `ray.put` the model's bytes, one array per storage. The pages of the store were used before."""
    views = [torch.empty(0, dtype=torch.uint8).set_(storage).numpy() for storage in models.storages(model)]
    wait_until_empty()
    ray.wait([ray.put([*views, np.zeros(SPARE, np.uint8)])])
    taken = []
    for _ in range(PUTS):
        wait_until_empty()
        start = time.perf_counter()
        ref = ray.put(views)
        taken.append(time.perf_counter() - start)
        del ref
    wait_until_empty()
    return median(taken)


def wait_until_empty(seconds: float = 20) -> None:
    """Wait until the store holds less than 1 MiB, or until the seconds are over.

    Ray frees an object some moments after its last reference is gone.
    """
    from ray._private import internal_api, state

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        reply = internal_api.get_memory_info_reply(state.state)
        if reply.store_stats.object_store_bytes_used < 2**20:
            return
        time.sleep(0.05)
