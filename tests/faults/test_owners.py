"""What happens when an owner ends, a publisher or a driver? Loaded pipelines stay usable, and a new load explains its error.

For the registry, and for publishers that end while they publish, see tests/cluster/test_losses.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import FOLDERS, ORDINARY, wait_until
from reliability import BOUND, fault
from versions import numbered

import zerocopy
from zerocopy.errors import PublicationLostError

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]
KIND = "Publishers, drivers and the registry"


@ray.remote(num_cpus=0.1)
class Publisher:
    def publish(self, number: int) -> zerocopy.Publication:
        self.kept = [*getattr(self, "kept", []), zerocopy.publish(numbered(number))]
        return self.kept[-1]

    def pid(self) -> int:
        return os.getpid()


def test_the_process_that_published() -> None:
    """A loaded pipeline stays right after its owner ended, and can be published again; weights without a reader are lost."""
    publisher = Publisher.remote()
    used, unused = ray.get([publisher.publish.remote(1), publisher.publish.remote(2)])
    loaded, pid = used.load(), ray.get(publisher.pid.remote())
    with fault(
        KIND, "The process that published without a name is killed, and no process has loaded the publication; `load()`"
    ) as told:
        os.kill(pid, signal.SIGKILL)
        told.result = f"`PublicationLostError` ({reason_of_loss(unused)})"
    assert "owner ended" in told.result
    with fault(KIND, "The same, but this process has loaded it") as told:
        assert loaded() == zerocopy.publish(loaded).load()() == 1
        told.result = "the loaded pipeline stays right, and can be published again"


def reason_of_loss(publication: zerocopy.Publication) -> str:
    """The reason of the loss. Until Ray notices that the owner ended, a load may still succeed."""
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        try:
            publication.load()
        except PublicationLostError as error:
            return error.reason
    return "never"


DRIVER = """
import sys, time
import ray, zerocopy
from versions import Asked, numbered
ray.init(sys.argv[1], namespace=sys.argv[2], log_to_driver=False)
unnamed, named = zerocopy.publish(numbered(1)), zerocopy.publish(numbered(2), name=sys.argv[2])
for name, publication in (("unnamed", unnamed), ("named", named)):
    actor = Asked.options(lifetime="detached", name=name).remote(publication)
    ray.get(actor.ask.remote())
open(sys.argv[3], "w").close()
time.sleep(600)
"""


@pytest.fixture
def driver(name: str, address: str, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver that has published, and has started detached actors that loaded its publications."""
    sign, path = tmp_path / "ready", os.pathsep.join(FOLDERS)
    command = [sys.executable, "-c", DRIVER, address, name, str(sign)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **ORDINARY}
    with subprocess.Popen(command, env=environment) as process:
        try:
            assert wait_until(lambda: sign.exists() or process.poll() is not None)
            assert process.poll() is None
            yield process
        finally:
            process.kill()


def test_the_driver(name: str, driver: subprocess.Popen[bytes]) -> None:
    """After the driver ends, detached actors keep their loaded weights, and other processes find named publications."""
    actors = [ray.get_actor(one, name) for one in ("unnamed", "named")]
    try:
        with fault(KIND, "The driver is killed; detached actors have loaded its publications") as told:
            driver.kill()
            driver.wait()
            assert ray.get([actor.ask.remote() for actor in actors]) == [1, 2]
            assert zerocopy.lookup(name).load()() == 2
            told.result = "the actors go on; other processes can load the publication that has a name"
    finally:
        for actor in actors:
            ray.kill(actor)
