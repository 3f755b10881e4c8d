"""What does Linux tell and do that Python has no name for: memory maps, pages, open files of other processes, the C library.

Read in the documentation of Linux 6.x; a link says where. What psutil tells as well is asked of psutil. It tells neither which
bytes of which file a process has mapped, nor of single pages, nor of open files that were deleted, as those of the store are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Not in Python's mmap module before 3.13; the same on every architecture that Ray supports.
# https://man7.org/linux/man-pages/man2/mmap.2.html,
# https://github.com/torvalds/linux/blob/v6.12/include/uapi/asm-generic/mman.h
MAP_NORESERVE = 0x4000

# In no version of it; the same everywhere, too.
# https://github.com/torvalds/linux/blob/v6.12/include/uapi/asm-generic/mman-common.h
_MAP_FIXED = 0x10


def why_no_mappings() -> str | None:
    """Why processes of this system cannot be asked for what they have mapped, or None where they can."""
    return None if sys.platform == "linux" else f"{sys.platform} has no /proc"


class Mapping(NamedTuple):
    """Memory of a process from `start` to `end` that shows a file from `file_offset` on: a line of /proc/<pid>/maps.

    `mode` is as in `rw-p`; its last letter is `s` where writes reach the file. Anonymous memory has the `inode` 0. `path` may be
    empty; of a file that was deleted it ends in ` (deleted)`. https://docs.kernel.org/filesystems/proc.html
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
    """What this process has mapped, in order."""
    return map(_parsed, Path("/proc/self/maps").read_text().splitlines())


def shared_files() -> Iterator[Mapping]:
    """Those of them that are files which writes reach: few, so that the others need not be read."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = (_parsed(line) for line in lines if line.split(maxsplit=2)[1].endswith("s"))
    return (mapping for mapping in found if mapping.inode)


class Usage(NamedTuple):
    """What a mapping takes, in bytes.

    Attributes:
        resident: in main memory, whoever else has it mapped (`Rss`).
        share: of this the proportional share: a page that three have mapped counts a third (`Pss`).
        anonymous: of this what belongs to no file: also pages of a private mapping that were written (`Anonymous`).
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
    """Why no process can be asked for what it takes, or None where some can."""
    return None if Path("/proc/self/status").exists() else "there is no /proc/self here"


def usage(pid: int) -> list[tuple[Mapping, Usage]] | None:
    """What each mapping of a process takes; nothing of one that has ended and was not waited for; None where that is not told.

    /proc/<pid>/smaps: https://docs.kernel.org/filesystems/proc.html. A kernel without CONFIG_PROC_PAGE_MONITOR has none.

    Raises:
        OSError: it has ended, or is another user's.
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
    """Anonymous memory of a process, as in `Usage`, of all mappings together; None where the kernel does not tell it.

    /proc/<pid>/smaps_rollup: https://docs.kernel.org/filesystems/proc.html. Where it is missing, as in gVisor, the sum over
    /proc/<pid>/smaps; where that is missing too, what /proc/<pid>/status counts.

    Raises:
        OSError: it has ended, or is another user's.
    """
    for line in (_told_of(pid, "smaps_rollup") or "").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    by_mapping = usage(pid)
    if by_mapping is not None:
        return sum(used.anonymous for _, used in by_mapping)
    return resident(pid).get("RssAnon")


def resident(pid: int) -> dict[str, int]:
    """Resident memory of a process by kind, in bytes, as far as it is told: VmRSS, and of this RssAnon, RssFile and RssShmem.

    /proc/<pid>/status: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html

    Raises:
        OSError: it has ended.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = (line.split() for line in lines if line.startswith(("VmRSS:", "Rss")))
    return {key.rstrip(":"): int(size) * 1024 for key, size, _ in sizes}


def _told_of(pid: int, name: str) -> str | None:
    """A file of a process in /proc, or None if no process has such a file here."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except FileNotFoundError:
        if not Path(f"/proc/{pid}/status").exists():  # it has ended
            raise
        return None


_IS_OF_FILE = 1 << 61  # or shared anonymous memory
_IS_PRESENT = 1 << 63


def has_pages_of_its_own(start: int, nbytes: int) -> bool:
    """Whether a write has given this process a page of its own in a range of a private mapping.

    /proc/self/pagemap, a number for each page: https://docs.kernel.org/admin-guide/mm/pagemap.html
    """
    first, last = start // mmap.PAGESIZE, (start + max(nbytes, 1) - 1) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        content = pagemap.read((last - first + 1) * 8)
    entries = struct.unpack(f"{len(content) // 8}Q", content)
    return any(entry & _IS_PRESENT and not entry & _IS_OF_FILE for entry in entries)


def open_files(pid: int) -> Iterator[str]:
    """Paths by which to open once more what a process has open; no sockets, pipes and the like. None of another user's.

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


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def map_anonymous(address: int, nbytes: int) -> None:
    """Put fresh private memory in the place of whatever is mapped there: zeros. Python's mmap takes no address.

    https://man7.org/linux/man-pages/man2/mmap.2.html: MAP_FIXED

    Raises:
        OSError: the kernel refused.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if _libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != address:
        raise OSError(ctypes.get_errno(), "mmap refused private memory")


def is_equal(first: int, second: int, nbytes: int) -> bool:
    """Whether the bytes at two addresses are the same. NumPy would make an array of as many bytes.

    https://man7.org/linux/man-pages/man3/memcmp.3.html
    """
    return int(_libc.memcmp(first, second, nbytes)) == 0


def drop_pages(address: int, nbytes: int) -> None:
    """Let the kernel drop the pages of a range, whole pages only: memory of a file is read again when it is touched.

    https://man7.org/linux/man-pages/man2/madvise.2.html: MADV_DONTNEED. Python's mmap offers it for its own mappings alone.

    Raises:
        OSError: the kernel refused.
    """
    start = address - address % mmap.PAGESIZE
    if _libc.madvise(start, address + nbytes - start, mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise refused to drop pages")


def give_back_heap() -> None:
    """Let the C library return freed memory to the system, where it can be asked to: not all can.

    https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
