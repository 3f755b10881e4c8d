"""How much memory do the processes of this node really take: measured by the kernel, process by process (Linux)."""

from __future__ import annotations

import html
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
    """The memory of some processes. Prints as a table, in a notebook as HTML.

    Attributes:
        processes: one entry for each.
        notes: what the kernel does not tell here, and what stands in the table instead.
    """

    processes: tuple[ProcessMemory, ...]
    notes: tuple[str, ...] = ()

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
        return "\n".join([as_text(_HEADERS, self._rows(), right=_HEADERS[1:]), *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(_HEADERS, self._rows()) + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for process in self.processes:
            counts = (process.private, process.mapped, process.saved, process.total)
            yield (process.name, str(process.pid), *map(format_bytes, counts))
        saved = sum(process.saved for process in self.processes)
        yield ("together", "", *map(format_bytes, (self.private, self.shared, saved, self.total)))


_HEADERS = ("process", "pid", "private", "shared", "saved", "PSS")


def memory_report(pids: Iterable[int] | None = None) -> MemoryReport:
    """Measure this process, the raylets of this node and their workers, or the processes `pids`.

    Processes that have ended are left out; also those that the kernel does not tell of, such as another user's, and a note of the
    report says so. Where it tells less (gVisor, a hardened kernel), a note says what is missing and what is told instead. Linux
    only: its kernel tells what each mapping takes.
    """
    wanted = list(pids) if pids is not None else [os.getpid(), *_ray_processes()]
    measured: list[ProcessMemory] = []
    notes: dict[str, None] = {}
    untold: list[int] = []
    for pid in dict.fromkeys(wanted):
        try:
            process, has_shares = _measure(pid)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except (OSError, psutil.Error):
            untold.append(pid)
            continue
        if process is not None:
            measured.append(process)
        if not has_shares:
            notes[linux.NO_SHARES] = None
    if untold:
        notes[f"Left out, because this process may not look into them: {', '.join(map(str, untold))}."] = None
    if (reason := linux.why_nothing_is_told()) is not None:
        notes[f"Nothing is told of any process: {reason}."] = None
    return MemoryReport(tuple(measured), tuple(notes))


def private_bytes(pid: int | None = None) -> int:
    """Anonymous memory of a process (this one by default), in bytes.

    Raises:
        ValueError: the kernel does not tell it.
        OSError: the process has ended, or is another user's.
    """
    pid = pid or os.getpid()
    if (reason := linux.why_nothing_is_told()) is not None:
        raise ValueError(f"The memory of process {pid} is not told: {reason}.")
    anonymous = linux.anonymous_bytes(pid)
    if anonymous is None:
        raise ValueError(f"The memory of process {pid} is not told: {linux.NO_ANONYMOUS}.")
    return anonymous


def _ray_processes() -> Iterator[int]:
    found = list(raylets())
    yield from (raylet.pid for raylet in found)
    yield from (worker.pid for raylet in found for worker in workers_of(raylet))


def _measure(pid: int) -> tuple[ProcessMemory | None, bool]:
    """The memory of a process, None of one that has ended and was not waited for; and whether the kernel tells shares."""
    name = _name(psutil.Process(pid))
    # All figures from one reading, so that they are of one moment: psutil would tell the total, of another one.
    used = linux.usage(pid)
    if used is None:
        return _measure_roughly(pid, name), False
    if not used:
        return None, True
    private = sum(usage.anonymous for _, usage in used)
    total = sum(usage.share for _, usage in used)
    of_store = [usage for mapping, usage in used if is_store_file(mapping.path)]
    # Written pages of a private mapping are no longer the store's.
    mapped = sum(usage.resident - usage.anonymous for usage in of_store)
    share = sum(usage.share - usage.anonymous for usage in of_store)
    return ProcessMemory(pid, name, private, mapped, share, total), True


def _measure_roughly(pid: int, name: str) -> ProcessMemory | None:
    """What a process takes as far as its status tells, which knows no shares and no single mappings."""
    sizes = linux.resident(pid)
    if "VmRSS" not in sizes:  # it has ended
        return None
    mapped = sizes.get("RssShmem", 0)
    return ProcessMemory(pid, name, sizes.get("RssAnon", 0), mapped, mapped, sizes["VmRSS"])


def _name(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "this process"
    words = process.cmdline() or [""]
    title = " ".join(words).rstrip()  # Ray's may have spaces, at which psutil splits them
    return title if title.startswith(WORKER_TITLE) else Path(words[0]).name
