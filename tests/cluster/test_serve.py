"""Apps that Serve builds from a config, deployed as `serve deploy` does it, on a cluster of their own."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psutil
import pytest
import ray
from conftest import IMPORT_PATH, bytes_in_store
from versions import numbered

import zerocopy

WIDTH = 1024  # as in `served`
NBYTES = 4 * (5 * WIDTH * WIDTH)  # of one version, about
ADDRESS = "127.0.0.1"
R = TypeVar("R")


def free_port() -> int:
    with socket.socket() as found:
        found.bind((ADDRESS, 0))
        port: int = found.getsockname()[1]
        return port


# What the driver of that cluster does, in a process of its own: the process of the tests may have another cluster.


def start() -> str:
    os.environ.update(PYTHONPATH=IMPORT_PATH, OMP_NUM_THREADS="1", RAY_IGNORE_UNHANDLED_ERRORS="1")
    context = ray.init(
        "local",
        num_cpus=4,
        num_gpus=0,
        object_store_memory=400_000_000,
        include_dashboard=True,
        dashboard_port=free_port(),
        log_to_driver=False,
        logging_level="ERROR",
    )
    return f"http://{context.dashboard_url}"


@functools.cache
def client(address: str) -> Any:
    """What `serve deploy` uses."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    return ServeSubmissionClient(address)


def deploy(address: str, config: dict[str, Any]) -> None:
    client(address).deploy_applications(config)


def told_by_serve(address: str) -> dict[str, Any]:
    told: dict[str, Any] = client(address).get_serve_details()["applications"]
    return told


def publish(name: str, number: int) -> int:
    return zerocopy.publish(numbered(number, width=WIDTH), name=name).version.number


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> bool:
    """Whether `condition` comes true in time. It is asked seldom: each status takes Serve some work."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


class Cluster:
    """Serve on a cluster of its own, as one who deploys and asks sees it."""

    def __init__(self, driver: concurrent.futures.Executor) -> None:
        self.driver = driver
        self.address = self.run(start)
        self.port = free_port()
        self.apps: dict[str, dict[str, Any]] = {}

    def run(self, function: Callable[..., R], *args: Any) -> R:
        """What a function of the driver returns."""
        return self.driver.submit(function, *args).result()

    def deploy(self, build: str = "build", **apps: dict[str, str]) -> None:
        """Deploy these apps beside, or instead of, those that run."""
        for name, args in apps.items():
            self.apps[name] = {
                "name": name,
                "import_path": f"served:{build}",
                "route_prefix": f"/{name}",
                "args": {"name": name, **args},
            }
        options = {"host": ADDRESS, "port": self.port}
        self.run(deploy, self.address, {"http_options": options, "applications": list(self.apps.values())})

    def told(self, app: str) -> dict[str, Any]:
        """What Serve tells of an app."""
        return self.run(told_by_serve, self.address).get(app, {"status": "", "deployments": {}})

    def replicas(self, app: str) -> set[int]:
        """The processes of its replicas."""
        deployments = self.told(app)["deployments"].values()
        return {replica["pid"] for one in deployments for replica in one["replicas"] if replica["state"] == "RUNNING"}

    def ask(self, app: str) -> dict[str, Any]:
        """What an app answers over HTTP."""
        with urllib.request.urlopen(f"http://{ADDRESS}:{self.port}/{app}", timeout=30) as reply:  # noqa: S310 (our own)
            answer: dict[str, Any] = json.load(reply)
            return answer

    def answers(self, app: str, stamp: str, replicas: int = 1) -> dict[int, dict[str, Any]]:
        """What each of its replicas answers, by its process, when they are those of a deploy."""
        found: dict[int, dict[str, Any]] = {}

        def are_there() -> bool:
            if self.told(app)["status"] == "RUNNING":
                answer = self.ask(app)
                found.update({answer["pid"]: answer} if answer["stamp"] == stamp else {})
            return len(found) == replicas

        assert wait_until(are_there), json.dumps(self.told(app), indent=1)
        return found

    def stored(self) -> int:
        """Bytes in the store."""
        return self.run(bytes_in_store)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """With two apps: "acting" has two replicas of a `@zerocopy.actor`, "plain" one of a plain class."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as driver:
        cluster = Cluster(driver)
        cluster.deploy(acting={"number": "1", "stamp": "first"}, plain={"number": "1", "stamp": "first"})
        yield cluster
        cluster.run(ray.shutdown)


