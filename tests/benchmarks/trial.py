"""What does one new process measure? The runner sends it this record."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.frozen
class Trial:
    """What to measure.

    Attributes:
        model: a name that `models.find` knows.
        system: a name that `systems.find` knows; empty for `facts` and `names`, which need no system.
        measure: the name of a function of `measures`, or `names`.
        workers: the number of workers, which is also the number of CPUs of Ray.
        counts: the numbers of workers that use the model when memory is measured, one after the other.
        store: the size of the object store, in bytes.
        effort: a factor for the number of repetitions of short operations; 1 in a full run.
    """

    model: str
    system: str = ""
    measure: str = "facts"
    workers: int = 1
    counts: Sequence[int] = ()
    store: int = 0
    effort: float = 1.0


MARK = "zerocopy-bench: "  # begins the line with the results, because Ray and Ray Data may also print lines
