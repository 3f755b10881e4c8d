"""How is store memory mapped privately? By copy-on-write: the operating system separates the workers.

Ray maps the store's file into every process, shared and writable, and closes the descriptor. The raylet keeps the file open. So a
process that may inspect the raylet can open the file again through the raylet's open files, and map the same bytes with
`MAP_PRIVATE`. Linux allows this (`PTRACE_MODE_READ`) if both processes have the same user and user namespace, and the process has
all capabilities of the raylet. https://man7.org/linux/man-pages/man2/ptrace.2.html: "Ptrace access mode checking"
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import operator
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from zerocopy._compat import linux
from zerocopy._compat.cpython import warn_caller
from zerocopy._compat.ray import BUFFER_ALIGNMENT, SMALL_BUFFER, available_memory, is_store_file, raylets
from zerocopy._store import windows
from zerocopy._store.pins import Pin
from zerocopy._store.windows import Window
from zerocopy.errors import IsolationError, IsolationWarning, OutOfMemoryError

REQUIRE_ISOLATION = "ZEROCOPY_REQUIRE_ISOLATION"


class MappingImpossible(Exception):
    """This process cannot map store memory privately. The message has the reason."""


class Mapped(NamedTuple):
    """Mapped memory, and the offset of each of the given buffers in it."""

    memory: Any
    offsets: list[int]


def start_of(memory: Any) -> int:
    """Return the address of mapped memory in this process."""
    start: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return start


def starts_of(buffers: Sequence[Any]) -> list[int]:
    """Return the addresses of the buffers of one object of the store in this process.

    Ray places the buffers in order, and large ones at multiples of 64. So the addresses of large buffers are computed. Small
    buffers may be in the gap before such a multiple, and are asked for their addresses. If the address of the last buffer is
    right, all are right. Else all buffers are asked.
    """
    start = start_of(buffers[0])
    starts = []
    for buffer in buffers:
        start = start_of(buffer) if len(buffer) < SMALL_BUFFER else start + -start % BUFFER_ALIGNMENT
        starts.append(start)
        start += len(buffer)
    return starts if starts[-1] == start_of(buffers[-1]) else list(map(start_of, buffers))


class PrivateMap(mmap.mmap):
    """A private mapping of an object of the store.

    Attributes:
        pin: keeps the object in the store.
        window: describes what the mapping shows, if it is known.
    """

    pin: Pin | None = None
    window: Window | None = None

    def shown_bytes(self) -> int:
        """Return how many bytes still show the store. After `detach`, this process uses so many bytes more."""
        start = start_of(self)
        own = linux.own_pages(start, start + len(self)) or ()
        return len(self) - sum(end - first for first, end in own)

    def detach(self) -> None:
        """Give this process its own copy of every page. Then the store may change, and views of the memory stay valid."""
        start = start_of(self)
        linux.populate(start, start + len(self), mmap.PAGESIZE)
        if self.window is not None:
            windows.remove(self.window)
        self.pin = self.window = None


def detach_all(memories: Sequence[PrivateMap]) -> None:
    """Detach all of these mappings, or none.

    Raises:
        OutOfMemoryError: they need more memory than is free. The kernel would not refuse this, but kill a process.
    """
    needed, free = sum(memory.shown_bytes() for memory in memories), available_memory()
    if needed > free:
        raise OutOfMemoryError(
            f"unshare() needs {needed:,} bytes of private memory, but {free:,} are free.",
            hint="free some memory, or leave the pipeline shared: nothing has changed, and it works as before.",
            needed=needed,
            free=free,
        )
    for memory in memories:
        memory.detach()


def _alias(address: int, nbytes: int, keep: object) -> Any:
    """Return memory that `keep` owns as an array of ctypes. Such an array is never read-only, so torch does not warn."""
    alias = (ctypes.c_char * nbytes).from_address(address)
    alias.keep = keep  # type: ignore[attr-defined]
    return alias


_intervals: list[linux.Mapping] = []
_descriptors: dict[tuple[int, int], str] = {}
_warned: set[str] = set()


def map_private(
    buffers: Sequence[Any],
    starts: Sequence[int] | None = None,
    *,
    shard: ray.ObjectRef[Any] | None = None,
    writable: bool = True,
    required: bool = False,
) -> Mapped:
    """Map the store memory of `buffers` (all of one object of the store) once more, private to this process.

    Args:
        buffers: readable buffers as `ray.get` returned them, not empty. No other object may have the content of the first buffer:
            it proves that the right file was found.
        starts: the addresses of the buffers, if they are known.
        shard: reference to the object. If it is given, the new memory is added to `windows`.
        writable: False for a read-only mapping, which is the right source for copies to a GPU: a driver may pin the source with
            write intent, and the kernel would then copy each page of a writable private mapping.
        required: raise an error instead of falling back to Ray's own, shared mapping.

    Raises:
        IsolationError: no private mapping is possible, and one is required here or by ZEROCOPY_REQUIRE_ISOLATION=1.
    """
    starts = list(map(start_of, buffers)) if starts is None else starts
    end = max(map(operator.add, starts, map(len, buffers)))
    pin = Pin(buffers, shard)
    try:
        memory, first = _map_checked(min(starts), end, writable, starts[0], bytes(buffers[0]))
        memory.pin = pin
    except (MappingImpossible, OSError, ValueError) as error:
        _report(str(error), required)
        first = min(starts)
        memory = _alias(first, end - first, pin)
    if not writable and isinstance(memory, PrivateMap):
        memory = _alias(start_of(memory), len(memory), memory)
    if shard is not None:
        start = start_of(memory)
        memory.window = Window(start, start + len(memory), first, starts, pin, isinstance(memory, PrivateMap))
        windows.add(memory.window)
    return Mapped(memory, [start - first for start in starts])


def store_files() -> list[linux.Mapping]:
    """Return the mappings of the store in this process, in order; an empty list if the system does not report them."""
    if linux.why_no_mappings() is not None:
        return []
    return [mapping for mapping in linux.mappings() if is_store_file(mapping.path)]


def is_isolation_possible() -> bool:
    """Whether this process can map privately all files of the store that it has mapped."""
    shared = [mapping for mapping in store_files() if mapping.mode.endswith("s")]
    try:
        for mapping in shared:
            os.close(_open(mapping))
    except (MappingImpossible, OSError):
        return False
    return bool(shared)


def why_not_private(stored: np.ndarray[Any, Any]) -> str | None:
    """Return why this process cannot map an object of the store privately, or None if it can. Maps it, and writes to the mapping.

    Args:
        stored: bytes as `ray.get` returned them. No other object may have the same bytes.
    """
    start = start_of(stored)
    try:
        memory, first = _map_checked(start, start + stored.nbytes, True, start, stored.tobytes())
    except (MappingImpossible, OSError, ValueError) as error:
        return str(error)
    memory[start - first] ^= 0xFF
    return None if memory[start - first] != stored[0] else "a write to a private mapping reached the store"


def map_if_in_store(arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Return writable arrays like `arrays`, private to this process. Arrays in the object store are mapped, others are copied.

    Raises:
        IsolationError: as `map_private`.
    """
    stored: dict[linux.Mapping, list[int]] = {}
    for position, array in sorted(
        enumerate(arrays), key=lambda item: item[1].nbytes
    ):  # the smallest array comes first: its bytes are the proof
        interval = _interval_around(array)
        if interval is not None:
            stored.setdefault(interval, []).append(position)
    private: dict[int, np.ndarray[Any, Any]] = {}
    for positions in stored.values():
        bounds = [np.lib.array_utils.byte_bounds(arrays[position]) for position in positions]
        mapped = map_private(
            [_alias(low, high - low, arrays[i]) for i, (low, high) in zip(positions, bounds, strict=True)]
        )
        for position, (low, _), offset in zip(positions, bounds, mapped.offsets, strict=True):
            array = arrays[position]
            start = offset + array.__array_interface__["data"][0] - low
            private[position] = np.ndarray(array.shape, array.dtype, mapped.memory, start, array.strides)
    return [private[i] if i in private else array.copy(order="K") for i, array in enumerate(arrays)]


