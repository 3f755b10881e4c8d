"""Does each check of `zerocopy doctor` pass and fail when it should, also in workers that may not map the store?"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import ray
from click.testing import Result
from packaging.requirements import Requirement

from zerocopy._cli import checks
from zerocopy._cli.facts import Facts, Place, Trial, facts_here, left_set, mapping_here, place_of
from zerocopy._cli.findings import Finding, has_failed, report_of, scrubbed
from zerocopy._compat.containers import Rights, is_gvisor, memory_limit, shared_memory_room

GB = 10**9
SHM, DISK, NFS = Place("/dev/shm", "tmpfs"), Place("/var/ray", "ext4"), Place("/mnt/ray", "nfs4")
HUGE = Place("/mnt/hugepages", "hugetlbfs")
OWN = Rights(1000, "0 0 4294967295", 0b1)
WELL = Trial(None, "linux", False, OWN, OWN)
REFUSED = attrs.evolve(WELL, reason="it cannot open the store's file through a raylet")


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (attrs.evolve(REFUSED, system="darwin", reason="darwin has no /proc"), "darwin has no /proc"),
        (attrs.evolve(REFUSED, is_gvisor=True), "gVisor"),
        (attrs.evolve(REFUSED, raylet=None), "no raylet can be seen"),
        (attrs.evolve(REFUSED, raylet=Rights(0, OWN.namespace, 0)), "the user id 1000, its raylet 0"),
        (attrs.evolve(REFUSED, raylet=Rights(1000, "0 100000 65536", 0)), "another user namespace"),
        (
            attrs.evolve(REFUSED, raylet=Rights(1000, OWN.namespace, 0b11)),
            "`capsh --decode=0000000000000002` names them",
        ),
        (REFUSED, "A security module (SELinux, AppArmor) may forbid it"),
    ],
    ids=["macOS", "gVisor", "no raylet", "user", "namespace", "capabilities", "else"],
)
def test_why_a_mapping_is_refused(trial: Trial, words: str) -> None:
    """Each cause has its own message and a remedy."""
    found = checks.check_mapping(trial)
    assert found.level == "failure"
    assert words in found.what
    assert found.remedy
    assert checks.check_mapping(WELL).level == "ok"


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (checks.check_store_place(SHM, GB), "ok", "1.0 GB in /dev/shm (tmpfs)"),
        (checks.check_store_place(HUGE, GB), "ok", "hugetlbfs"),
        (checks.check_store_place(DISK, GB), "warning", "The store is on disk: /var/ray (ext4)"),
        (checks.check_store_place(NFS, GB), "failure", "network file system"),
        (checks.check_store_place(Place("", ""), GB), "warning", "cannot be seen"),
        (checks.check_spill_place(DISK), "ok", "/var/ray (ext4)"),
        (checks.check_spill_place(NFS), "warning", "network file system"),
        (checks.check_spill_place(SHM), "warning", "memory again"),
        (checks.check_huge_pages(SHM, 0, GB), "ok", "ordinary pages"),
        (checks.check_huge_pages(HUGE, 2 * GB, GB), "ok", "2.0 GB"),
        (checks.check_huge_pages(HUGE, 0, GB), "warning", "falls back to the shared one"),
        (checks.check_shared_memory(SHM, 2 * GB, GB), "ok", "2.0 GB"),
        (checks.check_shared_memory(SHM, GB // 2, GB), "failure", "processes end when it is full"),
        (checks.check_shared_memory(DISK, GB // 2, GB), "ok", "500.0 MB"),
        (checks.check_shared_memory(DISK, None, GB), "ok", "none here"),
        (checks.check_default_store(8 * GB, 10 * GB), "ok", "3.0 GB"),
        (checks.check_default_store(GB // 16, 10 * GB), "warning", "or one on disk"),
        (checks.check_limit(None, GB), "ok", "No control group"),
        (checks.check_limit(10 * GB, GB), "ok", "10.0 GB"),
        (checks.check_limit(10 * GB, 9 * GB), "warning", "leaves 1.0 GB to all workers"),
        (checks.check_limit(GB, 2 * GB), "failure", "before the store is full"),
        (checks.check_memory_monitor({}, 0.5), "ok", "from 95% on"),
        (checks.check_memory_monitor({"RAY_memory_usage_threshold": "0.6"}, 0.58), "warning", "from 60% on"),
        (checks.check_memory_monitor({"RAY_memory_monitor_refresh_ms": "0"}, 0.5), "warning", "switches it off"),
        (checks.check_out_of_band(allowed=True), "ok", "pin them"),
        (checks.check_out_of_band(allowed=False), "warning", "refuses publications in closures"),
        (checks.check_variables([]), "ok", "No variable"),
        (checks.check_variables(["RAY_testing_rpc_failure"]), "warning", "RAY_testing_rpc_failure"),
        (checks.check_known({"ray": "2.60.0", "protobuf": "7.1"}, ("Linux", "6.8.0-41-generic")), "ok", "None"),
        (checks.check_known({"ray": "2.53.0", "protobuf": "7.1"}, ("Linux", "6.8.0")), "warning", "protobuf 7"),
        (checks.check_known({}, ("Linux", "5.10.0-28-amd64")), "warning", "Before Linux 5.14"),
        (checks.check_told(True), "ok", "each mapping"),
        (checks.check_told(False), "warning", "smaps"),
    ],
)
def test_what_is_found(finding: Finding, level: str, words: str) -> None:
    """Each finding that is not "ok" has a remedy."""
    assert finding.level == level
    assert words in finding.what
    assert bool(finding.remedy) == (level != "ok")


def test_versions_are_compared() -> None:
    """Versions must meet zerocopy's requirements, and nodes must agree: two numbers for Python and torch, three for zerocopy."""
    needed = [Requirement("ray>=2.53"), Requirement("torch>=2.6"), Requirement("matplotlib>=9; extra == 'plot'")]
    (old,) = checks.check_packages({"ray": "2.50.1", "torch": "2.13.0+cpu", "matplotlib": "3"}, needed)
    assert (old.level, old.remedy) == ("failure", "pip install 'ray>=2.53'.")
    assert [one.level for one in checks.check_packages({"ray": "2.60.0"}, needed)] == ["ok"]

    here = {"python": "3.11.7", "torch": "2.13.0+cpu", "zerocopy-ray": "0.1.0"}
    assert checks.check_agreement({"here": here}) == []
    other = {**here, "python": "3.11.9", "torch": "2.13.1"}
    assert [one.level for one in checks.check_agreement({"here": here, "node": other})] == ["ok"]
    (differs,) = checks.check_agreement({"here": here, "node-of-ray": {**here, "torch": "2.12.0"}})
    assert differs.level == "failure"
    assert "torch differs: 2.13 on here; 2.12 on node-of-" in differs.what


