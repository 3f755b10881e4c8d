"""How much memory do publications and processes of this cluster really take? The kernels of its nodes measure it (Linux)."""

from __future__ import annotations

import html
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from zerocopy._cluster.listing import told_versions
from zerocopy._compat import linux
from zerocopy._seeing.accounts import PublicationMemory
from zerocopy._seeing.nodes import NodeMemory, measure_nodes, measure_processes
from zerocopy._seeing.plot import draw
from zerocopy._seeing.processes import ProcessMemory
from zerocopy._store import object_store
from zerocopy._tables import as_html, as_text, format_bytes
from zerocopy._words import check_seconds
from zerocopy.errors import ArgumentError

__all__ = ["MemoryReport", "NodeMemory", "ProcessMemory", "PublicationMemory", "memory_report", "private_bytes"]

SECONDS = 15.0  # the time limit for answers of other nodes


@attrs.frozen(repr=False)
class MemoryReport:
    """The memory of publications and processes, in bytes. Prints as two tables, in a notebook as HTML.

    Attributes:
        processes: one entry per process, of all nodes.
        notes: figures that the kernel does not report here and their replacements, and nodes that did not answer.
        nodes: the processes and publications of each node.
    """

    processes: tuple[ProcessMemory, ...]
    notes: tuple[str, ...] = ()
    nodes: tuple[NodeMemory, ...] = ()

    @classmethod
    def of_nodes(cls, nodes: Iterable[NodeMemory], notes: Iterable[str] = ()) -> MemoryReport:
        """A report of several nodes together."""
        nodes = tuple(nodes)
        told = dict.fromkeys([*(note for node in nodes for note in node.notes), *notes])
        return cls(tuple(process for node in nodes for process in node.processes), tuple(told), nodes)

    @property
    def publications(self) -> tuple[PublicationMemory, ...]:
        """One entry per publication and node."""
        return tuple(publication for node in self.nodes for publication in node.publications)

    @property
    def shared(self) -> int:
        """Resident bytes of the object stores. Each page counts once per node.

        It is never less than one copy of the publications of each node. In a report without nodes, it is the sum of the
        proportional shares of the processes.
        """
        if self.nodes:
            return sum(node.shared for node in self.nodes)
        return sum(process.share for process in self.processes)

    @property
    def private(self) -> int:
        """Bytes of anonymous memory of all processes."""
        return sum(process.private for process in self.processes)

    @property
    def dirtied(self) -> int:
        """The part of `private` that is written pages of the store: bytes that processes had mapped and then wrote to."""
        return sum(process.dirtied for process in self.processes)

    @property
    def plain(self) -> int:
        """Bytes that plain copies would take: one copy of each publication in each process that has loaded it."""
        return sum(publication.plain for publication in self.publications)

    @property
    def saved(self) -> int:
        """Bytes that plain copies would take in addition. Negative if more is published than loaded."""
        return sum(node.saved for node in self.nodes)

    @property
    def total(self) -> int:
        """Sum of the proportional shares (PSS) of all processes, in bytes."""
        return sum(process.total for process in self.processes)

    def to_dict(self) -> dict[str, Any]:
        """All figures as dicts, lists, strings and numbers. Sizes are in bytes."""
        totals = ("shared", "private", "dirtied", "plain", "saved", "total")
        return {
            "publications": [{**attrs.asdict(one), "saved": one.saved} for one in self.publications],
            "processes": [{**attrs.asdict(one), "saved": one.saved} for one in self.processes],
            "together": {total: getattr(self, total) for total in totals},
            "notes": list(self.notes),
        }

    def plot(self, file: str | os.PathLike[str] | None = None) -> Any:
        """Draw the memory that each publication takes, and the memory that plain copies would take. Needs the extra `plot`.

        Args:
            file: path of the picture. Its ending names the format. With None, no file is written.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        several = len(self.nodes) > 1
        rows = [(_title_of(one, several=several), one.shared, one.private, one.plain) for one in self.publications]
        figure = draw(rows)
        if file is not None:
            figure.savefig(Path(file), dpi=130)
        return figure

    def __str__(self) -> str:
        publications = as_text(_OF_PUBLICATIONS, self._publication_rows(), right=_COUNTS)
        processes = as_text(_OF_PROCESSES, self._process_rows(), right=_COUNTS)
        return "\n".join([publications, "", processes, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        publications = as_html(_OF_PUBLICATIONS, self._publication_rows(), right=_COUNTS, row_class="publication")
        processes = as_html(_OF_PROCESSES, self._process_rows(), right=_COUNTS)
        return publications + processes + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)

    def _publication_rows(self) -> Iterator[tuple[str, ...]]:
        for one in self.publications:
            counts = (one.shared, one.private, one.dirtied, one.plain, one.saved)
            version = "" if one.version is None else str(one.version)
            yield (one.name, version, one.kind, one.node[:8], str(one.processes), *map(format_bytes, counts))
        private = sum(one.private for one in self.publications)
        dirtied = sum(one.dirtied for one in self.publications)
        objects = sum(node.objects for node in self.nodes)
        counts = (objects, private, dirtied, self.plain, self.saved)
        yield ("together", "", "", "", "", *map(format_bytes, counts))

    def _process_rows(self) -> Iterator[tuple[str, ...]]:
        for process in self.processes:
            counts = (process.private, process.dirtied, process.mapped, process.total)
            yield (process.name, str(process.pid), process.node[:8], *map(format_bytes, counts))
        # Each mapped page counts once.
        yield ("together", "", "", *map(format_bytes, (self.private, self.dirtied, self.shared, self.total)))


_OF_PUBLICATIONS = (
    "publication", "version", "class", "node", "used by", "shared", "private", "dirtied", "plain copies", "saved"
)  # fmt: skip
_OF_PROCESSES = ("process", "pid", "node", "private", "dirtied", "mapped", "PSS")
_COUNTS = (*_OF_PUBLICATIONS[4:], "pid", *_OF_PROCESSES[3:])


def _title_of(one: PublicationMemory, *, several: bool) -> str:
    what = f"{one.name} {one.version}" if one.name else one.kind or "(not told)"
    processes = "1 process" if one.processes == 1 else f"{one.processes} processes"
    return f"{what}, {processes}" + (f", node {one.node[:8]}" if several else "")


def memory_report(pids: Iterable[int] | None = None, *, timeout: float = SECONDS) -> MemoryReport:
    """Measure the memory of publications and processes on all nodes of the cluster that this process is connected to.

    Each node measures its raylet, its workers and the drivers that are connected to it. If `pids` are given, only these
    processes are measured, and the publications that they have loaded. Without a connection to Ray, only this process is
    measured.

    Processes that have ended are left out. Processes that the kernel does not report, such as those of another user, are also
    left out, and a note in the report says so. If the kernel reports less (gVisor, a hardened kernel), a note says what is
    missing and what the report has instead. Works on Linux only, because it needs the size of each mapping from the kernel.

    Args:
        pids: process ids on this machine.
        timeout: seconds in which other nodes must answer. A note names the nodes that did not.

    Returns:
        A report. All sizes are in bytes.

    Raises:
        ArgumentError: `pids` or `timeout` are not numbers.
    """
    check_seconds(timeout)
    if pids is not None:
        pids = _checked(pids)
        return MemoryReport.of_nodes([measure_processes(pids, object_store.node())])
    if not object_store.is_running() or object_store.is_client():
        note = "Only this process was measured, because it is not connected to Ray on its node."
        return MemoryReport.of_nodes([measure_processes([os.getpid()])], [note])
    told, notes = told_versions(timeout)
    nodes, missing = measure_nodes(told, timeout)
    return MemoryReport.of_nodes(nodes, [*notes, *missing])


def _checked(pids: object) -> list[int]:
    """Process ids as integers. Integers of NumPy are accepted too."""
    found: Any = list(pids) if isinstance(pids, Iterable) else [pids]
    if not isinstance(pids, Iterable) or not all(hasattr(pid, "__index__") for pid in found):
        raise ArgumentError(f"pids={pids!r} is not a list of process ids.", hint="write pids=[os.getpid()], say.")
    return [operator.index(pid) for pid in found]


def private_bytes(pid: int | None = None) -> int:
    """Anonymous memory of a process (this one by default), in bytes.

    Raises:
        ValueError: the kernel does not report it.
        OSError: the process has ended, or belongs to another user.
    """
    pid = pid or os.getpid()
    if (reason := linux.why_nothing_is_told()) is not None:
        raise ValueError(f"The memory of process {pid} is not reported by the kernel: {reason}.")
    anonymous = linux.anonymous_bytes(pid)
    if anonymous is None:
        raise ValueError(f"The memory of process {pid} is not reported by the kernel: {linux.NO_ANONYMOUS}.")
    return anonymous
