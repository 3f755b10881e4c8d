"""Is everything well on a node? Each check receives the facts that it needs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import attrs
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from zerocopy._cli.facts import Facts, Place, Trial, left_set
from zerocopy._cli.findings import Finding, failure, ok, warning
from zerocopy._compat import containers, linux
from zerocopy._compat.ray import (
    MEMORY_REFRESH_VARIABLE,
    MEMORY_THRESHOLD,
    MEMORY_THRESHOLD_VARIABLE,
    STORE_FRACTION,
)
from zerocopy._store.mapping import REQUIRE_ISOLATION
from zerocopy._tables import format_bytes

IN_MEMORY = ("tmpfs", "ramfs", "shm")
REMOTE = ("nfs", "cifs", "smb", "fuse", "lustre", "ceph", "gpfs", "9p", "afs", "glusterfs")
CROWDED = 0.8  # the part of the container's memory that is too much for the store alone
CLOSE = 0.05  # a part of the memory: if less is left below its threshold, Ray's monitor is about to kill


def checks_of(facts: Facts, *, is_own: bool) -> list[Finding]:
    """All findings on one node.

    Args:
        is_own: whether the cluster was started only for this, with a small store. Then /dev/shm is compared with the store that
            Ray would choose by default.
    """
    found = [
        check_mapping(facts.mapping),
        check_store_place(facts.store_place, facts.store),
        check_spill_place(facts.spill_place),
        check_huge_pages(facts.store_place, facts.huge_pages, facts.store),
        *([check_default_store(facts.shared_memory, facts.limit or facts.memory)] if is_own else []),
        *([] if is_own else [check_shared_memory(facts.store_place, facts.shared_memory, facts.store)]),
        check_limit(facts.limit, facts.store),
        check_memory_monitor(facts.variables, facts.used),
        check_out_of_band(allowed=facts.allows_out_of_band),
        check_variables(left_set(facts.variables)),
        *check_packages(facts.versions, _requirements()),
        check_known(facts.versions, facts.system),
        check_told(facts.tells_mappings),
    ]
    return [attrs.evolve(one, node=facts.node) for one in found]


def check_mapping(trial: Trial) -> Finding:
    """Whether a worker can map the store privately."""
    name = "private mapping"
    if trial.reason is None:
        return ok(name, "A write to a loaded pipeline stays in the process that wrote it (tried in a worker).")
    why, remedy = why_refused(trial)
    return failure(name, f"The store cannot be mapped privately: {why}. Writes reach every worker.", remedy)


def why_refused(trial: Trial) -> tuple[str, str]:
    """Why Linux, or another system, refuses a private mapping, and what to do."""
    instead = f"{REQUIRE_ISOLATION}=1 refuses to load instead of sharing writes."
    own, raylet = trial.own, trial.raylet
    if trial.system != "linux":
        return trial.reason or "", f"Run it on Linux. {instead}"
    if trial.is_gvisor:
        return (
            "gVisor is the kernel, which does not let a process open the raylet's files",
            "Run the container with runc.",
        )
    if own is None or raylet is None:
        return "no raylet can be seen from here", "Run it in the container of the raylet, in the same PID namespace."
    if own.namespace != raylet.namespace:
        return (
            "the process is in another user namespace than its raylet; Ray's image_uri makes one",
            "Start the nodes from that image, in the place of image_uri.",
        )
    if own.user != raylet.user:
        return f"this process has the user id {own.user}, its raylet {raylet.user}", "Run both as the same user."
    if lacking := raylet.capabilities & ~own.capabilities:
        return (
            f"its raylet has capabilities that this process lacks (`capsh --decode={lacking:016x}` names them)",
            "Start the raylet without them, or give this process the same (docker's --cap-add).",
        )
    return (
        f"{trial.reason}. A security module (SELinux, AppArmor) may forbid it",
        f"Let it read the files that the raylet has open. {instead}",
    )


def check_store_place(place: Place, store: int) -> Finding:
    """Whether the store is in memory."""
    name = "store"
    where = f"{place.folder} ({place.filesystem or 'unknown'})"
    if not place.folder:
        return warning(
            name, "The raylet cannot be seen, nor where its store is.", "Look from the container of the raylet."
        )
    if place.filesystem in IN_MEMORY or place.filesystem.startswith("hugetlb"):
        return ok(name, f"{format_bytes(store)} in {where}.")
    if place.filesystem.startswith(REMOTE):
        return failure(
            name,
            f"The store is on a network file system: {where}.",
            "Start Ray with --plasma-directory=/dev/shm, or a local --temp-dir.",
        )
    return warning(
        name,
        f"The store is on disk: {where}. Ray does that when /dev/shm is smaller than the store.",
        "Enlarge /dev/shm (docker run --shm-size, an emptyDir with medium: Memory in Kubernetes), or take a smaller store.",
    )


def check_spill_place(place: Place) -> Finding:
    """Whether objects that do not fit into the store go to a disk of this machine."""
    name = "fallback folder"
    where = f"{place.folder} ({place.filesystem or 'unknown'})"
    if place.filesystem.startswith(REMOTE):
        return warning(
            name,
            f"Objects that do not fit into the store go to a network file system: {where}.",
            "Give a local --temp-dir.",
        )
    if place.filesystem in IN_MEMORY:
        return warning(
            name, f"Objects that do not fit into the store go to memory again: {where}.", "Give a --temp-dir on disk."
        )
    return ok(
        name, f"Objects that do not fit into the store go to {where}." if place.folder else "Ray does not report it."
    )


def check_huge_pages(place: Place, free: int, store: int) -> Finding:
    """Whether a store of huge pages leaves enough of them for private mappings, which reserve as many as the weights take."""
    name = "huge pages"
    if not place.filesystem.startswith("hugetlb"):
        return ok(name, "The store has ordinary pages.")
    if free >= store:
        return ok(name, f"{format_bytes(free)} of huge pages are free for private mappings.")
    return warning(
        name,
        f"{format_bytes(free)} of huge pages are free, the store has {format_bytes(store)}: a private mapping reserves as many "
        "as the weights take, and falls back to the shared one where there are too few.",
        "Raise vm.nr_hugepages, or take a store of ordinary pages.",
    )


def check_shared_memory(place: Place, shared_memory: int | None, store: int) -> Finding:
    """Whether /dev/shm is large enough for the store."""
    name = str(containers.SHARED_MEMORY)
    if shared_memory is None:
        return ok(name, "There is none here.")
    if Path(place.folder).is_relative_to(containers.SHARED_MEMORY) and shared_memory < store:
        return failure(
            name,
            f"It has {format_bytes(shared_memory)}, the store in it {format_bytes(store)}: processes end when it is full.",
            f"Enlarge it (docker run --shm-size={store + store // 10}), or take a smaller --object-store-memory.",
        )
    return ok(name, f"It has {format_bytes(shared_memory)}, the store {format_bytes(store)}.")


def check_default_store(shared_memory: int | None, memory: int) -> Finding:
    """Whether /dev/shm is large enough for the store that Ray chooses by default."""
    name, store = str(containers.SHARED_MEMORY), int(STORE_FRACTION * memory)
    if shared_memory is None:
        return ok(name, "There is none here.")
    wanted = f"a store of {STORE_FRACTION:.0%} of the memory, {format_bytes(store)}"
    text = f"It has {format_bytes(shared_memory)}; by default Ray takes {wanted}"
    if shared_memory >= store:
        return ok(name, f"{text}.")
    return warning(
        name,
        f"{text}, and then a smaller one, or one on disk.",
        f"Enlarge it (docker run --shm-size={store + store // 10}); `zerocopy plan` tells how large a store must be.",
    )


def check_limit(limit: int | None, store: int) -> Finding:
    """Whether the memory limit of the container leaves enough for the store and the workers."""
    name = "container"
    if limit is None:
        return ok(name, "No control group limits the memory.")
    text = f"It may take {format_bytes(limit)} of memory, the store {format_bytes(store)}"
    remedy = "Raise the container's memory limit, or take a smaller --object-store-memory."
    if store > limit:
        return failure(name, f"{text}: the kernel ends processes before the store is full.", remedy)
    if store > CROWDED * limit:
        return warning(name, f"{text}, which leaves {format_bytes(limit - store)} to all workers.", remedy)
    return ok(name, f"{text}.")


def check_memory_monitor(variables: Mapping[str, str], used: float) -> Finding:
    """Whether Ray is about to kill workers, or never kills any."""
    name = "memory monitor"
    if variables.get(MEMORY_REFRESH_VARIABLE) == "0":
        return warning(
            name,
            f"{MEMORY_REFRESH_VARIABLE}=0 switches it off: when memory is short, the kernel chooses which process to end.",
            "Unset it. `publication.prefetch()` keeps Ray from charging one worker for all weights.",
        )
    threshold = float(variables.get(MEMORY_THRESHOLD_VARIABLE, MEMORY_THRESHOLD))
    text = f"{used:.0%} of the memory is used; Ray kills workers from {threshold:.0%} on"
    if used > threshold - CLOSE:
        return warning(
            name,
            f"{text}.",
            f"Free memory, or raise {MEMORY_THRESHOLD_VARIABLE}. `zerocopy memory` shows which processes use it.",
        )
    return ok(name, f"{text}.")


def check_out_of_band(*, allowed: bool) -> Finding:
    """Whether closures may capture publications."""
    name = "captured references"
    if allowed:
        return ok(
            name, "Closures, globals and plain pickles may hold publications; they pin them until those are closed."
        )
    return warning(
        name,
        "RAY_allow_out_of_band_object_ref_serialization=0 refuses publications in closures, globals and plain pickles.",
        "Pass them as arguments, give them names, or unset it.",
    )


def check_variables(names: Iterable[str]) -> Finding:
    """Whether variables of Ray's own tests are still set, which drop or delay messages."""
    name, names = "test variables", list(names)
    if not names:
        return ok(name, "No variable of Ray's own tests is set.")
    return warning(
        name, f"Set, and meant for Ray's own tests: {', '.join(names)}.", f"unset {' '.join(names)}; start Ray again."
    )


