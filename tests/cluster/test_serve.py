"""Do apps work that Serve builds from a config and deploys as `serve deploy` does? They run on their own cluster."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import ray
from conftest import IMPORT_PATH, bytes_in_store
from versions import numbered

import zerocopy

pytestmark = pytest.mark.long

R = TypeVar("R")
HOST = "127.0.0.1"
PAGE = Path(__file__).parents[2] / "docs" / "serve.md"
WIDTH = 1024  # as in `served`
NBYTES = zerocopy.plan(numbered(1, width=WIDTH)).shared_bytes  # of one version


# The next functions run in the process that started Serve's cluster: the tests' process may be connected to another cluster.


def start() -> str:
    os.environ.update(PYTHONPATH=IMPORT_PATH, OMP_NUM_THREADS="1", RAY_IGNORE_UNHANDLED_ERRORS="1")
    context = ray.init(
        "local",
        num_cpus=4,
        object_store_memory=400_000_000,
        include_dashboard=True,
        dashboard_port=free_port(),
        log_to_driver=False,
        logging_level="ERROR",
    )
    return f"http://{context.dashboard_url}"


@functools.cache
def client(address: str) -> Any:
    """The client that `serve deploy` uses."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    return ServeSubmissionClient(address)


def deploy(address: str, config: dict[str, Any]) -> None:
    client(address).deploy_applications(config)


def status(address: str) -> dict[str, Any]:
    apps: dict[str, Any] = client(address).get_serve_details()["applications"]
    return apps


def publish(name: str, number: int) -> None:
    zerocopy.publish(numbered(number, width=WIDTH), name=name)


def run_page(path: str, config: str) -> tuple[int, str]:
    """Build the app of the docs and call its deployment; return the length of its answer and the table of publications."""
    import yaml
    from ray.serve.schema import ServeDeploySchema
    from starlette.requests import Request

    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(config)).applications
    page = runpy.run_path(path, run_name=app.import_path.partition(":")[0])
    bound = page["build"](app.args)._bound_deployment
    answer = bound.func_or_class(*bound.init_args)(Request({"type": "http", "query_string": b"q=2"}))
    return len(answer), str(zerocopy.publications())


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], seconds: float = 180, pause: float = 0.5) -> bool:
    """Return whether `condition` becomes true in time. Checks seldom, because Serve's status is slow to compute."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


class Cluster:
    """Serve on its own cluster, as a user sees it who deploys apps and sends requests."""

    def __init__(self, driver: concurrent.futures.Executor) -> None:
        self.driver = driver
        self.address = self.run(start)
        self.port = free_port()

    def run(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function in the driver's process and return its result."""
        return self.driver.submit(function, *args).result()

    def deploy(self, **apps: dict[str, str]) -> None:
        """Deploy these apps in place of the running ones."""
        applications = [
            {
                "name": name,
                "import_path": "served:build_unnamed" if name == "unnamed" else "served:build",
                "route_prefix": f"/{name}",
                "args": {"name": name, **args},
            }
            for name, args in apps.items()
        ]
        options = {"host": HOST, "port": self.port}
        self.run(deploy, self.address, {"http_options": options, "applications": applications})

    def status(self, app: str) -> dict[str, Any]:
        """Serve's status of an app."""
        return self.run(status, self.address).get(app, {"status": "", "deployments": {}})

    def replicas(self) -> set[int]:
        """The process ids of all running replicas."""
        apps = self.run(status, self.address).values()
        told = [replica for app in apps for one in app["deployments"].values() for replica in one["replicas"]]
        return {replica["pid"] for replica in told if replica["state"] == "RUNNING"}

    def ask(self, app: str) -> dict[str, Any]:
        """The answer of an app over HTTP."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/{app}", timeout=30) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer

    def answers(self, stamp: str) -> dict[str, list[dict[str, Any]]]:
        """The answer of each replica of each app, after the deployment with this stamp is running."""
        return {"acting": self._answers("acting", stamp, 2), "plain": self._answers("plain", stamp, 1)}

    def _answers(self, app: str, stamp: str, replicas: int) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}

        def have_answered() -> bool:
            answer = self.ask(app)
            found.update({answer["pid"]: answer} if answer["stamp"] == stamp else {})
            return len(found) == replicas

        assert wait_until(lambda: self.status(app)["status"] == "RUNNING"), json.dumps(self.status(app), indent=1)
        assert wait_until(have_answered, pause=0.1), (stamp, found)
        return list(found.values())

    def stored(self) -> int:
        """Bytes in the store."""
        return self.run(bytes_in_store)


@pytest.fixture(scope="module")
def serving() -> Iterator[Cluster]:
    """A cluster with three apps: two replicas of a `@zerocopy.actor`, a plain class, and an app with an unnamed pipeline."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as driver:
        cluster = Cluster(driver)
        cluster.deploy(acting=args(1, "first"), plain=args(2, "first"), unnamed=args(1, "first"))
        yield cluster
        cluster.run(ray.shutdown)


