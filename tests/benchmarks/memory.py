"""How much memory does a process tree take, now and at its peak? psutil asks the kernel (Linux).

If this file is run as a program, it samples the processes whose ids are its arguments, until its input closes. Then it
prints the largest sum. It is a separate process, without torch, because a thread would wait while the publisher holds
the GIL.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import psutil


def tree(root: int) -> list[int]:
    """The process `root` and all its descendants."""
    return [root, *(process.pid for process in psutil.Process(root).children(recursive=True))]


def raylets(root: int) -> list[int]:
    """The raylets among the descendants of `root`. They hold Ray's object store."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # the process has ended
            if process.name() == "raylet":
                found.append(process.pid)
    return found


def resident(pids: Iterable[int]) -> int:
    """The sum of the proportional set sizes (PSS) of processes, in bytes. Pages that only they share count once."""
    return sum(_proportional(pid) for pid in pids)


def _proportional(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.Error:  # the process has ended, or belongs to another user
        return 0


def settled(root: int, seconds: float = 20, calm: float = 1.5) -> int:
    """The bytes of the tree when no process has started or ended for `calm` seconds, at the latest after `seconds`."""
    deadline, since, before = time.monotonic() + seconds, time.monotonic(), tree(root)
    while time.monotonic() - since < calm and time.monotonic() < deadline:
        time.sleep(0.1)
        now = tree(root)
        if now != before:
            since, before = time.monotonic(), now
    return resident(tree(root))


def available() -> int:
    """The bytes of memory that are available to new processes on this machine."""
    return int(psutil.virtual_memory().available)


class Peak:
    """Samples processes from outside until `__exit__`. Then `bytes` is the largest sum of their PSS."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self.bytes = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", __file__, *map(str, self._pids)]
        self._sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bytes = int(self._sampler.communicate()[0] or 0)


def _sample(pids: list[int]) -> None:
    largest = resident(pids)
    print("sampling", flush=True)
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        largest = max(largest, resident(pids))
    print(max(largest, resident(pids)))


if __name__ == "__main__":
    _sample([int(argument) for argument in sys.argv[1:]])