def _requirements() -> list[Requirement]:
    """The packages that zerocopy declares to need."""
    return [Requirement(one) for one in importlib.metadata.requires("zerocopy-ray") or ()]


def check_packages(versions: Mapping[str, str], requirements: Iterable[Requirement]) -> Iterator[Finding]:
    """Whether the installed packages are recent enough."""
    asked = {one.name: one.specifier for one in requirements if one.marker is None}
    old = {
        name: specifier
        for name, specifier in asked.items()
        if name in versions and not specifier.contains(versions[name], prereleases=True)
    }
    for name, specifier in old.items():
        yield failure(
            "versions",
            f"{name} {versions[name]} is too old: zerocopy needs {specifier}.",
            f"pip install '{name}{specifier}'.",
        )
    if not old:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield ok("versions", f"{listed}.")


@attrs.frozen
class Known:
    """A known problem of some versions.

    Attributes:
        where: the versions with the problem, by package; `linux` is the kernel.
    """

    where: Mapping[str, str]
    what: str
    remedy: str


KNOWN = (
    Known(
        {"ray": "<2.54", "protobuf": ">=7"},
        "Ray Serve before 2.54 reads an attribute that protobuf 7 has removed.",
        "pip install 'protobuf<7'.",
    ),
    Known(
        {"linux": "<5.14"},
        "Before Linux 5.14 a write of another thread can be lost while `unshare` gives it private memory.",
        "Let no thread write meanwhile, or take a newer kernel.",
    ),
)


