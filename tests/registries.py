"""How do tests find the registry's process and kill it?"""

from __future__ import annotations

import contextlib
import os
import signal

import psutil
import ray

from zerocopy._cluster import client


def registry_pid() -> int:
    """The process id of the registry."""
    client.ask("listed")  # waits for a new registry if one was just killed
    found: int = ray.get(client.registry().__ray_call__.remote(lambda _: os.getpid()))
    return found


def kill_registry() -> None:
    """Kill the registry's process and wait until it has ended."""
    process = psutil.Process(registry_pid())
    process.send_signal(signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(10)