def all_are(answer: dict[str, Any], number: int) -> bool:
    return set(answer["answers"].values()) == {number}


def test_an_app_whose_builder_publishes_under_a_name(cluster: Cluster) -> None:
    """A handle, an instance and what was looked up arrive in every replica over one copy, though the builder's process ends."""
    t = time.time()
    acting, plain = cluster.answers("acting", "first", replicas=2), cluster.answers("plain", "first")
    print("first", time.time() - t)
    for answer in (*acting.values(), *plain.values()):
        assert all_are(answer, 1), answer
        assert set(answer["versions"].values()) == {1}
    assert len(next(iter(acting.values()))["answers"]) == 4
    print(cluster.stored(), NBYTES)
    assert wait_until(lambda: cluster.stored() < 1.1 * NBYTES)  # both apps have the same weights


def test_redeployed(cluster: Cluster) -> None:
    """With the same weights it is the same version, at no cost; with others it is the next, and the answers change."""
    before = cluster.stored()
    cluster.deploy(acting={"number": "1", "stamp": "second"}, plain={"number": "2", "stamp": "second"})
    acting, plain = cluster.answers("acting", "second", replicas=2), cluster.answers("plain", "second")
    for answer in acting.values():
        assert all_are(answer, 1), answer
        assert set(answer["versions"].values()) == {1}
    for answer in plain.values():
        assert all_are(answer, 2), answer
        assert set(answer["versions"].values()) == {2}
    print(before, cluster.stored())
    assert wait_until(lambda: cluster.stored() - before < 1.1 * NBYTES)


def test_all_replicas_killed_at_once(cluster: Cluster) -> None:
    """The apps come back, and answer as before."""
    killed = cluster.replicas("acting") | cluster.replicas("plain")
    assert len(killed) == 3
    for pid in killed:
        os.kill(pid, signal.SIGKILL)

    def are_new() -> bool:
        new = cluster.replicas("acting") | cluster.replicas("plain")
        return len(new) == 3 and not new & killed

    assert wait_until(are_new)
    acting, plain = cluster.answers("acting", "second", replicas=2), cluster.answers("plain", "second")
    assert all(all_are(answer, 1) for answer in acting.values()), acting
    assert all(all_are(answer, 2) for answer in plain.values()), plain
    assert not killed & {*acting, *plain}


def test_updated_while_it_is_asked(cluster: Cluster) -> None:
    """Whatever is `Live` answers with what a driver publishes, in the same processes. No request fails, none sees two versions."""
    ended = threading.Event()
    before = cluster.replicas("acting") | cluster.replicas("plain")

    def ask(app: str) -> list[dict[str, Any]]:
        answers = []
        while not ended.is_set():
            answers.append(cluster.ask(app))
        return answers

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, app) for app in ("acting", "acting", "plain", "plain")]
        try:
            for number in range(3, 8):
                assert cluster.run(publish, "acting", number) == number - 1
                assert cluster.run(publish, "plain", number) == number
                time.sleep(0.5)
            for app, count in (("acting", 2), ("plain", 1)):
                assert wait_until(lambda: count_of(cluster, app, 7) == count, 10)
        finally:
            ended.set()
        answers = [answer for one in asking for answer in one.result()]
    print(len(answers))
    assert before == {answer["pid"] for answer in answers}
    live = [answer["answers"]["live"] for answer in answers]
    assert {3, 4, 5, 6, 7} <= set(live)
    assert -1 not in live
    fixed = [answer["answers"][name] for answer in answers for name in ("handle", "instance", "found")]
    assert set(fixed) == {1, 2}


def count_of(cluster: Cluster, app: str, number: int) -> int:
    answers = [cluster.ask(app) for _ in range(8)]
    return len({answer["pid"] for answer in answers if answer["answers"]["live"] == number})


@pytest.mark.parametrize("given", ["instance", "handle"])
def test_what_has_no_name_is_refused(cluster: Cluster, given: str) -> None:
    """Its weights would end with the builder's process. The app's status says so, and names the way out."""
    cluster.deploy("build_unnamed", **{given: {"given": given}})
    assert wait_until(lambda: cluster.told(given)["status"] == "DEPLOY_FAILED"), cluster.told(given)
    print(cluster.told(given)["message"])
    assert "OutOfBandError" in cluster.told(given)["message"]
    assert "zerocopy.publish(pipeline, name=...)" in cluster.told(given)["message"]
