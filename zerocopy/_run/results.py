"""How do results of many calls come back: in order, with a bounded number of calls under way, and a bar."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

import ray

from zerocopy._progress import progress_bar
from zerocopy._store import object_store

T = TypeVar("T")


def default_in_flight() -> int:
    """Twice the CPUs of the cluster, so that none waits for the driver."""
    cpus: float = ray.cluster_resources().get("CPU", 1)
    return max(4, 2 * math.ceil(cpus))


def in_order(
    submit: Callable[[T], ray.ObjectRef[Any]],
    items: Iterable[T],
    max_in_flight: int,
    description: str,
    *,
    progress: bool = True,
) -> Iterator[Any]:
    """Results in the order of `items`, with at most `max_in_flight` calls under way.

    The first error cancels the calls under way and is raised. Abandoning the iterator cancels them too.
    """
    pending: deque[ray.ObjectRef[Any]] = deque()
    try:
        total = len(items) if isinstance(items, Sized) else None
        with progress_bar(description, total, shown=progress and not object_store.is_worker()) as bar:
            done = itertools.count(1)

            def next_result() -> Any:
                result = ray.get(pending.popleft())
                if bar:
                    bar(next(done))
                return result

            for item in items:
                if len(pending) >= max_in_flight:
                    yield next_result()
                pending.append(submit(item))
            while pending:
                yield next_result()
    finally:
        for refs in pending:
            for ref in refs if isinstance(refs, list) else [refs]:  # a list with num_returns
                ray.cancel(ref)