def _interval_around(array: np.ndarray[Any, Any]) -> linux.Mapping | None:
    """Return the mapping of a shared file that contains an array, if any."""
    if linux.why_no_mappings() is not None or not array.nbytes:
        return None
    low, high = np.lib.array_utils.byte_bounds(array)
    found = (around(low, high, intervals) for intervals in _cached_then_fresh())
    return next(filter(None, found), None)


def _report(reason: str, required: bool) -> None:
    if required or os.environ.get(REQUIRE_ISOLATION, "0") not in ("", "0"):
        raise IsolationError(
            f"The object store cannot be mapped privately in this process: {reason}.",
            hint=f"`zerocopy doctor` shows the cause. Or leave adopt=True out, and unset {REQUIRE_ISOLATION} here and where it "
            "was published, to accept that writes to a loaded pipeline reach every worker.",
        )
    if reason not in _warned:
        _warned.add(reason)
        warn_caller(
            f"zerocopy cannot map the object store privately in this process: {reason}. Loaded pipelines still share "
            f"their weights, but a write to them reaches every worker. `zerocopy doctor` shows what to change; set "
            f"{REQUIRE_ISOLATION}=1 to get an error instead.",
            IsolationWarning,
        )


def _map_checked(start: int, end: int, writable: bool, proof_start: int, proof: bytes) -> tuple[PrivateMap, int]:
    """Map [start, end) of this process once more. Returns the new memory, and the old address of its first byte."""
    if (reason := linux.why_no_mappings()) is not None:
        raise MappingImpossible(reason)
    failure: Exception = MappingImpossible("the object does not lie in a mapped file")
    for intervals in _cached_then_fresh():
        interval = around(start, end, intervals)
        if interval is None:
            continue
        try:
            memory, first = _map(interval, start, end, writable)
            if memory[proof_start - first : proof_start - first + len(proof)] == proof:
                return memory, first
            failure = MappingImpossible("the store's file does not hold the expected bytes")
        except (MappingImpossible, OSError, ValueError) as error:
            failure = error
    raise failure


