"""How are the lost weights of a version created again? By its source, which the registry runs once for all callers.

Ray's own recovery is not used: it would run the store tasks again, but files may have changed since then, and the result would be
a mixture of two versions. Storages of a source are accepted only if their digests are the recorded digests. Processes that still
hold lost weights upload them, too: see `holding.py`.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import ray.cloudpickle

from zerocopy._cluster import client
from zerocopy._cluster.storing import store_all
from zerocopy._cluster.writing import digests_of
from zerocopy._publish.checkpoint import Checkpoint
from zerocopy._publish.weights import Streamed
from zerocopy._split.introspect import Subject, check_pipeline, introspect
from zerocopy._store.storages import Storage
from zerocopy._store.write import STREAMED, layout
from zerocopy._tables import format_bytes
from zerocopy._words import first_line
from zerocopy.errors import ArgumentError

MOST_SOURCE = 10 << 20  # bytes: functions and configs are smaller, weights are larger


def packed_source(source: Callable[[], Any]) -> bytes:
    """Pickle a source, as a call that uploads missing storages for the registry.

    Raises:
        ArgumentError: it cannot be pickled, or its pickle is so large that it must contain the weights.
    """
    try:
        packed: bytes = ray.cloudpickle.dumps(functools.partial(_offer_source, source))
    except (TypeError, pickle.PicklingError) as error:
        raise ArgumentError(
            f"source={source!r} cannot be pickled, so no other process could run it: {first_line(error)}",
            hint="give a function that makes everything it needs, and captures nothing that belongs to this process.",
        ) from error
    if len(packed) > MOST_SOURCE:
        raise ArgumentError(
            f"source={source!r} captures {format_bytes(len(packed))}, which the registry would have to keep in its own memory.",
            hint="let it build or read the weights, and not return a model that it has captured.",
        )
    return packed


def packed_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Pickle a checkpoint in the same way."""
    packed: bytes = ray.cloudpickle.dumps(functools.partial(_offer_checkpoint, checkpoint))
    return packed


def offer_pipeline(pipeline: Any) -> None:
    """Upload the weights of a live pipeline that the registry lacks, so that the registry owns them."""
    _offer(Streamed(introspect(Subject(pipeline))))


def _offer_source(source: Callable[[], Any]) -> None:
    pipeline = source()
    check_pipeline(pipeline, "a source")
    offer_pipeline(pipeline)


def _offer_checkpoint(checkpoint: Checkpoint) -> None:
    _offer(checkpoint.open())


def _offer(streamed: Streamed) -> None:
    """Upload the storages that the registry lacks, so that the registry owns them."""
    storages, digests = streamed.found.table.storages, digests_of(streamed)
    wanted = set(client.ask("lacks", digests))  # first: it replaces a registry that has ended
    registry = client.registry()
    sizes = [s.nbytes if digest in wanted else 0 for s, digest in zip(storages, digests, strict=True)]
    shards = layout(sizes, streamed.found.root_ends, STREAMED)
    sources = [[storages[index] for index in shard] for shard in shards]

    def filled() -> Iterator[list[Storage]]:
        for each in sources:
            streamed.fill(each)
            yield each

    for each, given in zip(sources, store_all(registry, filled()), strict=True):
        streamed.drop(each)
        client.ask_one(registry, "offer", [given])
