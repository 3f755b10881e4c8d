"""Have the bytes of storages changed, whoever wrote them?

Of memory that shows the store the kernel knows: see `windows`. Other memory is read, at a bounded price: all bytes of small
storages, and some spots of large ones. A dense write changes at least one spot, whatever it is made by. A write to a few
elements of a large storage may change none: version counters and the steps of optimizers tell of most.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch

from zerocopy._changes.steps import count_steps
from zerocopy._compat.torch import id_of_storage
from zerocopy._store import windows
from zerocopy._store.tensors import Storage

SPOT = 64  # bytes: a cache line
SPOTS = 8  # of a large storage, spread from its start to its end
MOST_SPOTS = 2048  # of all large storages together, but two of each
WHOLE = 16 << 10  # bytes: a storage up to this is small
MOST_WHOLE = 512 << 10  # bytes of all small storages together


class Contents:
    """The bytes of some storages at one moment, as far as one can tell without reading all. Keeps none of them alive.

    Of storages on a device nothing is read, only the steps of optimizers are counted.
    """

    def __init__(self, storages: Sequence[Storage]) -> None:
        inside, outside = windows.split(storages)
        self._windows = [
            (weakref.ref(window), [storage.key for storage in members], list(map(windows.extent_of, members)))
            for window, members in inside.items()
        ]
        self._stepped = {id_of_storage(s.source): s.key for s in outside if isinstance(s.source, torch.UntypedStorage)}
        self._steps = count_steps(self._stepped)
        read = sorted(
            (storage for storage in outside if storage.address is not None), key=lambda storage: storage.nbytes
        )
        self._keys = [storage.key for storage in read]
        self._spots = list(_spots_of(read))
        self._every_spot = list(itertools.chain(*self._spots))
        self._bytes = b"".join(self._every_spot)

    def are_unchanged(self) -> bool:
        """Whether all storages are as they were. All of them must be alive."""
        return (
            count_steps(self._stepped) == self._steps
            and b"".join(self._every_spot) == self._bytes
            and not any(self._written())
        )

    def changed(self, alive: Container[object]) -> set[object]:
        """Keys of the storages that have changed, among those of which one knows that they are `alive`, by key."""
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
        for ref, keys, extents in self._windows:
            window = ref()
            written = [True] * len(keys) if window is None else window.written(extents)
            yield from itertools.compress(keys, written)


def _spots_of(storages: Sequence[Storage]) -> Iterator[list[Any]]:
    """What is read of each storage, given in the order of their sizes, as memory that is kept alive by nobody."""
    ends = itertools.accumulate(storage.nbytes for storage in storages)
    small = sum(s.nbytes <= WHOLE and end <= MOST_WHOLE for s, end in zip(storages, ends, strict=True))
    count = max(2, min(SPOTS, MOST_SPOTS // max(len(storages) - small, 1)))
    for position, storage in enumerate(storages):
        start, end = windows.extent_of(storage)
        if position < small or storage.nbytes <= count * SPOT:
            yield [_memory_at(start, end)]
        else:
            step = (storage.nbytes - SPOT) // (count - 1)
            yield [_memory_at(start + i * step, start + i * step + SPOT) for i in range(count)]


def _memory_at(start: int, end: int) -> Any:
    return (ctypes.c_char * (end - start)).from_address(start)
