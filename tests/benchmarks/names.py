"""What do names and versions cost? A trial measures memory, written bytes, lookups, updates, and the registry."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import ray
import torch
from ray._private import internal_api, state
from torch import nn

import zerocopy
from benchmarks import memory, models, registry
from benchmarks.measures import wait_until_empty
from benchmarks.registry import NAME, Figures, commits, count, seconds_of
from benchmarks.trial import Trial

CHANGED = 0.05  # the part of the bytes that changes from one version to the next
VERSIONS = 20
PAIRS = 3  # of publications, one with a name and one without
DRAWS = 3  # random choices of the parameters that a second version changes
LOOKUPS = 60
UPDATES = 10
PROCESSES = 4
CALM = 1.0  # seconds without a change, after which the store is settled


def names(trial: Trial, folder: Path) -> list[dict[str, Any]]:
    """Measure all figures of one trial."""
    model = models.find(trial.model)
    actor: Any = ray.remote(num_cpus=1)(registry.Peer)
    peers = [actor.remote() for _ in range(PROCESSES)]
    zerocopy.publish(model.twin(), name=NAME)  # starts the registry, and the workers of the store tasks
    ray.get([peer.nothing.remote() for peer in peers])
    zerocopy.remove(NAME)
    figures = {
        **_publishing(model.build),
        **_versions(model.build, trial.effort),
        **_lookups(model.build, peers[0], trial.effort),
        **_updates(model.build, peers, trial.effort),
        **registry.resolves(peers[:-1], trial.effort),
        **registry.polls(trial.effort),
    }
    return [{"figures": figures}]


def store_bytes() -> int:
    """Bytes of all objects in this node's store."""
    return int(internal_api.get_memory_info_reply(state.state).store_stats.object_store_bytes_used)


def settled() -> int:
    """The value of `store_bytes()`, when it has not changed for `CALM` seconds.

    Ray frees an object some moments after its last reference is gone.
    """
    gc.collect()
    since, found = time.monotonic(), store_bytes()
    while time.monotonic() - since < CALM:
        time.sleep(0.05)
        if store_bytes() != found:
            since, found = time.monotonic(), store_bytes()
    return found


class Largest:
    """A thread reads a value again and again between `__enter__` and `__exit__`. `value` is the largest one."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self.value = self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self.value = max(self.value, self._read())


def _distinct(build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose parameters all have different contents, because equal storages would be stored once."""
    model = build()
    _change(model.parameters(), range(1, 1 << 30))
    return model


@torch.no_grad()
def _change(parameters: Any, by: Sequence[int]) -> None:
    for parameter, number in zip(parameters, by, strict=False):
        parameter.add_(number)


def _bytes(model: nn.Module) -> int:
    return sum(storage.nbytes() for storage in models.storages(model))


def _draw(model: nn.Module, chosen: random.Random) -> list[nn.Parameter]:
    """Randomly chosen parameters, which together have at most `CHANGED` of the bytes."""
    parameters, room = list(model.parameters()), CHANGED * _bytes(model)
    chosen.shuffle(parameters)
    found = []
    for parameter in parameters:
        if parameter.nbytes <= room:
            found.append(parameter)
            room -= parameter.nbytes
    return found


def _draws(seed: int) -> random.Random:
    return random.Random(seed)


# Publishing.


def _publishing(build: Callable[[], nn.Module]) -> Figures:
    """Peaks while a model is published with a name and adopted, divided by its bytes; and the time, see `_ratio`.

    The peaks are those of the store, of this process, and of driver and raylet together. The last one is measured
    during the first publication, because the raylet keeps pages of the store that were used once.
    """
    wait_until_empty()
    gc.collect()
    processes = [os.getpid(), *memory.raylets(os.getpid())]
    start, private, base = store_bytes(), zerocopy.memory.private_bytes(), memory.resident(processes)
    model = _distinct(build)
    size = _bytes(model)
    with memory.Peak(processes) as together:  # separately, because it takes a core
        zerocopy.publish(model, name=NAME, adopt=True)
    del model
    _drop_all()
    model = _distinct(build)
    with Largest(store_bytes) as in_store, Largest(zerocopy.memory.private_bytes) as own:
        zerocopy.publish(model, name=NAME, adopt=True)
    del model
    _drop_all()
    return {
        "published_store": (in_store.value - start) / size,
        "published_private": (own.value - private) / size,
        "published_together": (together.bytes - base) / size,
        "published_seconds": median(_ratio(build) for _ in range(PAIRS)),
    }


