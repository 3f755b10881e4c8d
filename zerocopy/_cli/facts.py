"""Which facts does doctor examine on a node? A worker on the node gathers them, and `checks.py` judges them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import psutil

from zerocopy._compat import containers, linux
from zerocopy._compat.ray import TESTING_VARIABLES, allows_out_of_band, option_of, own_raylet, raylets
from zerocopy._store import object_store
from zerocopy._store.mapping import why_not_private

PACKAGES = ("zerocopy-ray", "torch", "ray", "numpy", "click", "protobuf")
TRIED = 1 << 18  # bytes of the object that is mapped: larger than what Ray keeps in a heap


@attrs.frozen
class Place:
    """A folder, and the type of its file system; empty if unknown."""

    folder: str
    filesystem: str


@attrs.frozen
class Trial:
    """The result of a trial of a private mapping, and what Linux compared.

    Attributes:
        reason: why it is not possible; None if it is.
        system: such as "linux".
        is_gvisor: whether gVisor is the kernel.
        own: the rights of the process that tried, None if unknown.
        raylet: the rights of its raylet, None if the raylet cannot be seen.
    """

    reason: str | None
    system: str
    is_gvisor: bool
    own: containers.Rights | None
    raylet: containers.Rights | None


@attrs.frozen
class Facts:
    """The facts that were found on a node.

    Attributes:
        node: its id.
        mapping: the trial of a private mapping in a worker there.
        versions: of the installed packages, and of `python`.
        system: operating system and release of its kernel.
        store: bytes of its object store.
        store_place: where the store is.
        spill_place: where Ray writes objects that do not fit into the store.
        shared_memory: bytes of /dev/shm, None if it does not exist.
        limit: bytes of memory that the container may take, None without a limit.
        memory: bytes of memory of the machine.
        used: the part of the memory that is in use, 0 to 1.
        huge_pages: bytes of huge pages that are free.
        allows_out_of_band: the setting of RAY_allow_out_of_band_object_ref_serialization.
        variables: Ray's environment variables that are set in its workers.
        tells_mappings: whether the kernel reports the memory of each mapping.
    """

    node: str
    mapping: Trial
    versions: Mapping[str, str]
    system: tuple[str, str]
    store: int
    store_place: Place
    spill_place: Place
    shared_memory: int | None
    limit: int | None
    memory: int
    used: float
    huge_pages: int
    allows_out_of_band: bool
    variables: Mapping[str, str]
    tells_mappings: bool


def facts_here() -> Facts:
    """Gather the facts of the node that this process is connected to."""
    memory = psutil.virtual_memory()
    raylet = _raylet()
    return Facts(
        node=object_store.node(),
        mapping=mapping_here(),
        versions=versions_here(),
        system=(platform.system(), platform.release()),
        store=object_store.capacity() or 0,
        store_place=place_of(None if raylet is None else option_of(raylet, "plasma_directory")),
        spill_place=place_of(None if raylet is None else option_of(raylet, "fallback_directory")),
        shared_memory=_size_of(containers.SHARED_MEMORY),
        limit=containers.memory_limit(),
        memory=memory.total,
        used=memory.percent / 100,
        huge_pages=containers.free_huge_pages(),
        allows_out_of_band=allows_out_of_band(),
        variables={name: value for name, value in os.environ.items() if name.startswith("RAY_")},
        tells_mappings=linux.usage(os.getpid()) is not None,
    )


def mapping_here() -> Trial:
    """Try a real private mapping in this process, with an object that is put for it."""
    ref = object_store.put(np.frombuffer(os.urandom(TRIED), np.uint8))
    reason = why_not_private(object_store.get(ref))
    raylet = _raylet()
    own, others = _rights(os.getpid()), None if raylet is None else _rights(raylet.pid)
    return Trial(reason, sys.platform, containers.is_gvisor(), own, others)


def _raylet() -> psutil.Process | None:
    return own_raylet() or next(raylets(), None)


def _rights(pid: int) -> containers.Rights | None:
    try:
        return containers.rights_of(pid)
    except OSError:
        return None


def versions_here() -> dict[str, str]:
    """The versions of the relevant packages that are installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def place_of(folder: str | None) -> Place:
    """The file system of a folder: that of the longest mount point above it."""
    if not folder:
        return Place("", "")
    resolved = Path(folder).resolve()
    found: tuple[int, str] = (-1, "")
    for mount in psutil.disk_partitions(all=True):
        point = Path(mount.mountpoint)
        if point == resolved or point in resolved.parents:
            found = max(found, (len(point.parts), mount.fstype), key=lambda one: one[0])
    return Place(folder, found[1])


def _size_of(folder: Path) -> int | None:
    try:
        status: Any = os.statvfs(folder)
    except OSError:
        return None
    return int(status.f_blocks * status.f_frsize)


def left_set(variables: Mapping[str, str]) -> list[str]:
    """The variables that belong to Ray's own tests."""
    return sorted(name for name in variables if name.startswith(TESTING_VARIABLES))
