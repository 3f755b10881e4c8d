"""How much memory do the processes of this node really take: measured by the kernel, process by process (Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
import psutil

from zerocopy._compat import linux
from zerocopy._compat.ray import WORKER_TITLE, is_store_file, raylets, workers_of
from zerocopy._tables import as_html, as_text, format_bytes


@attrs.frozen
class ProcessMemory:
    """One process' memory in bytes.

    Attributes:
        pid: its process id.
        name: what it runs.
        private: anonymous memory: what the process would give back if it ended. Written pages of a private mapping count.
        mapped: resident pages of the object store that it has mapped.
        share: its proportional share (PSS) of those pages; summed over all processes, each page counts once.
        total: its proportional share of all memory (PSS): private, store, libraries.
    """

    pid: int
    name: str
    private: int
    mapped: int
    share: int
    total: int

    @property
    def saved(self) -> int:
        """Bytes that the process would take more, had it a copy of its own."""
        return self.mapped - self.share


@attrs.frozen(repr=False)
class MemoryReport:
    """The memory of some processes. Prints as a table, in a notebook as HTML."""

    processes: tuple[ProcessMemory, ...]

    @property
    def shared(self) -> int:
        """Resident bytes of the object store, each page counted by the shares of these processes: once, if all are here."""
        return sum(process.share for process in self.processes)

    @property
    def private(self) -> int:
        """Anonymous memory of all processes."""
        return sum(process.private for process in self.processes)

    @property
    def total(self) -> int:
        """Proportional share of all processes together (PSS)."""
        return sum(process.total for process in self.processes)

    def __str__(self) -> str:
        return as_text(_HEADERS, self._rows(), right=_HEADERS[1:])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(_HEADERS, self._rows())

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for process in self.processes:
            counts = (process.private, process.mapped, process.saved, process.total)
            yield (process.name, str(process.pid), *map(format_bytes, counts))
        saved = sum(process.saved for process in self.processes)
        yield ("together", "", *map(format_bytes, (self.private, self.shared, saved, self.total)))


_HEADERS = ("process", "pid", "private", "shared", "saved", "PSS")


def memory_report(pids: Iterable[int] | None = None) -> MemoryReport:
    """Measure this process, the raylets of this node and their workers, or the processes `pids`.

    Processes that have ended, or that belong to another user, are left out. Linux only: its kernel tells what each mapping takes.
    """
    wanted = list(pids) if pids is not None else [os.getpid(), *_ray_processes()]
    measured = (_measure(pid) for pid in dict.fromkeys(wanted))
    return MemoryReport(tuple(process for process in measured if process is not None))


def private_bytes(pid: int | None = None) -> int:
    """Anonymous memory of a process (this one by default), in bytes."""
    anonymous = linux.anonymous_bytes(pid or os.getpid())
    if anonymous is None:
        raise ValueError(f"the kernel does not tell the anonymous memory of process {pid}")
    return anonymous


def _ray_processes() -> Iterator[int]:
    found = list(raylets())
    yield from (raylet.pid for raylet in found)
    yield from (worker.pid for raylet in found for worker in workers_of(raylet))


def _measure(pid: int) -> ProcessMemory | None:
    try:
        name = _name(psutil.Process(pid))
        # All figures from one reading, so that they are of one moment: psutil would tell the total, of another one.
        used = linux.usage(pid)
    except (OSError, psutil.Error):  # ended, or another user's
        return None
    if not used:  # ended, but not yet waited for
        return None
    private = sum(usage.anonymous for _, usage in used)
    total = sum(usage.share for _, usage in used)
    of_store = [usage for mapping, usage in used if is_store_file(mapping.path)]
    # Written pages of a private mapping are no longer the store's.
    mapped = sum(usage.resident - usage.anonymous for usage in of_store)
    share = sum(usage.share - usage.anonymous for usage in of_store)
    return ProcessMemory(pid, name, private, mapped, share, total)


def _name(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "this process"
    words = process.cmdline() or [""]
    title = " ".join(words).rstrip()  # Ray's may have spaces, at which psutil splits them
    return title if title.startswith(WORKER_TITLE) else Path(words[0]).name