def _ratio(build: Callable[[], nn.Module]) -> float:
    """The seconds to publish with a name, divided by the seconds without a name."""
    unnamed = _seconds_to_publish(build)
    gc.collect()
    wait_until_empty()
    named = _seconds_to_publish(build, NAME)
    _drop_all()
    return named / unnamed


def _seconds_to_publish(build: Callable[[], nn.Module], name: str | None = None) -> float:
    model = _distinct(build)
    return seconds_of(lambda: zerocopy.publish(model, name=name, adopt=True))


def _drop_all() -> None:
    """Remove the name, and wait until the store is empty."""
    zerocopy.remove(NAME)
    gc.collect()
    wait_until_empty()


# Versions.


def _versions(build: Callable[[], nn.Module], effort: float) -> Figures:
    """The bytes that a second version writes, and the bytes of many versions, divided by the bytes of the weights.

    The many versions change the same parameters each time, or random ones.
    """
    chosen, versions = _draws(0), count(VERSIONS, effort)
    written = [_written_by_a_second(build, chosen) for _ in range(count(DRAWS, effort))]
    return {
        "written": median(written),
        "written_most": max(written),
        "many_same": _many(build, versions, lambda model: _draw(model, _draws(1))),
        "many_random": _many(build, versions, lambda model: _draw(model, chosen)),
    }


def _written_by_a_second(build: Callable[[], nn.Module], chosen: random.Random) -> float:
    wait_until_empty()
    model = _distinct(build)
    zerocopy.publish(model, name=NAME)
    before = settled()
    _publish_changed(model, _draw(model, chosen))
    written = settled() - before
    zerocopy.remove(NAME)
    return written / _bytes(model)


def _publish_changed(model: nn.Module, changed: list[nn.Parameter]) -> None:
    _change(changed, [1000] * len(changed))
    zerocopy.publish(model, name=NAME)


def _many(build: Callable[[], nn.Module], versions: int, draw: Callable[[nn.Module], list[nn.Parameter]]) -> float:
    """The bytes in the store after the first version and `versions` more, divided by the bytes of the weights."""
    wait_until_empty()
    model = _distinct(build)
    for _ in range(versions + 1):
        _publish_changed(model, draw(model))
    after = settled()
    zerocopy.remove(NAME)
    return after / _bytes(model)


# Lookups.


def _lookups(build: Callable[[], nn.Module], peer: Any, effort: float) -> Figures:
    """The milliseconds that a lookup adds to a load, and the milliseconds of an empty call of an actor."""
    publication = zerocopy.publish(_distinct(build), name=NAME)
    kinds = {
        "load": publication.load,
        "lookup": lambda: zerocopy.lookup(NAME).load(),
        "call": lambda: ray.get(peer.nothing.remote()),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(count(LOOKUPS, effort)):
        for kind, act in kinds.items():
            taken[kind].append(1000 * seconds_of(act))
    zerocopy.remove(NAME)
    middle = {kind: median(values) for kind, values in taken.items()}
    return {"lookup": middle["lookup"] - middle["load"], "empty_call": middle["call"]}


# Updates.


def _updates(build: Callable[[], nn.Module], peers: list[Any], effort: float) -> Figures:
    """Seconds from the request to commit a version until all processes have it: the slowest version, and the median."""
    model, chosen = _distinct(build), _draws(2)
    zerocopy.publish(model, name=NAME)
    ray.get([peer.follow.remote(zerocopy.lookup(NAME)) for peer in peers])
    first, taken = zerocopy.lookup(NAME).version.number, []
    for number in range(first + 1, first + 1 + count(UPDATES, effort)):
        seen = [peer.wait_for.remote(number) for peer in peers]
        with commits() as committed:
            _publish_changed(model, _draw(model, chosen))
        taken.append(max(ray.get(seen)) - committed[-1])
    zerocopy.remove(NAME)
    return {"update": max(taken), "update_median": median(taken)}