def _cached_then_fresh() -> Iterator[list[linux.Mapping]]:
    """Yield the shared files of this process: first from the cache, which may be outdated, then as they are now."""
    if _intervals:
        yield list(_intervals)
    _intervals[:] = linux.shared_files()
    yield list(_intervals)


def around(start: int, end: int, intervals: Sequence[linux.Mapping]) -> linux.Mapping | None:
    """Return the first of `intervals` that contains all bytes from `start` to `end`, or None."""
    return next((interval for interval in intervals if interval.start <= start and end <= interval.end), None)


def _map(interval: linux.Mapping, start: int, end: int, writable: bool) -> tuple[PrivateMap, int]:
    descriptor = _open(interval)
    try:
        page = max(os.fstat(descriptor).st_blksize, mmap.PAGESIZE)
        offset = interval.file_offset + start - interval.start
        first = start - offset % page
        try:
            memory = PrivateMap(
                descriptor,
                -(-(end - first) // page) * page,
                # If no huge page is free for the copy of a page, the kernel kills a process that has not reserved any.
                flags=mmap.MAP_PRIVATE | (linux.MAP_NORESERVE if page == mmap.PAGESIZE else 0),
                prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0),
                offset=offset - offset % page,
            )
        except OSError as error:
            if page == mmap.PAGESIZE:
                raise
            raise MappingImpossible(f"no {end - first:,} bytes of huge pages are free for copies: {error}") from error
    finally:
        os.close(descriptor)
    return memory, first


def _open(interval: linux.Mapping) -> int:
    key = interval.device, interval.inode
    candidates = [_descriptors[key]] if key in _descriptors else []
    opened = (path for raylet in raylets() for path in linux.open_files(raylet.pid))
    for path in itertools.chain(candidates, opened):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # it was closed in the meantime, or it is a socket
            continue
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) == key:
            _descriptors[key] = path
            return descriptor
        os.close(descriptor)
    raise MappingImpossible(
        "it cannot open the store's file through a raylet, the process of Ray that has it open: for that, Linux asks for the "
        "raylet's user, its user namespace, and all capabilities that it has"
    )
