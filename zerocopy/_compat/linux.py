"""Which functions of Linux are used that Python does not have? Memory maps, pages, files of other processes, the C library.

They were read in the documentation of Linux 6.x; links show where. psutil is used for all figures that it can report. It cannot
report which bytes of a file a process has mapped, single pages, and open files that were deleted, as the files of the store are.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

# Not in Python's mmap module before 3.13; the same on every architecture that Ray supports.
# https://man7.org/linux/man-pages/man2/mmap.2.html,
# https://github.com/torvalds/linux/blob/v6.12/include/uapi/asm-generic/mman.h
MAP_NORESERVE = 0x4000


def why_no_mappings() -> str | None:
    """Return why the mappings of processes cannot be read on this system, or None if they can."""
    return None if sys.platform == "linux" else f"{sys.platform} has no /proc"


class Mapping(NamedTuple):
    """Memory of a process from `start` to `end` that shows a file from `file_offset` on: a line of /proc/<pid>/maps.

    `mode` looks like `rw-p`; its last letter is `s` if writes reach the file. Anonymous memory has the `inode` 0. `path` may be
    empty; for a deleted file, it ends with ` (deleted)`. https://docs.kernel.org/filesystems/proc.html
    """

    start: int
    end: int
    mode: str
    file_offset: int
    device: int
    inode: int
    path: str


def _parsed(line: str) -> Mapping:
    addresses, mode, offset, device, inode, *path = line.split(maxsplit=5)
    start, end = (int(address, 16) for address in addresses.split("-"))
    major, minor = (int(part, 16) for part in device.split(":"))
    name = path[0] if path else ""
    return Mapping(start, end, mode, int(offset, 16), os.makedev(major, minor), int(inode), name)


def mappings() -> Iterator[Mapping]:
    """Return the mappings of this process, in order."""
    return map(_parsed, Path("/proc/self/maps").read_text().splitlines())


def shared_files() -> Iterator[Mapping]:
    """Return only the mappings of files that writes reach. There are few of them, and the other lines are not parsed."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = (_parsed(line) for line in lines if line.split(maxsplit=2)[1].endswith("s"))
    return (mapping for mapping in found if mapping.inode)


class Usage(NamedTuple):
    """The memory use of a mapping, in bytes.

    Attributes:
        resident: bytes in main memory, no matter which other processes have mapped them (`Rss`).
        share: proportional share of these bytes: a page that three processes have mapped counts a third (`Pss`).
        anonymous: the part of these bytes that belongs to no file, with written pages of a private mapping (`Anonymous`).
    """

    resident: int
    share: int
    anonymous: int


_SIZES = ("Rss:", "Pss:", "Anonymous:")

NO_ANONYMOUS = "/proc/<pid> has neither smaps_rollup nor smaps, and its status has no RssAnon"
NO_SHARES = (
    "There is no /proc/<pid>/smaps here, which tells shares and single mappings. From /proc/<pid>/status instead: private is "
    "RssAnon, shared is RssShmem in full for each process, so nothing counts as saved, and PSS is VmRSS."
)


def why_nothing_is_told() -> str | None:
    """Return why the memory use of no process can be read, or None if that of some processes can."""
    return None if Path("/proc/self/status").exists() else "there is no /proc/self here"


def usage(pid: int) -> list[tuple[Mapping, Usage]] | None:
    """Return the memory use of each mapping of a process; an empty list for a zombie; None if the kernel does not report it.

    /proc/<pid>/smaps: https://docs.kernel.org/filesystems/proc.html. A kernel without CONFIG_PROC_PAGE_MONITOR does not have it.

    Raises:
        OSError: the process has ended, or belongs to another user.
    """
    text = _told_of(pid, "smaps")
    if text is None:
        return None
    found: list[tuple[Mapping, dict[str, int]]] = []
    for line in text.splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            found.append((_parsed(line), {}))
        elif key in _SIZES:
            found[-1][1][key] = int(rest.split()[0]) * 1024
    return [(mapping, Usage(*(sizes.get(key, 0) for key in _SIZES))) for mapping, sizes in found]


