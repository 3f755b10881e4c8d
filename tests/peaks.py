"""How do tests find the peak of this process's memory?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zerocopy.memory import private_bytes


@contextmanager
def peak_of_private_memory() -> Iterator[Callable[[], int]]:
    """Samples this process's anonymous memory every millisecond. The result is a function that returns the growth of the peak."""
    start = peak = private_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield lambda: peak - start
    finally:
        done.set()
        thread.join()