def args(number: int, stamp: str) -> dict[str, str]:
    return {"number": str(number), "stamp": stamp}


def facts(answers: list[dict[str, Any]], what: str) -> set[Any]:
    """All different answers, or versions, of these replicas."""
    return {value for answer in answers for value in answer[what].values()}


def test_builders_that_publish_under_a_name(serving: Cluster) -> None:
    """A handle, an instance and a looked-up handle reach all replicas over one copy, though the builder's process ends."""
    answers = serving.answers("first")
    assert facts(answers["acting"], "answers") == {1}
    assert facts(answers["plain"], "answers") == {2}
    assert facts([*answers["acting"], *answers["plain"]], "versions") == {1}
    assert wait_until(lambda: serving.stored() < 1.1 * 2 * NBYTES), serving.stored()


def test_what_has_no_name_is_refused(serving: Cluster) -> None:
    """An app with an unnamed pipeline fails to deploy, and its status says that a name is needed."""
    assert wait_until(lambda: serving.status("unnamed")["status"] == "DEPLOY_FAILED"), serving.status("unnamed")
    message = serving.status("unnamed")["message"]
    assert "OutOfBandError: A pipeline of class Numbered" in message
    assert "zerocopy.publish(pipeline, name=...)" in message


def test_redeployed(serving: Cluster) -> None:
    """A new deployment with the same weights uses the same version at no cost; with other weights it gets the next version."""
    before = serving.stored()
    serving.deploy(acting=args(1, "second"), plain=args(3, "second"))
    answers = serving.answers("second")
    assert facts(answers["acting"], "answers") == facts(answers["acting"], "versions") == {1}
    assert (facts(answers["plain"], "answers"), facts(answers["plain"], "versions")) == ({3}, {2})
    assert wait_until(lambda: serving.stored() - before < 1.1 * NBYTES), (before, serving.stored())


def test_all_replicas_killed_at_once(serving: Cluster) -> None:
    """The apps restart and give the same answers as before."""
    serving.answers("second")
    killed = serving.replicas()
    assert len(killed) == 3
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: len(serving.replicas() - killed) == 3), serving.replicas()
    answers = serving.answers("second")
    assert (facts(answers["acting"], "answers"), facts(answers["plain"], "answers")) == ({1}, {3})
    assert not killed & {answer["pid"] for app in answers.values() for answer in app}


def test_updated_while_it_is_asked(serving: Cluster) -> None:
    """`Live` handles answer with each newly published version, in the same processes, and no request fails."""
    processes = {answer["pid"] for app in serving.answers("second").values() for answer in app}
    ended = threading.Event()

    def ask(app: str) -> list[dict[str, Any]]:
        answers = []
        while not ended.is_set():
            answers.append(serving.ask(app))
        return answers

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask, app) for app in ("acting", "plain")]
        try:
            for number in (4, 5, 6, 7):  # more versions than are kept
                for app in ("acting", "plain"):
                    serving.run(publish, app, number)
                assert wait_until(lambda number=number: live(serving.answers("second")) == {number}, 30, pause=0.1)
        finally:
            ended.set()
        answers = [answer for one in asking for answer in one.result()]
    assert {answer["pid"] for answer in answers} == processes
    assert live({"": answers}) == {1, 3, 4, 5, 6, 7}
    fixed = {answer["answers"][name] for answer in answers for name in ("handle", "instance", "found")}
    assert fixed == {1, 3}


def live(answers: dict[str, list[dict[str, Any]]]) -> set[int]:
    """The answers of the `Live` handles."""
    return {answer["answers"][name] for app in answers.values() for answer in app for name in ("live", "live_handle")}


def test_the_page_runs(serving: Cluster, tmp_path: Path) -> None:
    """The module in the docs builds an app, and the config in the docs names that module."""
    files = r"^```(?:python|yaml)\n(# (?:search_app.py|config.yaml).*?)^```"
    module, config = re.findall(files, PAGE.read_text(), re.DOTALL | re.MULTILINE)
    path = tmp_path / "search_app.py"
    path.write_text(module)
    answers, listed = serving.run(run_page, str(path), config)
    assert answers == 3
    assert "search " in listed
