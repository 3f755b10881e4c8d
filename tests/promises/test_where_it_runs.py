"""Where the system tells or allows less than elsewhere, the package says what is missing and what it does instead."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pipelines
import psutil
import pytest
import ray
from conftest import STORE_BYTES

import zerocopy
from zerocopy._compat.linux import NO_SHARES
from zerocopy._store import mapping, object_store
from zerocopy.errors import IsolationError, IsolationWarning

IS_ROOT = os.geteuid() == 0


# A kernel that tells less: a process gets a /proc with some files of the real one, in a mount namespace of its own.

PARTIAL_PROC = """
import os, subprocess, sys
import zerocopy
from zerocopy.memory import private_bytes

def run(*command):
    subprocess.run(command, check=True)

def tell_with(*paths):
    run("mount", "-t", "tmpfs", "tmpfs", "/proc")
    for path in paths:
        os.makedirs(os.path.dirname(f"/proc/{path}"), exist_ok=True)
        open(f"/proc/{path}", "w").close()
        run("mount", "--bind", f"{old}/{path}", f"/proc/{path}")
    if paths:
        os.symlink(own, "/proc/self")
    tell()

def tell():
    report = zerocopy.memory_report([os.getpid()])
    print(*[process.private > len(held) for process in report.processes], end=" | ")
    try:
        print(private_bytes() > len(held), end=" | ")
    except ValueError as error:
        print(str(error).replace(own, "{own}"), end=" | ")
    print(*report.notes, end=" | ")
    print(str(report).endswith(report.notes), report._repr_html_().count("<p>"))

