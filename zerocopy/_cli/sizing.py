"""How much memory do workers take, with and without zerocopy, and how large must the object store be?"""

from __future__ import annotations

import math
from typing import Any

import attrs

from zerocopy._compat.ray import LEAST_STORE

STEP = 10**6  # bytes: a store is rounded up to a multiple of this


@attrs.frozen
class Weights:
    """The memory of a pipeline, in bytes.

    Attributes:
        shared: bytes that exist once per node.
        copied: bytes in each worker, and in each call that has the pipeline as an argument.
    """

    shared: int
    copied: int


@attrs.frozen
class Totals:
    """The memory of the same workers in two ways, in bytes.

    Attributes:
        zerocopy: the shared part once, the copied part in each worker.
        plain: both parts in each worker.
    """

    zerocopy: int
    plain: int

    @property
    def saved(self) -> int:
        """The bytes that zerocopy saves. 0 with a single worker per node."""
        return self.plain - self.zerocopy

    def to_dict(self) -> dict[str, Any]:
        """As data."""
        return {**attrs.asdict(self), "saved": self.saved}


def on_node(weights: Weights, workers: int) -> Totals:
    """The memory of the workers of one node."""
    return Totals(weights.shared + workers * weights.copied, workers * (weights.shared + weights.copied))


def on_nodes(weights: Weights, workers: int, nodes: int) -> Totals:
    """The memory of `workers` workers on each of `nodes` nodes."""
    one = on_node(weights, workers)
    return Totals(nodes * one.zerocopy, nodes * one.plain)


def store_bytes(weights: Weights, workers: int, fraction: float, versions: int = 1) -> int:
    """The `object_store_memory` that each node needs, so that the weights take at most `fraction` of it at a time.

    The weights are the shared part of each version, and the copied part once per worker, because a call carries it. Ray lets
    calls wait if their arguments together take more than this fraction, and publishing warns of weights that take more.
    """
    needed = (versions * weights.shared + workers * weights.copied) / fraction
    return max(math.ceil(needed / STEP) * STEP, LEAST_STORE)
