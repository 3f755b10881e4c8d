"""How much memory does one process use? The kernel measures it for each mapping (Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import attrs
import psutil

from zerocopy._compat import linux
from zerocopy._compat.ray import WORKER_TITLE, is_store_file


@attrs.frozen
class ProcessMemory:
    """The memory of one process, in bytes.

    Attributes:
        pid: its process id.
        name: name of its program, or the title of a worker of Ray, such as `ray::Worker`.
        private: its anonymous memory, which would be free if it ended. Written pages of a private mapping are included.
        mapped: resident pages of the object store that it has mapped.
        share: its proportional share (PSS) of those pages. In the sum over all processes, each page counts once.
        total: its proportional share (PSS) of all memory: private, store, libraries.
        dirtied: the part of the private memory that is written pages of the store.
        node: id of its node; empty without Ray.
    """

    pid: int
    name: str
    private: int
    mapped: int
    share: int
    total: int
    dirtied: int = 0
    node: str = ""

    @property
    def saved(self) -> int:
        """Bytes that the process would take in addition if it had its own copy of the pages that it has touched."""
        return self.mapped - self.share


Used = list[tuple[linux.Mapping, linux.Usage]]


class Measured(NamedTuple):
    """The figures of some processes.

    Attributes:
        processes: one entry for each process that runs and that this process may inspect.
        of_store: the figures of each mapping of the store, by process id.
        notes: missing figures, in words.
    """

    processes: list[ProcessMemory]
    of_store: dict[int, Used]
    notes: list[str]


def measure(pids: Iterable[int], node: str, *, is_here: bool = True) -> Measured:
    """Measure processes.

    Args:
        node: the id of their node.
        is_here: whether this process is called "this process".
    """
    found = Measured([], {}, [])
    notes: dict[str, None] = {}
    untold: list[int] = []
    for pid in dict.fromkeys(pids):
        try:
            process, used = _measure(pid, node, is_here=is_here)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except (OSError, psutil.Error):
            untold.append(pid)
            continue
        if process is not None:
            found.processes.append(process)
        if used is None:
            notes[linux.NO_SHARES] = None
        found.of_store[pid] = used or []
    if untold:
        notes[f"Left out, because this process may not look into them: {', '.join(map(str, untold))}."] = None
    if (reason := linux.why_nothing_is_told()) is not None:
        notes[f"No process can be measured: {reason}."] = None
    found.notes.extend(notes)
    return found


def _measure(pid: int, node: str, *, is_here: bool) -> tuple[ProcessMemory | None, Used | None]:
    """Return the memory of a process, None if it is a zombie; and its mappings of the store, None if they are not reported."""
    name = _name(psutil.Process(pid), is_here=is_here)
    # All figures come from one reading, so that they belong to one moment. psutil would read the total at another moment.
    used = linux.usage(pid)
    if used is None:
        return _measure_roughly(pid, name, node), None
    if not used:
        return None, []
    private = sum(usage.anonymous for _, usage in used)
    total = sum(usage.share for _, usage in used)
    of_store = [(mapping, usage) for mapping, usage in used if is_store_file(mapping.path)]
    # Written pages of a private mapping are no longer pages of the store.
    mapped = sum(usage.resident - usage.anonymous for _, usage in of_store)
    share = sum(usage.share - usage.anonymous for _, usage in of_store)
    dirtied = sum(usage.anonymous for _, usage in of_store)
    return ProcessMemory(pid, name, private, mapped, share, total, dirtied, node), of_store


def _measure_roughly(pid: int, name: str, node: str) -> ProcessMemory | None:
    """Return the memory of a process from its status file, which has no proportional shares and no single mappings."""
    sizes = linux.resident(pid)
    if "VmRSS" not in sizes:  # it has ended
        return None
    mapped = sizes.get("RssShmem", 0)
    return ProcessMemory(pid, name, sizes.get("RssAnon", 0), mapped, mapped, sizes["VmRSS"], node=node)


def _name(process: psutil.Process, *, is_here: bool) -> str:
    if is_here and process.pid == os.getpid():
        return "this process"
    words = process.cmdline() or [""]
    title = " ".join(words).rstrip()  # psutil splits at spaces, and Ray's titles may contain spaces
    return title if title.startswith(WORKER_TITLE) else Path(words[0]).name
