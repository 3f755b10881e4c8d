"""What does the package do where the system reports or allows less? It says what is missing and what it does instead."""

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


# A kernel that reports less: a process gets its own mount namespace, where /proc has only some of the real files.

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
    """If the kernel hides parts of /proc, a memory report measures what it can and says what is missing."""
    # Without smaps_rollup it uses smaps. Without smaps it uses the process's status for private memory, and a note says what is
    # missing. With an empty /proc an error explains that nothing can be measured.
    as_root = ["unshare", "--mount"] if IS_ROOT else ["unshare", "--mount", "--user", "--map-root-user"]
    command = [*as_root, sys.executable, "-c", PARTIAL_PROC, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [
        "True | True |  | False 0",
        f"True | True | {NO_SHARES} | True 1",
        " | The memory of process {own} is not reported by the kernel: there is no /proc/self here. | "
        "No process can be measured: there is no /proc/self here. | True 1",
    ], done.stderr


# A process that may not open the raylet's files has only Ray's shared mapping, so a write would reach every worker.


@ray.remote(num_cpus=0.1, max_restarts=0)
class Elsewhere:
    """A worker that publishes and loads, possibly as another user."""

    def told(self, user: int | None = None) -> tuple[bool, list[tuple[type, str]], str, bool]:
        """Whether answers are right, the warnings, the error without isolation, and whether a report names omitted processes."""
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
):  # only root's raylet has capabilities that a worker can lack, and only root's worker can become another user
    WAYS["with fewer capabilities"] = ("setpriv --bounding-set=-all --inh-caps=-all", None)
    WAYS["of another user"] = ("", 65534)


@pytest.mark.long
def test_workers_that_may_not_open_the_store(cluster: None) -> None:
    """A worker that may not open the store's file loads right values and warns once, or raises an error if it must isolate."""
    # It runs in another user namespace, with fewer capabilities or as another user. The warning has the reason. A report names
    # the processes whose memory it may not read.
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


# A cluster whose store is small in comparison with the arguments.


def test_a_crowded_store_is_warned_of(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning names the bytes and the option if copied arguments or weights take too much of the store."""
    # Copied arguments take too much if Ray could not run two calls at a time, weights if they leave little room in the store.
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
    zerocopy.publish(pipelines.encoder(2040))  # the warning was already shown
    monkeypatch.setenv("RAY_max_task_args_memory_fraction", "0.5")
    zerocopy.publish(wide)


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """A file in huge pages, like a store in huge pages. The pool has twice as many pages as the file."""
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
    """Objects at any offset in a store of huge pages can be mapped privately, written and detached."""
    # If no page is free for copies, mapping raises an error, so that no process ends later at a write.
    monkeypatch.setattr(mapping, "raylets", lambda: [psutil.Process()])  # zerocopy searches this process's open files
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
