"""How much can the registry of names do? A trial measures how many resolves it answers, and how many polls it holds."""

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
IN_FLIGHT, RESOLVES = 100, 1500  # resolves of each process: at most in flight, and in total
POLLS = 3000
MEANWHILE = 60  # resolves while the polls are pending

Figures = dict[str, float]


def count(full: int, effort: float) -> int:
    """How often something is repeated with this effort, if a full run repeats it `full` times. At least twice."""
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
        """Load a publication, and start to follow it."""
        self._publication = publication
        publication.current()

    def wait_for(self, number: int) -> float:
        """Wait until `current()` is this version, or a later one.

        Returns:
            The time, from a clock that all processes of this machine share.
        """
        while True:
            version = zerocopy.version_of(self._publication.current())
            if version is not None and version.number >= number:
                return time.monotonic()
            time.sleep(0.002)

    def resolve(self, count: int) -> None:
        """Send `count` calls to the registry, with at most `IN_FLIGHT` of them in flight."""
        registry, pending = client.registry(), list[Any]()
        for _ in range(count):
            if len(pending) == IN_FLIGHT:
                done, pending = ray.wait(pending, num_returns=IN_FLIGHT // 2)
                ray.get(done)
            pending.append(client.submit(registry, "resolve", NAME, "latest"))
        ray.get(pending)


@contextmanager
def commits() -> Iterator[list[float]]:
    """Yields a list, which gets the times when this process asks for a commit. The registry commits a moment later."""
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
    """Resolves that the registry answers per second, and per second of its processor time (the rate of one core)."""
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
    """The number of pending polls that the registry holds and wakes.

    Also the milliseconds of a resolve in the meantime, and the seconds until a commit has woken all polls.
    """
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