def test_limits_are_read_from_both_versions_of_control_groups(tmp_path: Path) -> None:
    """A number is a limit; "max" and the largest number of pages mean no limit."""
    assert memory_limit(tmp_path) is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit(tmp_path) is None
    (tmp_path / "memory/memory.limit_in_bytes").write_text("2000000000\n")
    assert memory_limit(tmp_path) == 2 * GB
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000000000\n")
    assert memory_limit(tmp_path) == GB


def test_a_place_has_the_file_system_of_its_mount() -> None:
    """The mount is the nearest one above the folder."""
    assert place_of("/dev/shm").filesystem == "tmpfs"
    assert place_of("/proc/self").filesystem == "proc"
    assert place_of(None) == Place("", "")
    assert shared_memory_room(Path("/no/such/folder")) is None
    assert is_gvisor("Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016")
    assert not is_gvisor("Linux version 6.8.0-41-generic")
    assert left_set({"RAY_testing_x": "1", "RAY_ADDRESS": "auto"}) == ["RAY_testing_x"]


def test_a_report_names_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report contains no home folder, user name or host name; longer words that contain such a name stay unchanged."""
    text = scrubbed("/home/ann/ray of ann on box7, /Users/bob/x, annual, /work/ann-x", "ann", "box7", "/home/ann")
    assert text == "~/ray of USER on HOST, ~/x, annual, /work/ann-x"
    report = report_of(
        [Finding("store", "warning", f"It is in {Path.home()}/x.", "Move it.", "ab" * 20)], ["ray 2.60.0"]
    )
    assert "- ray 2.60.0" in report
    assert "- **warning** store (node abababab): It is in ~/x. → Move it." in report


WAYS: dict[str, tuple[str, int | None, str]] = (
    {  # only root's raylet has capabilities that a worker can lack, and only root's worker can become another user
        "capabilities": ("setpriv --bounding-set=-all --inh-caps=-all", None, "capabilities that this process lacks"),
        "user": ("", 65534, "the user id 65534, its raylet 0"),
    }
    if os.geteuid() == 0
    else {"namespace": ("unshare --user --map-root-user", None, "another user namespace")}
)


def test_workers_that_may_not_map_say_why(cluster: None) -> None:
    """A worker in another user namespace, with fewer capabilities or of another user reports why it may not map the store."""

    @ray.remote(num_cpus=0.1, max_retries=0, max_calls=1)
    def trial(user: int | None = None) -> Trial:
        if user is not None:
            os.setgroups([])
            os.setuid(user)
        return mapping_here()

    assert checks.check_mapping(ray.get(trial.remote())).level == "ok"
    asked = [
        trial.options(runtime_env={"py_executable": f"{command} {sys.executable}"} if command else {}).remote(user)
        for command, user, _ in WAYS.values()
    ]
    for (way, (_, _, words)), found in zip(WAYS.items(), map(checks.check_mapping, ray.get(asked)), strict=True):
        assert found.level == "failure", way
        assert words in found.what, way


def test_a_cluster_is_looked_at(
    cluster: None, told: Callable[..., Any], zerocopy_command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker per node checks it, a failure ends the command with status 1, and `--report` prints markdown."""
    found = [Finding(**one) for one in told("doctor", "--address", "auto")]
    assert {one.check for one in found} >= {"private mapping", "store", "/dev/shm", "versions", "agreement"}
    assert not has_failed(found)
    monkeypatch.setattr(checks, "_requirements", lambda: [Requirement("torch>=99")])
    done = zerocopy_command("doctor", "--report")
    assert done.exit_code == 1
    assert "- **failure** versions" in done.output
    assert done.output.startswith("### zerocopy doctor\n\n- python ")
    facts = facts_here()
    assert isinstance(facts, Facts)
    assert facts.store > 0
    assert facts.store_place.filesystem
