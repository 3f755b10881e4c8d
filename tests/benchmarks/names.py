"""What names and versions cost, taken inside a trial: memory and bytes written, lookups, updates, and the registry's rate."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

import psutil
import ray
import torch
from ray._private import internal_api, state
from torch import nn

import zerocopy
from benchmarks import memory, models
from benchmarks.measures import wait_until_empty
from benchmarks.trial import Trial
from zerocopy._cluster import client
from zerocopy._store.write import STREAMED

NAME = "bench"
CHANGED = 0.05  # of the bytes, from one version to the next
VERSIONS = 20
DRAWS = 3  # of what changes, where it is drawn anew
LOOKUPS = 60
UPDATES = 10
PROCESSES = 4
IN_FLIGHT, RESOLVES = 100, 1500  # resolves of each process: under way, and altogether
POLLS = 3000
CALM = 1.0  # seconds that the store does not change until it counts as settled

Figures = dict[str, float]


def names(trial: Trial, folder: Path) -> list[dict[str, Any]]:
    """All figures of one trial."""
    model = models.find(trial.model)
    actor: Any = ray.remote(num_cpus=1)(Peer)
    peers = [actor.remote() for _ in range(PROCESSES)]
    zerocopy.publish(model.twin(), name=NAME)  # starts the registry, and the processes of store tasks
    ray.get([peer.nothing.remote() for peer in peers])
    zerocopy.remove(NAME)
    figures = {
        **_publishing(model.build),
        **_versions(model.build, trial.effort),
        **_lookups(model.build, peers[0], trial.effort),
        **_updates(model.build, peers, trial.effort),
        **_resolves(peers[:-1], trial.effort),
        **_polls(trial.effort),
    }
    return [{"figures": figures}]


class Peer:
    """Another process that uses names."""

    def nothing(self) -> None:
        """An empty call."""

    def follow(self, publication: Any) -> None:
        """Load a publication, and follow it."""
        self._publication = publication
        publication.current()

    def wait_for(self, number: int) -> float:
        """When `current()` is this version, by the clock of this machine."""
        while True:
            version = zerocopy.version_of(self._publication.current())
            if version is not None and version.number >= number:
                return time.monotonic()
            time.sleep(0.002)

    def resolve(self, count: int) -> None:
        """Ask the registry so many times. Some calls are under way at any time."""
        registry, pending = client.registry(), list[Any]()
        for _ in range(count):
            if len(pending) == IN_FLIGHT:
                done, pending = ray.wait(pending, num_returns=IN_FLIGHT // 2)
                ray.get(done)
            pending.append(client.submit(registry, "resolve", NAME, "latest"))
        ray.get(pending)


def store_bytes() -> int:
    """Bytes of all objects in this node's store."""
    return int(internal_api.get_memory_info_reply(state.state).store_stats.object_store_bytes_used)


def settled() -> int:
    """The same, once it has not changed for a moment: Ray frees some moments after the last reference is gone."""
    gc.collect()
    since, found = time.monotonic(), store_bytes()
    while time.monotonic() - since < CALM:
        time.sleep(0.05)
        if store_bytes() != found:
            since, found = time.monotonic(), store_bytes()
    return found


class Largest:
    """The largest value that a thread has read between `__enter__` and `__exit__`."""

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
    """A model of which no two storages are equal: equal ones would be one."""
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
    """Parameters of up to `CHANGED` of the bytes."""
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
    """At their peak while a model is published under a name and adopted: store, this process, and all processes."""
    _unnamed(build)  # pages of the store that were not used before take longer
    unnamed = _unnamed(build)
    wait_until_empty()
    start, private = store_bytes(), zerocopy.memory.private_bytes()
    all_processes = memory.tree(os.getpid())
    base = memory.resident(all_processes)
    model = _distinct(build)
    size = _bytes(model)
    with Largest(store_bytes) as in_store, Largest(zerocopy.memory.private_bytes) as own:
        seconds = _seconds(lambda: zerocopy.publish(model, name=NAME, adopt=True))
    zerocopy.remove(NAME)
    del model
    gc.collect()
    wait_until_empty()
    model = _distinct(build)
    with memory.Peak(all_processes) as together:  # by itself: it takes a core
        zerocopy.publish(model, name=NAME, adopt=True)
    zerocopy.remove(NAME)
    return {
        "published_store": (in_store.value - start) / size,
        "published_private": (own.value - private) / size,
        "published_together": (together.bytes - base) / size,
        "published_seconds": seconds / unnamed,
        "four_shards": 4 / STREAMED.parts,
    }


def _unnamed(build: Callable[[], nn.Module]) -> float:
    """Seconds to publish without a name."""
    gc.collect()
    wait_until_empty()
    model = _distinct(build)
    with Largest(store_bytes), Largest(zerocopy.memory.private_bytes):  # as beside the other: they take time
        return _seconds(lambda: zerocopy.publish(model, adopt=True))


def _seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


# Versions.


