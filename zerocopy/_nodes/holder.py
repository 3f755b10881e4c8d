"""What keeps weights on a node? An actor on the node, which holds buffers of their objects until they are released.

Without it, Ray may evict copies that came from another node as soon as no process of this node uses them. The actor also maps the
pages, so that they count as shared: if only one process mapped them, Ray's memory monitor would count all of them for it.

This file is pickled by value for the actors. So they need not import torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zerocopy._compat.owners import buffers_of_objects

PAGE = 4096  # bytes: the size of a page, or a part of it
AT_ONE_TIME = 64  # calls of an actor

Ref: TypeAlias = Any  # an object reference


class Holder:
    """The actor. While one call waits for objects, other calls run."""

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
        """Release the objects that are kept for `key`."""
        self._held.pop(key, None)


class Holders:
    """One actor per node, created when it is first needed. The actors end with the process that created them."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}

    def on(self, node: str) -> Any:
        """Return the actor of a node."""
        if node not in self._actors:
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            remote: Any = ray.remote(Holder)
            self._actors[node] = remote.options(
                num_cpus=0, max_concurrency=AT_ONE_TIME, enable_task_events=False, scheduling_strategy=on_node
            ).remote()
        return self._actors[node]

    def release(self, key: Hashable) -> None:
        """Let all nodes release the objects that they keep for `key`."""
        for actor in self._actors.values():
            actor.release.remote(key)

    def forget(self, actor: Any) -> None:
        """Forget an actor that has ended. Another one is created when it is needed."""
        self._actors = {node: other for node, other in self._actors.items() if other is not actor}
