"""Which fault was made, what did the reader get, and after how many seconds? `nox -s faults` writes it to docs/reliability.md.

A test of a fault measures with `fault`, in its own process or in a program that it runs. It fails if the result takes longer
than the bound that the documentation promises.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

BOUND = 15.0  # seconds from a fault to a right answer or a clear error
_MARK = "FAULT "  # starts a line in the output of a program
_TABLES = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)", re.DOTALL)


@attrs.define
class Fault:
    """A row of the table.

    Attributes:
        kind: the heading of its table.
        what: the fault that was made.
        result: the result that the reader got.
        seconds: the time from the fault to this result.
    """

    kind: str
    what: str
    result: str = ""
    seconds: float = 0.0
    _start: float = attrs.field(factory=time.monotonic)

    def happened_at(self, moment: float) -> None:
        """Set the time of a fault after the start of the block, as `time.monotonic` of any process of the machine."""
        self._start = moment

    def ends(self) -> None:
        """Measure the time."""
        self.seconds = time.monotonic() - self._start


measured: list[Fault] = []


@contextlib.contextmanager
def fault(kind: str, what: str, *, bound: float = BOUND) -> Iterator[Fault]:
    """Measure the time of the block, which begins when the fault is made. The block must set the result that the reader got.

    Raises:
        AssertionError: the block took longer than `bound` seconds, or set no result.
    """
    found = Fault(kind, what)
    yield found
    found.ends()
    assert found.result, f"{what}: and then?"
    assert found.seconds < bound, f"{what}: {found.result} after {found.seconds:.1f} s"
    measured.append(found)
    line = _MARK + json.dumps([found.kind, found.what, found.result, found.seconds])
    print(f"{line}\n", end="", flush=True)  # at once: other threads print as well


def read(output: str) -> dict[str, str]:
    """The results of the faults that a program measured, by fault. They also count as measured by this process."""
    lines = (line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK))
    told = [Fault(*json.loads(line)) for line in lines]
    measured.extend(told)
    return {one.what: one.result for one in told}


def write(page: Path, faults: list[Fault]) -> None:
    """Put the tables of all measured faults between the marks of a page."""
    text = page.read_text()
    assert _TABLES.search(text), f"{page} has no place for the tables"
    kinds = sorted({one.kind for one in faults})
    tables = "\n".join(_table(kind, [one for one in faults if one.kind == kind]) for kind in kinds)
    page.write_text(_TABLES.sub(lambda _: tables, text))


def _table(kind: str, faults: list[Fault]) -> str:
    rows = [f"| {one.what} | {one.result} | {one.seconds:.1f} |" for one in faults]
    return "\n".join(
        [f"### {kind}", "", "| what was done | what the reader got | seconds |", "| --- | --- | ---: |", *rows, ""]
    )
