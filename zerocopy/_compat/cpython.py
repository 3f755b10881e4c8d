"""What does the garbage collector have to do with thousands of new objects that are all going to stay: nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused(*, promote: bool = False) -> Iterator[None]:
    """Keep the garbage collector from looking at everything again and again while objects are made.

    Args:
        promote: count what was made as old at once: the collector would look at it just to find out that it stays. Nothing that
            happens often may ask for it, because only the survivors of a look are counted for when to look at old objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if promote and was_enabled and not gc.get_freeze_count():
            gc.freeze()  # moves all objects out of their generations, and
            gc.unfreeze()  # into the oldest: both link two lists
    finally:
        if was_enabled:
            gc.enable()