def anonymous_bytes(pid: int) -> int | None:
    """Return the anonymous memory of a process, as in `Usage`, of all mappings; None if the kernel does not report it.

    /proc/<pid>/smaps_rollup: https://docs.kernel.org/filesystems/proc.html. If it is missing, as in gVisor, the result is the sum
    over /proc/<pid>/smaps. If that is missing, too, it is the number in /proc/<pid>/status.

    Raises:
        OSError: the process has ended, or belongs to another user.
    """
    for line in (_told_of(pid, "smaps_rollup") or "").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    by_mapping = usage(pid)
    if by_mapping is not None:
        return sum(used.anonymous for _, used in by_mapping)
    return resident(pid).get("RssAnon")


def resident(pid: int) -> dict[str, int]:
    """Return the resident memory of a process in bytes: VmRSS, and its parts RssAnon, RssFile and RssShmem, if reported.

    /proc/<pid>/status: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html

    Raises:
        OSError: the process has ended.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = (line.split() for line in lines if line.startswith(("VmRSS:", "Rss")))
    return {key.rstrip(":"): int(size) * 1024 for key, size, _ in sizes}


def _told_of(pid: int, name: str) -> str | None:
    """Return the text of a process' file in /proc, or None if no process of this system has such a file."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except FileNotFoundError:
        if not Path(f"/proc/{pid}/status").exists():  # it has ended
            raise
        return None


# Categories of pages in PAGEMAP_SCAN: https://docs.kernel.org/admin-guide/mm/pagemap.html#pagemap-scan-ioctl
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
# The ioctl's number, `_IOWR('f', 16, struct pm_scan_arg)`: https://github.com/torvalds/linux/blob/v6.12/include/uapi/linux/fs.h
_PAGEMAP_SCAN = 0xC0606610
_MOST_RANGES = 1024  # returned by one scan

# The same categories as bits of a number in /proc/self/pagemap, which has one number per page.
_ENTRY_IS_FILE = 1 << 61  # or shared anonymous memory
_ENTRY_HAS_CONTENT = 1 << 63 | 1 << 62  # present or swapped
_ENTRIES_READ = 1 << 18  # entries read at a time: 2 MB, for 1 GB of memory

Range: TypeAlias = tuple[int, int]  # start and end, as addresses


class _ScanArguments(ctypes.Structure):
    """`struct pm_scan_arg`, in the same header."""

    _fields_: ClassVar[Any] = [
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )
    ]  # fmt: skip


def own_pages(start: int, end: int) -> list[Range] | None:
    """Return where a private mapping has its own pages: pages that any write has copied, also swapped pages.

    Pages that were pinned for writing, or populated, are included. It takes 10 microseconds if no page was touched, and some
    10 ms per GB if all pages were touched.

    Args:
        start: a multiple of the page size, like `end`.

    Returns:
        Ranges of whole pages in order; None if the kernel does not report them.
    """
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            try:
                return list(_scanned(pagemap.fileno(), start, end))
            except OSError:  # before Linux 6.7
                return list(_read(pagemap.fileno(), start, end))
    except OSError:
        return None


def _scanned(pagemap: int, start: int, end: int) -> Iterator[Range]:
    found = (ctypes.c_uint64 * (3 * _MOST_RANGES))()  # for each range: start, end, categories of its pages
    while start < end:
        asked = _ScanArguments(
            size=ctypes.sizeof(_ScanArguments),
            start=start,
            end=end,
            vec=ctypes.addressof(found),
            vec_len=_MOST_RANGES,
            category_inverted=_IS_FILE,
            category_mask=_IS_FILE,
            category_anyof_mask=_IS_PRESENT | _IS_SWAPPED,
        )
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, asked)
        yield from zip(found[: 3 * count : 3], found[1 : 3 * count : 3], strict=True)
        # If `found` is full, `walk_end` may be before the end of the last range.
        start = max(asked.walk_end, found[3 * count - 2] if count else 0)