def _versions(build: Callable[[], nn.Module], effort: float) -> Figures:
    """What a second version writes, and what many versions take: of changes in one place, and of changes anywhere."""
    chosen, versions = _draws(0), count(VERSIONS, effort)
    written = [_written_by_a_second(build, chosen) for _ in range(count(DRAWS, effort))]
    return {
        "written": median(written),
        "written_most": max(written),
        "many_same": _many(build, versions, lambda model: _draw(model, _draws(1))),
        "many_random": _many(build, versions, lambda model: _draw(model, chosen)),
    }


def count(full: int, effort: float) -> int:
    """How often something is done that a full run does so often."""
    return max(2, round(full * effort))


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
    """Bytes in the store after so many versions beside the first, over those of the weights."""
    wait_until_empty()
    model = _distinct(build)
    for _ in range(versions + 1):
        _publish_changed(model, draw(model))
    after = settled()
    zerocopy.remove(NAME)
    return after / _bytes(model)


# Lookups.


def _lookups(build: Callable[[], nn.Module], peer: Any, effort: float) -> Figures:
    """Milliseconds that a load takes longer if its publication is looked up first; and those of an actor's empty call."""
    publication = zerocopy.publish(_distinct(build), name=NAME)
    kinds = {
        "load": publication.load,
        "lookup": lambda: zerocopy.lookup(NAME).load(),
        "call": lambda: ray.get(peer.nothing.remote()),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(count(LOOKUPS, effort)):
        for kind, act in kinds.items():
            taken[kind].append(1000 * _seconds(act))
    zerocopy.remove(NAME)
    middle = {kind: median(values) for kind, values in taken.items()}
    return {"lookup": middle["lookup"] - middle["load"], "empty_call": middle["call"]}


# Updates.


def _updates(build: Callable[[], nn.Module], peers: list[Any], effort: float) -> Figures:
    """Seconds from the commit of a version until all processes have it, of the slowest version."""
    model, chosen = _distinct(build), _draws(2)
    zerocopy.publish(model, name=NAME)
    ray.get([peer.follow.remote(zerocopy.lookup(NAME)) for peer in peers])
    first, taken = zerocopy.lookup(NAME).version.number, []
    for number in range(first + 1, first + 1 + count(UPDATES, effort)):
        seen = [peer.wait_for.remote(number) for peer in peers]
        with _commits() as committed:
            _publish_changed(model, _draw(model, chosen))
        taken.append(max(ray.get(seen)) - committed[-1])
    zerocopy.remove(NAME)
    return {"update": max(taken), "update_median": median(taken)}


@contextmanager
def _commits() -> Iterator[list[float]]:
    """When this process asked the registry to commit. It is done a moment later."""
    submit, found = client.submit, list[float]()

    def noted(actor: Any, method: str, *args: Any) -> Any:
        if method == "commit":
            found.append(time.monotonic())
        return submit(actor, method, *args)

    client.submit = noted
    try:
        yield found
    finally:
        client.submit = submit


# The registry.


def _resolves(peers: list[Any], effort: float) -> Figures:
    """How many resolves the registry answers in a second, and in a second of its processor time: that is of one core."""
    zerocopy.publish(nn.Linear(64, 64), name=NAME)
    ray.get([peer.resolve.remote(2 * IN_FLIGHT) for peer in peers])
    process, calls = psutil.Process(_registry_pid()), count(RESOLVES, effort)
    before = process.cpu_times()
    seconds = _seconds(lambda: ray.get([peer.resolve.remote(calls) for peer in peers]))
    after = process.cpu_times()
    zerocopy.remove(NAME)
    processor = after.user + after.system - before.user - before.system
    return {"resolves": len(peers) * calls / seconds, "resolves_of_a_core": len(peers) * calls / processor}


def _registry_pid() -> int:
    found: int = ray.get(client.registry().__ray_call__.remote(lambda _: os.getpid()))
    return found


def _polls(effort: float) -> Figures:
    """With many polls pending: how many are held, what a resolve takes meanwhile, and until a commit has woken all."""
    zerocopy.publish(nn.Linear(64, 64), name=NAME)
    number, registry = zerocopy.lookup(NAME).version.number, client.registry()
    known = {(NAME, "latest"): number}
    refs = [client.submit(registry, "poll", known, []) for _ in range(count(POLLS, effort))]
    resolves = [_seconds(lambda: client.ask("resolve", NAME, "latest")) for _ in range(count(LOOKUPS, effort))]
    _, pending = ray.wait(refs, num_returns=len(refs), timeout=0)
    with _commits() as committed:
        zerocopy.publish(nn.Linear(64, 64), name=NAME)
    replies = ray.get(refs)
    seconds = time.monotonic() - committed[-1]
    woken = sum(changed == {(NAME, "latest"): number + 1} for _, (changed, _) in replies)
    zerocopy.remove(NAME)
    held = min(len(pending), woken)
    return {"held": held, "resolve_meanwhile": 1000 * median(resolves[1:]), "woken": seconds}
