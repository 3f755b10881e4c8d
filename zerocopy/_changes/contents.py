"""Have the bytes of storages changed, no matter which code wrote them?

The kernel knows which pages of mapped store objects were written: see `windows`. Other memory is read, at a limited cost: all
bytes of small storages, and some spots of large ones. A dense write changes at least one spot, no matter which code makes it. A
write to a few elements of a large storage may change no spot. Version counters and the steps of optimizers show most of these
writes.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import attrs

from zerocopy._changes.steps import count_steps
from zerocopy._changes.tensor_states import has_storage
from zerocopy._compat.linux import Range, is_equal
from zerocopy._compat.torch import storage_id
from zerocopy._store import windows
from zerocopy._store.manifest import Placement
from zerocopy._store.mapping import start_of
from zerocopy._store.read import buffers_of
from zerocopy._store.storages import Storage
from zerocopy._store.tensors import TensorTable
from zerocopy._store.windows import Window

SPOT = 64  # bytes: a cache line
SPOTS = 8  # per large storage, spread from its start to its end
MOST_SPOTS = 2048  # the limit for all large storages together; but each has at least two
WHOLE = 16 << 10  # bytes: a storage of at most this size is small
MOST_WHOLE = 512 << 10  # bytes: the limit for all small storages together


class Contents:
    """The bytes of some storages at one moment, as far as changes can be detected without reading all bytes.

    Keeps no storage alive. For storages on a device, nothing is read; only the steps of optimizers are counted.
    """

    def __init__(self, table: TensorTable) -> None:
        """`table`: the storages, and the tensors over them."""
        inside, outside = windows.split(table.storages)
        self._shown: list[tuple[weakref.ref[Window], list[object], list[Range]]] = []
        self._rewritten: dict[object, _Rewritten] = {}
        for window, members in inside.items():
            extents = [member.extent for member in members]
            written = window.written(extents)
            shown = [position for position, is_written in enumerate(written) if not is_written]
            self._shown.append((weakref.ref(window), [members[i].key for i in shown], [extents[i] for i in shown]))
            for member, extent in itertools.compress(zip(members, extents, strict=True), written):
                self._rewritten[member.key] = _Rewritten(weakref.ref(window), extent)
        # torch may have several storages for the same memory.
        ids = {storage_id(tensor): table.key_of(spec) for tensor, spec in table.items() if has_storage(tensor)}
        keys = {storage.key for storage in outside}
        self._stepped = {number: key for number, key in ids.items() if key in keys}
        self._steps = count_steps(self._stepped)
        read = sorted(
            (storage for storage in outside if storage.address is not None), key=lambda storage: storage.nbytes
        )
        self._keys = [storage.key for storage in read]
        self._spots = list(_spots_of(read))
        self._every_spot = list(itertools.chain(*self._spots))
        self._bytes = b"".join(self._every_spot)

    def note_written(self, places: Mapping[object, Placement]) -> None:
        """Record the new places in the store of storages whose windows had been written. `places` are by key."""
        for key, rewritten in self._rewritten.items():
            if key in places:
                rewritten.place = places[key]
                rewritten.buffer = buffers_of(places[key].shard)[places[key].buffer]

    def are_unchanged(self) -> bool:
        """Whether all storages are unchanged. All of them must be alive."""
        return (
            count_steps(self._stepped) == self._steps
            and b"".join(self._every_spot) == self._bytes
            and not any(self._written())
        )

    def changed(self, alive: Container[object]) -> set[object]:
        """The keys of changed storages. Memory outside of windows is compared only for storages known to be `alive`, by key."""
        steps = zip(self._stepped.values(), self._steps, count_steps(self._stepped), strict=True)
        changed = {*self._written(), *(key for key, before, now in steps if before != now)}
        start = 0
        for key, spots in zip(self._keys, self._spots, strict=True):
            end = start + sum(map(len, spots))
            if key in alive and b"".join(spots) != self._bytes[start:end]:
                changed.add(key)
            start = end
        return changed

    def _written(self) -> Iterator[object]:
        for ref, keys, extents in self._shown:
            window = ref()
            written = [True] * len(keys) if window is None else window.written(extents)
            yield from itertools.compress(keys, written)
        yield from (key for key, rewritten in self._rewritten.items() if not rewritten.is_unchanged())


@attrs.define
class _Rewritten:
    """Memory in a window that was written, and then put into the store again. The kernel shows no further writes to it."""

    window: weakref.ref[Window]
    extent: Range
    place: Placement | None = None
    buffer: Any = None  # pins the store object that has the new bytes

    def is_unchanged(self) -> bool:
        """Whether the memory still has the bytes that were put into the store."""
        if self.place is None or self.window() is None:
            return False
        start, end = self.extent
        return is_equal(start, start_of(self.buffer) + self.place.offset, end - start)


def _spots_of(storages: Sequence[Storage]) -> Iterator[list[Any]]:
    """Yields the memory to read for each storage. `storages` are sorted by size. The results keep no memory alive."""
    ends = itertools.accumulate(storage.nbytes for storage in storages)
    small = sum(s.nbytes <= WHOLE and end <= MOST_WHOLE for s, end in zip(storages, ends, strict=True))
    count = max(2, min(SPOTS, MOST_SPOTS // max(len(storages) - small, 1)))
    for position, storage in enumerate(storages):
        start, end = storage.extent
        if position < small or storage.nbytes <= count * SPOT:
            yield [_memory_at(start, end)]
        else:
            step = (storage.nbytes - SPOT) // (count - 1)
            yield [_memory_at(start + i * step, start + i * step + SPOT) for i in range(count)]


def _memory_at(start: int, end: int) -> Any:
    return (ctypes.c_char * (end - start)).from_address(start)
