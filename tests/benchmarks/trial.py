"""What is measured in one fresh process: the record that the runner sends to it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.frozen
class Trial:
    """What to measure.

    Attributes:
        model: a name that `models.find` knows.
        system: a name that `systems.find` knows.
        measure: a function of `measures`, or `facts`, which needs no system.
        workers: how many workers.
        counts: how many of them use the model, one after the other, when memory is measured.
        store: bytes of the object store.
        effort: a factor for how often short things are repeated: 1 in a full run.
    """

    model: str
    system: str = ""
    measure: str = "facts"
    workers: int = 1
    counts: Sequence[int] = ()
    store: int = 0
    effort: float = 1.0


MARK = "zerocopy-bench: "  # starts the line with the results: Ray and Ray Data may print too
