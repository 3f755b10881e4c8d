"""Who keeps named weights on nodes? The holders of the registry, which stay when the process that called `prefetch` ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from zerocopy._cluster import client


class RegistrysHolders:
    """A `Keeper` for one version, which uses the registry's holders."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        self._key = key
        self._registry = client.registry()

    def hold(self, node: str, refs: Sequence[ray.ObjectRef[Any]]) -> ray.ObjectRef[Any]:
        return client.submit(self._registry, "hold", *self._key, node, list(refs))

    def outcome(self, reply: ray.ObjectRef[Any]) -> Exception | None:
        try:
            error: Exception | None = client.await_reply(self._registry, reply)
        except client.RegistryLost as lost:
            return client.unreachable(lost)
        return error
