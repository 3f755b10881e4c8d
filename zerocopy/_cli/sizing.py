"""How much memory do workers take, with and without zerocopy, and how large must the object store be?"""

from __future__ import annotations

import math
from typing import Any

import attrs

from zerocopy._compat.ray import LEAST_STORE

STEP = 10**6  # bytes that a store is rounded up to


@attrs.frozen
class Weights:
    """What a pipeline takes, in bytes.

    Attributes:
        shared: once on each node.
        copied: in each worker, and with each call that it is an argument of.
    """

    shared: int
    copied: int


@attrs.frozen
class Totals:
    """Bytes of the same workers.

    Attributes:
        zerocopy: the shared part once, the copied part in each worker.
        plain: both in each worker.
    """

    zerocopy: int
    plain: int

    @property
    def saved(self) -> int:
        """What zerocopy takes less. Negative for a single worker with nothing to share."""
        return self.plain - self.zerocopy

    def to_dict(self) -> dict[str, Any]:
        """As data."""
        return {**attrs.asdict(self), "saved": self.saved}


def on_node(weights: Weights, workers: int) -> Totals:
    """What the workers of one node take."""
    return Totals(weights.shared + workers * weights.copied, workers * (weights.shared + weights.copied))


def on_nodes(weights: Weights, workers: int, nodes: int) -> Totals:
    """What so many workers on each of so many nodes take."""
    one = on_node(weights, workers)
    return Totals(nodes * one.zerocopy, nodes * one.plain)


def store_bytes(weights: Weights, workers: int, fraction: float, versions: int = 1) -> int:
    """The `object_store_memory` that each node needs: what lies there at a time is at most `fraction` of it.

    That is the shared part of each version, and the copied part once for each worker, since a call carries it. Ray lets calls
    wait whose arguments take more than that fraction together, and publishing warns of weights that take more.
    """
    needed = (versions * weights.shared + workers * weights.copied) / fraction
    return max(math.ceil(needed / STEP) * STEP, LEAST_STORE)
