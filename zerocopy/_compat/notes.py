"""How does a process leave notes that others can read while it is busy, and that vanish with it?

The notes are lines in anonymous memory with a descriptor. Whoever may look into a process finds that among its open files, and no
file is left behind. https://man7.org/linux/man-pages/man2/memfd_create.2.html
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_NAME = "zerocopy-notes"
_LINK = f"/memfd:{_NAME}"  # how its link among the open files starts


class Notes:
    """The lines that this process has left. Where the system has no such memory, nobody reads them."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._owner = 0

    def add(self, lines: Iterable[str]) -> None:
        """Add lines. In a forked child, whose descriptor is its parent's, they follow a copy of the parent's lines."""
        if self._owner != os.getpid():
            earlier = notes_of(os.getpid()) if self._descriptor >= 0 else []
            self.replace([*earlier, *lines])
        else:
            self._write(self._descriptor, lines)

    def replace(self, lines: Iterable[str]) -> None:
        """Leave these lines alone. A reader sees the former ones, the new ones, or both."""
        former, self._descriptor = self._descriptor, os.memfd_create(_NAME) if hasattr(os, "memfd_create") else -1
        self._owner = os.getpid()
        self._write(self._descriptor, lines)
        if former >= 0:
            os.close(former)

    @staticmethod
    def _write(descriptor: int, lines: Iterable[str]) -> None:
        if descriptor >= 0:
            os.write(descriptor, "".join(f"{line}\n" for line in lines).encode())


def notes_of(pid: int) -> list[str]:
    """The lines that a process has left, oldest first. None of one that has ended, or is another user's."""
    found: list[str] = []
    try:
        entries = sorted(os.scandir(f"/proc/{pid}/fd"), key=lambda entry: int(entry.name))
    except OSError:
        return found
    for entry in entries:
        try:
            if str(Path(entry.path).readlink()).startswith(_LINK):
                *lines, _ = Path(entry.path).read_text().split("\n")  # the last one may be half written
                found += lines
        except OSError:  # it was closed in the meantime
            continue
    return found
