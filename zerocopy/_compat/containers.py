"""What are the limits and rights of this container: shared memory, memory limit, capabilities, gVisor, huge pages?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (looked at; nothing is written there)


def shared_memory_room(folder: Path = SHARED_MEMORY) -> int | None:
    """Return the free bytes of the folder where Ray puts the store; None if the folder does not exist.

    https://man7.org/linux/man-pages/man7/shm_overview.7.html
    """
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


# Files with the memory limit of a container, of control groups version 2 and 1. If there is no limit, they contain "max", or the
# largest number of pages. https://docs.kernel.org/admin-guide/cgroup-v2.html,
# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_MEMORY_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
_NO_LIMIT = 1 << 60


def memory_limit(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes of memory that this container may use; None if there is no limit."""
    for name in _MEMORY_LIMITS:
        try:
            text = (groups / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None
    return None


class Rights(NamedTuple):
    """The values that Linux compares before it lets one process inspect another.

    https://man7.org/linux/man-pages/man2/ptrace.2.html, https://man7.org/linux/man-pages/man7/user_namespaces.7.html

    Attributes:
        user: its user id.
        namespace: how its user namespace maps ids. Any process may read it, and other namespaces have other mappings.
        capabilities: one bit per capability: https://man7.org/linux/man-pages/man7/capabilities.7.html
    """

    user: int
    namespace: str
    capabilities: int


def rights_of(pid: int) -> Rights:
    """Return the rights of a process.

    Raises:
        OSError: the process has ended, or /proc does not exist.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    namespace = " ".join(Path(f"/proc/{pid}/uid_map").read_text().split())
    return Rights(int(told["Uid"].split()[0]), namespace, int(told.get("CapPrm", "0"), 16))


# The kernel version that gVisor reports (a build time), no matter which kernel it runs on.
# https://github.com/google/gvisor/blob/master/pkg/sentry/kernel/version.go
_GVISOR = "Sun Jan 10 15:06:54 PST 2016"


def is_gvisor(version: str | None = None) -> bool:
    """Whether this process runs on gVisor, which has its own /proc. `version` is the content of /proc/version."""
    if version is None:
        try:
            version = Path("/proc/version").read_text()
        except OSError:
            return False
    return _GVISOR in version or "gvisor" in version.lower()


def free_huge_pages() -> int:
    """Return the bytes of huge pages that are free and not reserved. https://docs.kernel.org/admin-guide/mm/hugetlbpage.html"""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    told = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    free = told.get("HugePages_Free", 0) - told.get("HugePages_Rsvd", 0)
    return free * told.get("Hugepagesize", 0) * 1024
