"""How does a process leave notes that others can read while it is busy, and that vanish with it?

The notes are lines in anonymous memory with a descriptor. Whoever may look into a process finds that among its open files, and no
file is left behind. https://man7.org/linux/man-pages/man2/memfd_create.2.html
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_NAME = "zerocopy-notes"
_LEAST = 1 << 14  # bytes of the memory
_LINK = f"/memfd:{_NAME}"  # how its link among the open files starts


class Notes:
    """The lines that this process has left. Where the system has no such memory, nobody reads them.

    They are written to mapped memory, which takes a tenth of the time that a system call does.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)
        self._descriptor = -1
        self._end = 0
        self._owner = 0

    def add(self, lines: Iterable[str]) -> None:
        """Add lines. In a forked child, whose memory is its parent's, they follow a copy of the parent's lines."""
        text = "".join(f"{line}\n" for line in lines).encode()
        if self._owner != os.getpid():
            earlier = self._memory[: self._end]
            self._open()
            text = earlier + text
        self._write(text)

    def replace(self, lines: Iterable[str]) -> None:
        """Leave these lines alone. A reader sees the former ones, the new ones, or both."""
        former, self._descriptor = self._descriptor, -1
        self._open()
        self.add(lines)
        if former >= 0:
            os.close(former)

    def _open(self) -> None:
        """Start anew. The descriptor of a parent is closed, in this process."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = os.memfd_create(_NAME) if hasattr(os, "memfd_create") else -1
        self._memory, self._end, self._owner = mmap.mmap(-1, 1), 0, os.getpid()

    def _write(self, text: bytes) -> None:
        end = self._end + len(text)
        if self._descriptor >= 0:
            if end >= len(self._memory):
                os.ftruncate(self._descriptor, max(_LEAST, 2 * end))
                self._memory = mmap.mmap(self._descriptor, 0)
            self._memory[self._end : end] = text
            self._end = end


def notes_of(pid: int) -> list[str]:
    """The lines that a process has left, oldest first. None of one that has ended, or is another user's."""
    found: list[str] = []
    seen: set[int] = set()  # Python's mmap has a descriptor of its own of what it maps
    try:
        entries = sorted(os.scandir(f"/proc/{pid}/fd"), key=lambda entry: int(entry.name))
    except OSError:
        return found
    for entry in entries:
        try:
            if str(Path(entry.path).readlink()).startswith(_LINK) and (inode := entry.stat().st_ino) not in seen:
                seen.add(inode)
                written, _, _ = Path(entry.path).read_bytes().partition(b"\0")
                *lines, _ = written.decode().split("\n")  # the last one may be half written
                found += lines
        except OSError:  # it was closed in the meantime
            continue
    return found
