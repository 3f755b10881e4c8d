"""Which cluster and helpers do all tests share? Each process that runs tests starts one cluster."""

from __future__ import annotations

import gc
import inspect
import json
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import reliability
import torch
from click.testing import CliRunner, Result
from ray._private import internal_api, state

import zerocopy
from zerocopy._cli.main import cli
from zerocopy._cluster import following
from zerocopy._publish import weights

CPUS = 4
STORE_BYTES = 1_500_000_000
ORDINARY = {"RAY_allow_out_of_band_object_ref_serialization": "1"}  # for new processes: the tests' own may forbid it
HERE = Path(__file__).parent
# Workers import test modules by name, each from its folder.
FOLDERS = list(map(str, [HERE, *sorted({path.parent for path in HERE.rglob("test_*.py")})]))
IMPORT_PATH = os.pathsep.join(FOLDERS)
sys.path.extend(folder for folder in FOLDERS if folder not in sys.path)  # some test modules import cases from others
# Each process takes the next file when it finishes one. The longest files start first, so that none runs alone at the end.
LONGEST = (
    "test_examples",
    "test_notebook",
    "test_docs",
    "test_bench",
    "test_actor",
    "test_wrappers",
    "test_faithful",
    "test_task",
    "test_leaks",
    "test_passing",
)
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-page", type=Path, help="the page that gets the tables of the faults that were measured")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the measured faults to the page, if one was given and no test has failed."""
    page = session.config.getoption("--faults-page")
    if page is not None and exitstatus == 0:
        reliability.write(page, reliability.measured)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
        environment.setenv("OMP_NUM_THREADS", "1")  # workers inherit both variables, also those of joined programs
        environment.setenv("PYTHONPATH", IMPORT_PATH)
        warnings.simplefilter("ignore")  # Ray warns about its own code
        ray.init(
            "local",
            num_cpus=CPUS,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    ray.shutdown()


@pytest.fixture
def address(cluster: None) -> str:
    """The address with which a program joins the cluster: starting its own cluster would take seconds."""
    return ray.get_runtime_context().gcs_address


@pytest.fixture
def name(request: pytest.FixtureRequest, cluster: None) -> Iterator[str]:
    """A name for publications of this test. All names that start with it are removed afterwards."""
    chosen = request.node.name
    yield chosen
    for one in [found for found in zerocopy.publications().names if found.startswith(chosen)]:
        zerocopy.remove(one)
    following._pending.clear()  # pending warnings of the follower thread must not reach other tests


@pytest.fixture
def run_as_main(
    cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a program as `__main__` of this process, on its cluster, and returns the output. A new process would take seconds."""
    started: list[str] = []

    def init(address: str, **options: Any) -> None:
        inspect.signature(start).bind(address, **options)
        started.append(address)

    def run(path: Path, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", list(map(str, [path, *arguments])))
        monkeypatch.syspath_prepend(path.parent)
        earlier = set(unnamed_actors())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a separate process would print warnings and continue
                runpy.run_path(str(path), run_name="__main__")
        finally:
            for actor in set(unnamed_actors()) - earlier:  # in a separate process, these actors would end with it
                ray._private.worker.global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)
        assert started == ["local"]
        return capsys.readouterr().out

    start = ray.init
    monkeypatch.setattr(ray, "init", init)
    return run


@pytest.fixture
def zerocopy_command() -> Callable[..., Result]:
    """Runs a command line of `zerocopy` in this process."""

    def run(*arguments: object) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a separate process would print warnings and continue
            return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="zerocopy", catch_exceptions=False)

    return run


@pytest.fixture
def told(zerocopy_command: Callable[..., Result]) -> Callable[..., Any]:
    """Runs a command of `zerocopy` that succeeds and prints only JSON to stdout, and returns the parsed JSON."""

    def run(*arguments: object) -> Any:
        done = zerocopy_command(*arguments, "--format", "json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def unnamed_actors() -> list[str]:
    """Ids of the actors that run or start. Actors of Ray and the registry are left out, because they have names, and so are the
    registry's holders of weights."""
    return [
        actor
        for actor, told in state.actors().items()
        if told["State"] != "DEAD" and not told["Name"] and told["ActorClassName"] != "Holder"
    ]


def bytes_in_store() -> int:
    """Bytes of all objects in this node's store."""
    reply = internal_api.get_memory_info_reply(state.state)
    return int(reply.store_stats.object_store_bytes_used)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Return whether `condition` becomes true in time. Ray frees objects some moments after the last reference is gone."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        gc.collect()
        time.sleep(0.05)
    return True


@pytest.fixture
def store_use(cluster: None) -> Callable[[], int]:
    """Returns how many bytes the store has now, minus the bytes at the start of the test."""
    gc.collect()
    settled, calm = bytes_in_store(), 0
    while calm < 10:  # Ray frees objects of earlier tests with a delay
        time.sleep(0.1)
        before, settled = settled, bytes_in_store()
        calm = calm + 1 if before == settled else 0
    return lambda: bytes_in_store() - settled


@pytest.fixture
def publishings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of written storages each time weights are put into the store."""
    writes: list[int] = []

    class Counted(weights.Writer):
        def __init__(self, storages: Any, ends: Any, cut: Any, stored: Any, make_manifest: Any) -> None:
            writes.append(sum(storage.key not in stored for storage in storages))
            super().__init__(storages, ends, cut, stored, make_manifest)

    monkeypatch.setattr(weights, "Writer", Counted)
    return writes


def run_python(source: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run source text as `__main__` of a fresh process."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *(arguments or ("-",))],
        input=source,
        env={**os.environ, "PYTHONPATH": path, "RAY_IGNORE_UNHANDLED_ERRORS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