held = bytearray(b"1" * 100_000_000)
old, own = sys.argv[1], str(os.getpid())
run("mount", "--make-rprivate", "/")
run("mount", "--rbind", "/proc", old)
enough = "stat", f"{own}/stat", f"{own}/status", f"{own}/cmdline", f"{own}/maps"
tell_with(*enough, f"{own}/smaps")
tell_with(*enough)
tell_with()
"""


def test_a_kernel_that_tells_less(tmp_path: Path) -> None:
    """Without smaps_rollup smaps tells the same; without smaps the process' status tells private memory, and a note says what is
    missing; under an empty /proc nothing is told, in words."""
    as_root = ["unshare", "--mount"] if IS_ROOT else ["unshare", "--mount", "--user", "--map-root-user"]
    command = [*as_root, sys.executable, "-c", PARTIAL_PROC, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [
        "True | True |  | False 0",
        f"True | True | {NO_SHARES} | True 1",
        " | The memory of process {own} is not reported by the kernel: there is no /proc/self here. | "
        "No process can be measured: there is no /proc/self here. | True 1",
    ], done.stderr


# A process that may not open the files of the raylet: Ray's mapping is shared, so a write would reach every worker.


@ray.remote(num_cpus=0.1, max_restarts=0)
class Elsewhere:
    """A worker that publishes and loads, after it has perhaps become another user."""

    def told(self, user: int | None = None) -> tuple[bool, list[tuple[type, str]], str, bool]:
        """Whether answers are right, what was warned of, how isolation is refused, and whether a report says who is left out."""
        if user is not None:
            os.setgroups([])
            os.setuid(user)
        search = pipelines.search(width=64)
        publication = zerocopy.publish(search)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers = {publication.load()(1.0), publication.load()(1.0)}
            os.environ["ZEROCOPY_REQUIRE_ISOLATION"] = "1"
            try:
                publication.load()
            except IsolationError as error:
                refused = str(error)
            else:
                refused = "not refused"
        report = zerocopy.memory_report([os.getpid(), os.getppid()])
        left_out = f"Left out, because this process may not look into them: {os.getppid()}." in str(report)
        warned = [(one.category, str(one.message)) for one in caught]
        return answers == {search(1.0)}, warned, refused, left_out and len(report.processes) == 1


WAYS: dict[str, tuple[str, int | None]] = {"in another user namespace": ("unshare --user --map-root-user", None)}
if (
    IS_ROOT
):  # the raylet of anybody else has no capabilities that a worker could lack, and no worker may become another user
    WAYS["with fewer capabilities"] = ("setpriv --bounding-set=-all --inh-caps=-all", None)
    WAYS["of another user"] = ("", 65534)


@pytest.mark.long
def test_workers_that_may_not_open_the_store(cluster: None) -> None:
    """In another user namespace, with fewer capabilities or of another user a worker loads right values, warns once, naming the
    condition, and refuses where isolation is required. A report says whose memory it may not see."""
    told = []
    for command, user in WAYS.values():
        environment = {"py_executable": f"{command} {sys.executable}"} if command else {}
        told.append(Elsewhere.options(runtime_env=environment).remote().told.remote(user))
    for way, (right, caught, refused, says_left_out) in zip(WAYS, ray.get(told), strict=True):
        assert right, way
        assert says_left_out, way
        ((category, text),) = caught
        assert category is IsolationWarning
        for words in (text, refused):
            assert "the raylet's user, its user namespace, and all capabilities that it has" in words, way
        assert "a write to them reaches every worker" in text


# A cluster whose store is small for what is passed to it.


def test_a_crowded_store_is_warned_of(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray would not run two calls at a time, for what they copy, and where weights leave little of the store, a warning
    names the bytes and the option, once."""
    monkeypatch.setattr(object_store, "_warned", set())
    monkeypatch.setenv("RAY_max_task_args_memory_fraction", "0.01")
    limit = int(0.01 * STORE_BYTES) // 2
    wide = pipelines.search(width=64, settings={"copied": bytes(limit + 1000)})
    with pytest.warns(
        UserWarning, match=r"with Search among its arguments carries a copy of 7,5.*RAY_max_task_args_memory"
    ):
        zerocopy.publish(wide)
    zerocopy.publish(pipelines.search(width=64, settings={"copied": bytes(limit + 2000)}))
    monkeypatch.setattr(object_store, "_warned", set())
    zerocopy.publish(pipelines.search(width=64, settings={"copied": bytes(limit - 100_000)}))
    with pytest.warns(
        UserWarning, match=r"The weights of Sequential take 33,570,816 of .*RAY_max_task_args_memory"
    ) as told:
        zerocopy.publish(pipelines.encoder(2048))
    assert told[0].filename == __file__
    zerocopy.publish(pipelines.encoder(2040))  # it was said already
    monkeypatch.setenv("RAY_max_task_args_memory_fraction", "0.5")
    zerocopy.publish(wide)


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """A file in huge pages, as a store of them is. The pool has twice as many pages as the file."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    if os.geteuid() != 0:
        pytest.skip("only root can make a pool of huge pages")
    pool.write_text("6")
    try:
        if int(pool.read_text()) < 6:
            pytest.skip("this machine has no room for a pool of huge pages")
        file = os.memfd_create("zerocopy-test", os.MFD_HUGETLB)
        os.ftruncate(file, 3 * os.fstat(file).st_blksize)
        yield file
        os.close(file)
    finally:
        pool.write_text(before)


def test_a_store_of_huge_pages(huge_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects at any place of it are mapped privately, can be written and detached. Where no page is free for copies, a mapping
    is refused in words, instead of a process that ends at a write."""
    monkeypatch.setattr(mapping, "raylets", lambda: [psutil.Process()])  # whose open files are looked through
    page = os.fstat(huge_pages).st_blksize
    store = mmap.mmap(huge_pages, 3 * page, flags=mmap.MAP_SHARED)
    start = page + 12 * 4096 + 64
    store[start : start + page] = b"7" * page
    buffers = [memoryview(store)[start : start + 16], memoryview(store)[start + 16 : start + page]]
    memory, offsets = mapping.map_private(buffers, required=True)
    assert memory[offsets[1] : offsets[1] + page - 16] == b"7" * (page - 16)
    memory[offsets[1]] = 1
    assert memory.shown_bytes() == len(memory) - page
    mapping.detach_all([memory])
    store[start : start + page] = b"8" * page
    assert memory[offsets[1] : offsets[1] + page - 16] == b"\1" + b"7" * (page - 17)
    with pytest.raises(IsolationError, match="bytes of huge pages are free for copies"):
        mapping.map_private(buffers, required=True)
