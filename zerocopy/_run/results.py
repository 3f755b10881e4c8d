"""How do results of many calls come back: in order, with a bounded number of calls under way, and progress on a terminal."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

import ray

from zerocopy._store import object_store

T = TypeVar("T")


def default_in_flight() -> int:
    """Twice the CPUs of the cluster, so that none waits for the driver."""
    cpus: float = ray.cluster_resources().get("CPU", 1)
    return max(4, 2 * math.ceil(cpus))


def in_order(
    submit: Callable[[T], ray.ObjectRef[Any]], items: Iterable[T], max_in_flight: int, description: str
) -> Iterator[Any]:
    """Results in the order of `items`, with at most `max_in_flight` calls under way.

    The first error cancels the calls under way and is raised. Abandoning the iterator cancels them too.
    """
    pending: deque[ray.ObjectRef[Any]] = deque()
    try:
        with _progress_bar(items, description) as advance:

            def next_result() -> Any:
                result = ray.get(pending.popleft())
                advance()
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


@contextlib.contextmanager
def _progress_bar(items: Iterable[Any], description: str) -> Iterator[Callable[[], None]]:
    """Give the function to call after each result. It draws a bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal or object_store.is_worker():
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(description, total=len(items) if isinstance(items, Sized) else None)
        yield lambda: progress.advance(bar)
