"""What the registry of names can do, taken inside a trial: its rate, and how many wait for changes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psutil
import ray
from torch import nn

import zerocopy
from zerocopy._cluster import client

NAME = "bench"
IN_FLIGHT, RESOLVES = 100, 1500  # resolves of each process: under way, and altogether
POLLS = 3000
MEANWHILE = 60  # resolves while they are pending

Figures = dict[str, float]


def count(full: int, effort: float) -> int:
    """How often something is done that a full run does so often."""
    return max(2, round(full * effort))


def seconds_of(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


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


@contextmanager
def commits() -> Iterator[list[float]]:
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


def resolves(peers: list[Any], effort: float) -> Figures:
    """How many resolves the registry answers in a second, and in a second of its processor time: that is of one core."""
    zerocopy.publish(nn.Linear(64, 64), name=NAME)
    ray.get([peer.resolve.remote(2 * IN_FLIGHT) for peer in peers])
    process, calls = psutil.Process(_registry_pid()), count(RESOLVES, effort)
    before = process.cpu_times()
    seconds = seconds_of(lambda: ray.get([peer.resolve.remote(calls) for peer in peers]))
    after = process.cpu_times()
    zerocopy.remove(NAME)
    processor = after.user + after.system - before.user - before.system
    return {"resolves": len(peers) * calls / seconds, "resolves_of_a_core": len(peers) * calls / processor}


def _registry_pid() -> int:
    found: int = ray.get(client.registry().__ray_call__.remote(lambda _: os.getpid()))
    return found


def polls(effort: float) -> Figures:
    """With many polls pending: how many are held, what a resolve takes meanwhile, and until a commit has woken all."""
    zerocopy.publish(nn.Linear(64, 64), name=NAME)
    number, registry = zerocopy.lookup(NAME).version.number, client.registry()
    known = {(NAME, "latest"): number}
    refs = [client.submit(registry, "poll", known, [], "benchmark") for _ in range(count(POLLS, effort))]
    taken = [seconds_of(lambda: client.ask("resolve", NAME, "latest")) for _ in range(count(MEANWHILE, effort))]
    _, pending = ray.wait(refs, num_returns=len(refs), timeout=0)
    with commits() as committed:
        zerocopy.publish(nn.Linear(64, 64), name=NAME)
    replies = ray.get(refs)
    seconds = time.monotonic() - committed[-1]
    woken = sum(changed == {(NAME, "latest"): number + 1} for _, (changed, _) in replies)
    zerocopy.remove(NAME)
    held = min(len(pending), woken)
    return {"held": held, "resolve_meanwhile": 1000 * median(taken[1:]), "woken": seconds}
