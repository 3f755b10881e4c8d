"""How does a process leave notes that other processes can read while it is busy, and that disappear when it ends?

The notes are lines in anonymous memory with a descriptor. A process that may inspect this process finds the descriptor among its
open files. No file is left behind. https://man7.org/linux/man-pages/man2/memfd_create.2.html
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_NAME = "zerocopy-notes"
_LEAST = 1 << 14  # minimum bytes of the memory
_LINK = f"/memfd:{_NAME}"  # start of the link target of its descriptor


class Notes:
    """The notes of this process. If the system has no such memory, the notes are not kept.

    They are written to mapped memory, which takes a tenth of the time of a system call.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)
        self._descriptor = -1
        self._end = 0
        self._owner = 0

    def add(self, lines: Iterable[str]) -> None:
        """Add lines. A forked child gets its own memory, where the new lines follow a copy of the parent's lines."""
        text = "".join(f"{line}\n" for line in lines).encode()
        if self._owner != os.getpid():
            earlier = self._memory[: self._end]
            self._open()
            text = earlier + text
        self._write(text)

    def replace(self, lines: Iterable[str]) -> None:
        """Replace all lines. A reader sees the old lines, the new lines, or both."""
        former, self._descriptor = self._descriptor, -1
        self._open()
        self.add(lines)
        if former >= 0:
            os.close(former)

    def _open(self) -> None:
        """Start with new memory. A forked child closes its copy of the parent's descriptor."""
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
    """Return the notes of a process, oldest first. The list is empty if it has ended or belongs to another user."""
    found: list[str] = []
    seen: set[int] = set()  # Python's mmap keeps a duplicate of the descriptor
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