def check_known(versions: Mapping[str, str], system: tuple[str, str]) -> Finding:
    """Whether the installed versions have a known problem."""
    name, (kind, release) = "known problems", system
    there = {**versions, **({"linux": release.split("-")[0]} if kind == "Linux" else {})}
    met = [known for known in KNOWN if all(_is_within(there.get(one), text) for one, text in known.where.items())]
    if not met:
        return ok(name, "None with these versions.")
    return warning(name, " ".join(one.what for one in met), " ".join(one.remedy for one in met))


def _is_within(version: str | None, specifier: str) -> bool:
    try:
        return version is not None and Version(version) in SpecifierSet(specifier, prereleases=True)
    except InvalidVersion:
        return False


def check_told(tells_mappings: bool) -> Finding:
    """Whether memory reports can be exact."""
    if tells_mappings:
        return ok("memory reports", "The kernel reports the memory of each mapping.")
    return warning("memory reports", linux.NO_SHARES, "Use a kernel with CONFIG_PROC_PAGE_MONITOR.")


def check_agreement(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Whether the nodes, by id, and this process can read each other's publications."""
    if len(versions) < 2:
        return []
    found = [
        _agreement(name, numbers, versions) for name, numbers in (("python", 2), ("torch", 2), ("zerocopy-ray", 3))
    ]
    differing = [one for one in found if one is not None]
    return differing or [ok("agreement", f"{len(versions)} places have the same Python, torch and zerocopy.")]


def _agreement(name: str, numbers: int, versions: Mapping[str, Mapping[str, str]]) -> Finding | None:
    told: dict[str, list[str]] = {}
    for node, installed in versions.items():
        told.setdefault(".".join(installed.get(name, "none").split(".")[:numbers]), []).append(node[:8])
    if len(told) == 1:
        return None
    listed = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in told.items())
    return failure(
        "agreement",
        f"{name} differs: {listed}. These places refuse each other's publications.",
        "Install the same version on every node.",
    )
