"""Which memory of this process shows an object of the store, and which of its bytes are still equal to those in the store?

A write to a private mapping makes the kernel copy the page. So the kernel knows which pages were written, by any code: torch, a
fused optimizer, NumPy, code in C++. Pages that were not written are still pages of the store. Written pages are compared.
"""

from __future__ import annotations

import bisect
import operator
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence

import attrs

from zerocopy._compat import linux
from zerocopy._store import object_store
from zerocopy._store.manifest import Placement
from zerocopy._store.pins import Pin
from zerocopy._store.storages import Storage


@attrs.define(eq=False)
class Window:
    """Memory of this process that shows one object of the store. It lives as long as that memory.

    Attributes:
        start: the address of the memory, at the start of a page; `end` is the end of its last page.
        shown: the address in Ray's own mapping of the byte at `start`.
        starts: addresses of the object's buffers in Ray's own mapping, in order.
        pin: keeps the object in the store.
        is_private: whether a write copies the page. If not, a write changes the store.
        publication: id of the manifest that it was mapped for, once that is known.
    """

    start: int
    end: int
    shown: int
    starts: Sequence[int]
    pin: Pin
    is_private: bool
    session: object = attrs.field(factory=object_store.session)
    publication: bytes | None = None

    def written(self, extents: Sequence[linux.Range]) -> list[bool]:
        """Return for each extent in this memory whether its bytes may differ from those of the store."""
        if self.session is None or self.session is not object_store.session():
            return [True] * len(extents)
        own = self.own_pages()
        return [self._differs(own, *extent) for extent in extents] if own else [False] * len(extents)

    def own_pages(self) -> list[linux.Range]:
        """Return where this memory has its own pages; the whole memory if the kernel does not report them."""
        if not self.is_private:
            return []
        found = linux.own_pages(self.start, self.end)
        return [(self.start, self.end)] if found is None else found

    def _differs(self, own: Sequence[linux.Range], low: int, high: int) -> bool:
        """Whether the bytes from `low` to `high` differ from those of the store. Only pages in `own` are compared."""
        for start, end in own[bisect.bisect_right(own, low, key=operator.itemgetter(1)) :]:
            if start >= high:
                return False
            first, last = max(start, low), min(end, high)
            if not linux.is_equal(first, first - self.start + self.shown, last - first):
                return True
        return False

    def placement(self, low: int, high: int) -> Placement | None:
        """Return the place in the store of the bytes from `low` to `high`; None if they are not in one buffer."""
        shown = low - self.start + self.shown
        buffer = bisect.bisect_right(self.starts, shown) - 1
        if buffer < 0 or shown - self.starts[buffer] + high - low > len(self.pin.buffers[buffer]):
            return None
        return Placement(self.pin.reference, buffer, shown - self.starts[buffer])


_windows: weakref.WeakValueDictionary[int, Window] = weakref.WeakValueDictionary()  # by `start`


def add(window: Window) -> None:
    """Add a window to the known windows, as long as it lives."""
    _windows[window.start] = window


def remove(window: Window) -> None:
    """Remove a window, because its memory does not show the store any more."""
    if _windows.get(window.start) is window:
        del _windows[window.start]


def known() -> list[Window]:
    """Return all known windows that are still alive."""
    return [window for ref in _windows.valuerefs() if (window := ref()) is not None]


def by_shard() -> dict[bytes, Window]:
    """Return one window for each object that this process shows in this session, by the id of the object's reference."""
    session = object_store.session()
    return {window.pin.reference.binary(): window for window in known() if window.session is session}


def split(storages: Iterable[Storage]) -> tuple[dict[Window, list[Storage]], list[Storage]]:
    """Return the storages that are in each window, and the storages that are in none."""
    ordered = sorted(known(), key=operator.attrgetter("start"))
    starts = [window.start for window in ordered]
    inside: dict[Window, list[Storage]] = defaultdict(list)
    outside: list[Storage] = []
    for storage in storages:
        address = storage.address
        position = -1 if address is None else bisect.bisect_right(starts, address) - 1
        if position >= 0 and address is not None and address + storage.nbytes <= ordered[position].end:
            inside[ordered[position]].append(storage)
        else:
            outside.append(storage)
    return inside, outside


def places_of(storages: Iterable[Storage]) -> dict[object, Placement]:
    """Return the places in the store of storages that show the store and still have exactly its bytes, by key."""
    places: dict[object, Placement] = {}
    for window, members in split(storages)[0].items():
        extents = [storage.extent for storage in members]
        for storage, extent, is_written in zip(members, extents, window.written(extents), strict=True):
            placement = None if is_written else window.placement(*extent)
            if placement is not None:
                places[storage.key] = placement
    return places
