"""Which publication does each mapping of the store show? Each process writes notes, which others can read while it is busy."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from zerocopy._compat.notes import Notes, notes_of
from zerocopy._compat.ray import are_held
from zerocopy._store import object_store, windows
from zerocopy._store.windows import Window

MOST_LINES = 1024  # of notes. With more, the lines about memory that is gone are dropped
MOST_TOLD = 256  # publications without mapped memory


class About(NamedTuple):
    """Name and size of a publication.

    Attributes:
        name: name of the publication; empty if it has none.
        version: number of the version, None without a name.
        kind: name of the pipeline's class.
        nbytes: bytes of its weights.
        copied: bytes of the pickled part that each load copies.
    """

    name: str
    version: int | None
    kind: str
    nbytes: int
    copied: int

    def __str__(self) -> str:
        return f"{self.name!r} version {self.version} ({self.kind})" if self.name else f"{self.kind} (no name)"


class Told(NamedTuple):
    """A publication that some process knows.

    Attributes:
        key: id of its manifest.
        used: bytes of its weights in each object of the store, by the object's id.
    """

    key: bytes
    about: About
    used: Mapping[bytes, int]


class Shown(NamedTuple):
    """Memory of a process that shows an object of the store, from `start` to `end`.

    Attributes:
        nbytes: bytes of the object.
        is_private: whether a write copies the page.
        shard: id of the object.
        publication: id of the manifest that it was mapped for.
    """

    start: int
    end: int
    nbytes: int
    is_private: bool
    shard: bytes
    publication: bytes


class _Ledger:
    """The notes of this process."""

    def __init__(self) -> None:
        self._told: dict[bytes, Told] = {}  # oldest first
        self._notes = Notes()
        self._lines = 0
        self._lock = threading.Lock()

    def about(self, key: bytes | None) -> About | None:
        """Return the name and size of a publication, or None if this process does not know it."""
        told = self._told.get(key) if key is not None else None
        return None if told is None else told.about

    def note(self, key: bytes, about: About, used: Callable[[], Mapping[bytes, int]], memory: Iterable[Any]) -> None:
        """Note a publication, and the memory that a load of it has mapped. `used` is called only for a new publication."""
        shown = [window for one in memory if (window := getattr(one, "window", None)) and window.publication is None]
        if not shown and key in self._told:
            return
        with self._lock:
            lines = []
            if key not in self._told:
                told = self._told[key] = Told(key, about, used())
                lines.append(_line_of_told(told))
            for window in shown:
                window.publication = key
                lines.append(_line_of_window(window))
            self._lines += len(lines)
            if self._lines > MOST_LINES:
                self._rewrite()
            else:
                self._notes.add(lines)

    def drop_gone(self) -> None:
        """Forget publications that this process has not mapped, if it has no reference to them or they have left the store."""
        with self._lock:
            mapped = {window.publication for window in windows.known()}
            others = [told for key, told in self._told.items() if key not in mapped]
            gone = [told.key for told in others if not (object_store.is_running() and any(are_held(told.used)))]
            for key in gone:
                del self._told[key]
            if gone:
                self._rewrite()

    def _rewrite(self) -> None:
        mapped = [window for window in windows.known() if window.publication is not None]
        used = {window.publication for window in mapped}
        others = [key for key in self._told if key not in used][-MOST_TOLD:]
        self._told = {key: told for key, told in self._told.items() if key in used or key in set(others)}
        lines = [*map(_line_of_told, self._told.values()), *map(_line_of_window, mapped)]
        self._lines = min(len(lines), MOST_LINES // 2)
        self._notes.replace(lines)

    def after_fork(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held the old one


LEDGER = _Ledger()
os.register_at_fork(after_in_child=LEDGER.after_fork)


def _line_of_told(told: Told) -> str:
    used = {shard.hex(): nbytes for shard, nbytes in told.used.items()}
    return "publication " + json.dumps([told.key.hex(), told.about, used])


def _line_of_window(window: Window) -> str:
    shard, publication = window.pin.reference.binary().hex(), (window.publication or b"").hex()
    nbytes = sum(map(len, window.pin.buffers))
    return f"window {window.start} {window.end} {nbytes} {window.is_private:d} {shard} {publication}"


def read(pid: int) -> tuple[dict[bytes, Told], list[Shown]]:
    """Return the notes of a process: publications by key, and mapped memory, oldest first. Some of them may be gone by now."""
    told: dict[bytes, Told] = {}
    shown: list[Shown] = []
    for line in notes_of(pid):
        kind, _, rest = line.partition(" ")
        if kind == "publication":
            key, about, used = json.loads(rest)
            one = Told(bytes.fromhex(key), About(*about), {bytes.fromhex(k): nbytes for k, nbytes in used.items()})
            told[one.key] = one
        elif kind == "window":
            start, end, nbytes, is_private, shard, publication = rest.split()
            places = int(start), int(end), int(nbytes), is_private == "1"
            shown.append(Shown(*places, bytes.fromhex(shard), bytes.fromhex(publication)))
    return told, shown
