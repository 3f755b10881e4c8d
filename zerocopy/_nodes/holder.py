"""What keeps weights on a node? An actor there that has their objects open, as long as somebody wants them.

Ray evicts copies that came from another node as soon as no process of the node uses them. The actor also maps the pages, so that
they count as shared: a process that maps them alone is charged for all of them by Ray's memory monitor.

This file travels to the actors by value. So they need not import torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zerocopy._compat.owners import buffers_of_objects

PAGE = 4096  # bytes, or a part of a page
AT_ONE_TIME = 64  # objects

Ref: TypeAlias = Any  # an object reference


class Holder:
    """The actor. Others of its calls run while it waits for objects."""

    def __init__(self) -> None:
        self._held: dict[Hashable, dict[bytes, Any]] = {}

    def hold(self, key: Hashable, refs: Sequence[Ref]) -> None:
        """Bring objects to this node and keep them until `key` is released."""
        held = self._held.setdefault(key, {})
        ray.wait(list(refs), num_returns=len(refs), timeout=0)  # all are pulled from now on, in this order
        for ref in refs:
            (held[ref.binary()],) = (buffer,) = buffers_of_objects([ref])
            bytes(memoryview(buffer)[::PAGE])  # maps the pages

    def release(self, key: Hashable) -> None:
        """Let go of what is kept for `key`."""
        self._held.pop(key, None)


class Holders:
    """One actor for each node, made when it is first needed. They end with the process that has made them."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}

    def on(self, node: str) -> Any:
        """The actor of a node."""
        if node not in self._actors:
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            remote: Any = ray.remote(Holder)
            self._actors[node] = remote.options(
                num_cpus=0, max_concurrency=AT_ONE_TIME, enable_task_events=False, scheduling_strategy=on_node
            ).remote()
        return self._actors[node]

    def release(self, key: Hashable) -> None:
        """Let all nodes go of what they keep for `key`."""
        for actor in self._actors.values():
            actor.release.remote(key)

    def forget(self, actor: Any) -> None:
        """It has ended: make another one when one is needed."""
        self._actors = {node: other for node, other in self._actors.items() if other is not actor}
