"""The registry's process, and its end."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil
import ray

from zerocopy._cluster import client


def registry_pid() -> int:
    """The process of the registry."""
    client.ask("listed")  # another one may have been killed just before
    found: int = ray.get(client.registry().__ray_call__.remote(lambda _: os.getpid()))
    return found


def kill_registry() -> None:
    """Kill it, and wait until it is gone."""
    process = psutil.Process(registry_pid())
    process.send_signal(signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(10)
