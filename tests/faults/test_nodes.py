"""What can readers still use when a node ends or stops? Loaded pipelines, and weights with another copy or a source.

All other loads report that the weights are lost. Each cluster runs in a separate program, because this process is connected to
another one. Ray is set to count a node as dead after about two seconds. With its default settings this and all that waits for
it takes longer: see docs/reliability.md.
"""

from __future__ import annotations

import pytest
from conftest import ORDINARY, run_python
from reliability import read

pytestmark = pytest.mark.long

START = """
import contextlib, os, signal, sys, threading, time, warnings
import ray, zerocopy
from ray.cluster_utils import Cluster
from conftest import wait_until
from reliability import fault
from versions import numbered
from zerocopy.errors import PublicationLostError

HEALTH = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 500, "failure_threshold": 4}

def start():
    small = {"num_cpus": 2, "object_store_memory": 90_000_000}
    settings = {f"health_check_{key}": value for key, value in HEALTH.items()}
    cluster = Cluster(True, head_node_args={**small, "include_dashboard": False, "_system_config": settings})
    other = cluster.add_node(**small, resources={"other": 1})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    return cluster, other

def build():
    return numbered(7, width=400)

@ray.remote(num_cpus=0.1, resources={"other": 0.1})
class Publisher:
    def publish(self, number, **options):
        publication = zerocopy.publish(numbered(number, width=400), **options)
        self.kept = [*getattr(self, "kept", []), publication]
        return publication

    def publish_and_follow(self):
        self.kept = zerocopy.publish(build(), name="source", source=build)
        return self.kept.current()()

def lost(load):
    '''The reason why `load` fails, in the end; before, it may be right.'''
    while True:
        try:
            load()()
        except PublicationLostError as error:
            return f"`PublicationLostError` ({error.reason})"

def right(load, number):
    assert load()() == number
    return "the right answer"

def at_once(kind, what, cause, cases):
    '''Make a fault by `cause`, and see meanwhile what each case gets, by its title.'''
    sign, failed = threading.Event(), []

    def run(title, case):
        try:
            with fault(kind, f"{what}; {title}") as told:
                sign.wait()
                told.result = case()
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=run, args=one) for one in cases.items()]
    for thread in threads:
        thread.start()
    cause()
    sign.set()
    for thread in threads:
        thread.join()
    assert not failed

warnings.simplefilter("ignore")
cluster, other = start()
publisher = Publisher.remote()
publish = lambda number, **options: ray.get(publisher.publish.remote(number, **options))
unnamed, loaded_here = publish(1), publish(2)
copied, alone = publish(3, name="copied"), publish(4, name="alone")
source = publish(7, name="source", source=build)
kept, _ = loaded_here.load(), copied.load()
"""

GONE = """
at_once("Nodes", "A node is killed", lambda: cluster.remove_node(other, allow_graceful=False), {
    "a pipeline that was loaded from there": lambda: right(lambda: kept, 2),
    "`load()` of a publication of a process there": lambda: lost(unnamed.load),
    "`load()` by name, and this node has a copy": lambda: right(copied.load, 3),
    "`load()` by name, and no other node has a copy": lambda: lost(alone.load),
    "`load()` by name, and it has a source": lambda: right(lambda: zerocopy.lookup("source").load(), 7),
})
assert right(lambda: kept, 2)
ray.shutdown()
cluster.shutdown()
"""

STOPPED = """
raylet = next(info.process for kind, infos in other.all_processes.items() if kind == "raylet" for info in infos)
try:
    at_once("Nodes", "A raylet is stopped (SIGSTOP)", lambda: os.kill(raylet.pid, signal.SIGSTOP), {
        "a pipeline that was loaded from there": lambda: right(lambda: kept, 2),
        "`load()` of a publication of a process there, and this node has a copy": lambda: right(loaded_here.load, 2),
        "`load()` of a publication of a process there": lambda: lost(unnamed.load),
        "`load()` by name, and this node has a copy": lambda: right(copied.load, 3),
        "`load()` by name, and no other node has a copy": lambda: lost(alone.load),
        "`load()` by name, and it has a source": lambda: right(lambda: zerocopy.lookup("source").load(), 7),
    })
finally:
    os.kill(raylet.pid, signal.SIGCONT)
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_is_killed() -> None:
    """If all processes of a node are killed at once, loaded pipelines and weights with a copy or a source stay usable."""
    done = run_python(START + GONE, "-", **ORDINARY)
    found = read(done.stdout)
    assert len(found) == 5, done.stderr[-9000:]


def test_the_first_load_after_a_loss_runs_the_source() -> None:
    """If nothing else was lost or asked for before, the first load creates the weights from their source."""
    alone = (
        START[: START.index("unnamed, loaded_here")]
        + """
assert ray.get(publisher.publish_and_follow.remote()) == 7
time.sleep(2)  # the publisher has told the registry that it holds the weights
cluster.remove_node(other, allow_graceful=False)
print("answer:", zerocopy.lookup("source").load()())
"""
    )
    done = run_python(alone, **ORDINARY)
    assert "answer: 7" in done.stdout, done.stderr[-3000:]


def test_a_raylet_that_is_stopped() -> None:
    """If a raylet is stopped, nothing can be fetched from its node, but weights with a copy or a source can still be loaded."""
    done = run_python(START + STOPPED, "-", **ORDINARY)
    found = read(done.stdout)
    assert len(found) == 6, done.stderr[-9000:]