def _read(pagemap: int, start: int, end: int) -> Iterator[Range]:
    page = mmap.PAGESIZE
    for first in range(start, end, _ENTRIES_READ * page):
        count = min(_ENTRIES_READ, -(-(end - first) // page))
        entries = np.frombuffer(os.pread(pagemap, count * 8, first // page * 8), np.uint64)
        is_own = (entries & np.uint64(_ENTRY_HAS_CONTENT) != 0) & (entries & np.uint64(_ENTRY_IS_FILE) == 0)
        edges = np.flatnonzero(np.diff(is_own, prepend=False, append=False)).tolist()
        for begin, stop in zip(edges[::2], edges[1::2], strict=True):
            yield first + begin * page, first + stop * page


def open_files(pid: int) -> Iterator[str]:
    """Yield paths that open the open files of a process again, without sockets and pipes. Nothing for another user's process.

    /proc/<pid>/fd: https://docs.kernel.org/filesystems/proc.html, https://man7.org/linux/man-pages/man5/proc_pid_fd.5.html
    """
    try:
        entries = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:  # it has ended, or belongs to another user
        return
    for entry in entries:
        try:
            if str(Path(entry.path).readlink()).startswith("/"):
                yield entry.path
        except OSError:  # it was closed in the meantime
            continue


class SharedMemory:
    """Anonymous memory that can grow. Other processes of this user can open it by its path, as long as it is open here.

    https://man7.org/linux/man-pages/man2/memfd_create.2.html
    """

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("zerocopy") if hasattr(os, "memfd_create") else -1
        self._memory: mmap.mmap | None = None

    @property
    def path(self) -> str:
        """The path at which other processes can open it. On systems other than Linux, nothing exists at this path."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def room_for(self, nbytes: int) -> mmap.mmap:
        """Return the memory, with at least `nbytes` bytes."""
        if self._memory is None or len(self._memory) < nbytes:
            if self._descriptor >= 0:
                os.ftruncate(self._descriptor, nbytes)
            self._memory = mmap.mmap(self._descriptor, nbytes)
        return self._memory

    def close(self) -> None:
        """Free the memory, as soon as its last view is gone."""
        self._memory = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sockets_to(path: str) -> Iterator[int]:
    """Yield the descriptors of this process' connections to the Unix socket at `path`.

    https://man7.org/linux/man-pages/man5/proc_pid_fd.5.html
    """
    for entry in Path("/proc/self/fd").iterdir():
        descriptor = int(entry.name)
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family == socket.AF_UNIX and connection.getpeername() == path:
                        yield descriptor
        except OSError:  # it was closed in the meantime, or is not connected
            continue


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


# Since Linux 5.14; not in Python's mmap module before 3.14.
# https://github.com/torvalds/linux/blob/v6.12/include/uapi/asm-generic/mman-common.h
_MADV_POPULATE_WRITE = 23


def populate(start: int, end: int, step: int) -> None:
    """Give this process its own copy of each page in a range of a private mapping. The content stays the same.

    The kernel copies page by page in place, which other threads that read or write there do not notice. Before Linux 5.14, one
    byte of each page is read and written back: readers do not notice it, but a write of another thread to that byte at that
    moment is lost.

    Args:
        start: a multiple of the page size, like `end`.
        step: the page size.

    Raises:
        OSError: the kernel refused.

    https://man7.org/linux/man-pages/man2/madvise.2.html: MADV_POPULATE_WRITE
    """
    while _libc.madvise(start, end - start, _MADV_POPULATE_WRITE) != 0:
        error = ctypes.get_errno()
        if error == errno.EINVAL:
            for address in range(start, end, step):
                ctypes.memmove(address, address, 1)
            return
        if error not in (errno.EINTR, errno.EAGAIN):
            raise OSError(error, "madvise refused private memory")


def is_equal(first: int, second: int, nbytes: int) -> bool:
    """Whether the bytes at two addresses are equal. NumPy would create an array of the same size for this.

    https://man7.org/linux/man-pages/man3/memcmp.3.html
    """
    return int(_libc.memcmp(first, second, nbytes)) == 0


def drop_pages(address: int, nbytes: int) -> None:
    """Let the kernel drop all pages that a range touches. Pages of a file are read again at the next access.

    https://man7.org/linux/man-pages/man2/madvise.2.html: MADV_DONTNEED. Python's mmap offers it only for its own mappings.

    Raises:
        OSError: the kernel refused.
    """
    start = address - address % mmap.PAGESIZE
    if _libc.madvise(start, address + nbytes - start, mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise refused to drop pages")


def give_back_heap() -> None:
    """Let the C library return freed memory to the system, if it has a function for this.

    https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
