"""How do the results of many calls come back? In order, with a limited number of calls in flight, and with a progress bar."""

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

SLOW_SECONDS = 10.0  # a result that takes longer is slow


def default_in_flight() -> int:
    """Twice the CPUs of the cluster, at least 4, so that no CPU waits for the driver."""
    cpus: float = ray.cluster_resources().get("CPU", 1)
    return max(4, 2 * math.ceil(cpus))


def in_order(
    submit: Callable[[T], ray.ObjectRef[Any]],
    items: Iterable[T],
    max_in_flight: int,
    description: str,
    *,
    progress: bool = True,
    when_slow: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """Yields the results in the order of `items`, with at most `max_in_flight` calls in flight.

    `when_slow` is called once, at the first result that takes more than `SLOW_SECONDS`.

    The first error cancels the calls in flight and is raised. Abandoning the iterator cancels them too.
    """
    pending: deque[ray.ObjectRef[Any]] = deque()
    try:
        total = len(items) if isinstance(items, Sized) else None
        with progress_bar(description, total, shown=progress and not object_store.is_worker()) as bar:
            done = itertools.count(1)

            def next_result() -> Any:
                nonlocal when_slow
                ref = pending.popleft()
                if when_slow is not None and not _comes_soon(ref):
                    when_slow()
                    when_slow = None
                result = ray.get(ref)
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


def _comes_soon(result: Any) -> bool:
    refs = result if isinstance(result, list) else [result]
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=SLOW_SECONDS, fetch_local=False)
    return len(ready) == len(refs)
