"""What does Linux do with memory and processes that Python and psutil do not offer?"""

from __future__ import annotations

import ctypes
import mmap

_MADV_DONTNEED = mmap.MADV_DONTNEED


def drop_pages(address: int, nbytes: int) -> None:
    """Let the kernel drop the pages of [address, address + nbytes): memory of a file is read again when it is touched.

    Pages that are only partly in the range are dropped, too. https://man7.org/linux/man-pages/man2/madvise.2.html
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = address - address % mmap.PAGESIZE
    if libc.madvise(start, address + nbytes - start, _MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), "madvise refused to drop pages")
