"""How much memory do workers take with and without zerocopy?

Values are measured, or computed for other numbers of workers. They are shown as a table and as bars.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from zerocopy._tables import as_text, format_bytes
from zerocopy.memory import MemoryReport

COMPARED = (4, 8)  # numbers of workers that are shown in addition to the one that ran
BAR = 44  # characters of the longest bar


@attrs.frozen
class Taken:
    """The memory of workers of this machine, in bytes.

    Attributes:
        way: how they got the model.
        store: the loaded parts of the store, counted once.
        private: the private memory of each worker.
        files: program files, which they share among themselves and with others.
    """

    way: str
    store: int
    private: tuple[int, ...]
    files: int

    @classmethod
    def of(cls, way: str, report: MemoryReport) -> Taken:
        """The memory from a report on these workers alone."""
        private = tuple(process.private for process in report.processes)
        in_store = sum(process.share for process in report.processes)
        return cls(way, report.shared, private, report.total - report.private - in_store)

    @property
    def total(self) -> int:
        """The total memory of the workers."""
        return self.with_workers(len(self.private))

    def with_workers(self, count: int) -> int:
        """The memory of `count` workers: measured for the number that ran, else computed with the median private memory."""
        private = sum(self.private) if count == len(self.private) else int(count * statistics.median(self.private))
        return self.store + private + self.files

    def as_copies(self, weights: int) -> Taken:
        """The memory of the same workers with a copy of the weights in each, and nothing in the store."""
        return Taken("plain copies", 0, tuple(private + weights for private in self.private), self.files)


@attrs.frozen
class Bar:
    """The total of a number of workers: measured, or computed from what was measured."""

    way: str
    workers: int
    bytes: int
    is_measured: bool


def bars_of(zerocopy: Taken, plain: Taken | None, weights: int) -> list[Bar]:
    """Totals for the number of workers that ran, and for others. If `plain` was not measured, it is computed."""
    ran = len(zerocopy.private)
    copies = plain or zerocopy.as_copies(weights)
    found = []
    for count in sorted({ran, *COMPARED}):
        found.append(Bar(zerocopy.way, count, zerocopy.with_workers(count), count == ran))
        found.append(Bar("plain copies", count, copies.with_workers(count), count == ran and plain is not None))
    return found


def table_of(taken: Sequence[Taken]) -> str:
    """A table with one column for each way."""
    rows = [("object store, shared", *(format_bytes(one.store) for one in taken))]
    for number in range(max(len(one.private) for one in taken)):
        cells = (format_bytes(one.private[number]) if number < len(one.private) else "" for one in taken)
        rows.append((f"private to worker {number + 1}", *cells))
    rows.append(("program files, shared", *(format_bytes(one.files) for one in taken)))
    rows.append(("total", *(format_bytes(one.total) for one in taken)))
    headers = ("memory of the workers", *(one.way for one in taken))
    return as_text(headers, rows, right=headers[1:])


def chart_of(bars: Sequence[Bar]) -> str:
    """A text with one line for each bar."""
    longest = max(bar.bytes for bar in bars)
    lines = []
    for before, bar in zip((None, *bars), bars, strict=False):
        is_new = before is None or before.workers != bar.workers
        start = ("1 worker" if bar.workers == 1 else f"{bar.workers} workers") if is_new else ""
        how = "measured" if bar.is_measured else "computed"
        drawn = "█" * max(1, round(BAR * bar.bytes / longest))
        lines.append(f"{start:10}  {bar.way:12}  {drawn} {format_bytes(bar.bytes)}, {how}")
    return "\n".join(lines)


def data_of(taken: Iterable[Taken], bars: Iterable[Bar]) -> dict[str, Any]:
    """The memory and the bars as data."""
    return {
        "memory": [{**attrs.asdict(one), "total": one.total} for one in taken],
        "totals": [attrs.asdict(bar) for bar in bars],
    }
