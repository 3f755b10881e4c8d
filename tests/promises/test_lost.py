"""Do arguments of actors and tasks keep their weights through restarts and retries, and do errors explain lost weights?"""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import ray
from conftest import CPUS, ORDINARY, run_python, wait_until

import zerocopy
from zerocopy._run.reuse import Limits
from zerocopy.errors import PublicationLostError

pytestmark = pytest.mark.usefixtures("cluster")


@zerocopy.actor(num_cpus=0.1, max_restarts=1)
class Holder:
    """Takes weights in every kind of argument."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given = [*given, *named.values()]

    def answers(self) -> list[float]:
        return [_answer(value) for value in self.given]

    def pid(self) -> int:
        return os.getpid()


def _answer(value: Any) -> float:
    """The answer of a pipeline that is given directly, in a container or as a handle; the sum of an array."""
    if isinstance(value, (dict, list)):
        (value,) = value.values() if isinstance(value, dict) else value
    if isinstance(value, np.ndarray):
        return float(value.sum())
    return float((value if isinstance(value, pipelines.Search) else value.load())(1.0))


def restarted(actor: Any) -> None:
    """Kill the process of an actor and wait until Ray has restarted it."""
    first = ray.get(actor.pid.remote())
    os.kill(first, 9)

    def is_new() -> bool:
        try:
            return bool(ray.get(actor.pid.remote()) != first)
        except ray.exceptions.ActorUnavailableError:
            return False

    assert wait_until(is_new)


@pytest.mark.long
def test_a_restarted_actor_has_its_weights_whatever_became_of_its_arguments(store_use: Callable[[], int]) -> None:
    """An actor keeps its weights through a restart while its handle lives, also if its arguments were closed or changed."""
    search, passed, wrapped = (pipelines.search(width=64, top_k=number) for number in (1, 2, 3))
    expected = [search(1.0), search(1.0), search(1.0), passed(1.0), wrapped(1.0), search(1.0), 30_000.0]
    wrapper = zerocopy.ModelWrapper.from_model(wrapped)
    # Larger than an argument inside the call: Ray would store it, and drop it when the actor has started.
    wide = pipelines.search(width=64, settings={"copied": os.urandom(300_000)}, encoder=search.encoder, top_k=1)
    large, of_passed = zerocopy.publish(wide), zerocopy.publish(passed)
    with zerocopy.publish(search) as publication:
        given = [publication, {"nested": publication}, [zerocopy.publish(search)], [passed], wrapper, large]
        holder = Holder.remote(*given, array=np.ones(30_000))
        pool = Holder.options(num_cpus=0.2).pool(1, publication, array=[publication])
    large.close()
    of_passed.close()
    wrapper.close()
    given.clear()
    passed.encoder[0].weight.data = passed.encoder[0].weight.data * 2
    del search, passed, wrapped, wide, publication, large, of_passed, wrapper
    gc.collect()
    for actor in (holder, pool[0]):
        restarted(actor)
    assert ray.get(holder.answers.remote()) == pytest.approx(expected)
    assert ray.get(pool[0].answers.remote()) == expected[:2]
    del actor, holder, pool
    assert wait_until(lambda: store_use() <= 0)


@zerocopy.task(max_retries=2, num_cpus=1)
def answer_at_the_second_try(*given: Any, marks: str) -> list[float]:
    """Ends its process at the first attempt; at the second attempt waits until the file `go` exists."""
    tries, sign = Path(marks) / "tries", Path(marks) / "go"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if len(tries.read_text()) == 1:
        os._exit(1)
    while not sign.exists():
        time.sleep(0.01)
    return [_answer(value) for value in given]


@pytest.mark.long
def test_a_retried_task_has_its_weights(store_use: Callable[[], int], tmp_path: Path) -> None:
    """A task keeps its weights until its result exists, also if they are closed while it waits, runs or is retried."""
    search = pipelines.search(width=64)
    wide = pipelines.search(width=64, settings={"copied": os.urandom(300_000)})
    expected = [search(1.0), search(1.0), search(1.0), wide(1.0)]
    wrapper = zerocopy.ModelWrapper.from_model(search)
    with zerocopy.publish(search) as publication, zerocopy.publish(wide) as large:
        result = answer_at_the_second_try.remote(publication, [publication], wrapper, large, marks=str(tmp_path))
    wrapper.close()
    del search, wide, publication, large, wrapper
    gc.collect()
    assert wait_until(lambda: (tmp_path / "tries").exists() and len((tmp_path / "tries").read_text()) == 2)
    (tmp_path / "go").touch()
    assert ray.get(result) == pytest.approx(expected)
    del result
    assert wait_until(lambda: store_use() <= 0)


@zerocopy.task
def answer_each(pipeline: pipelines.Search, nested: list[Any], number: float) -> float:
    return pipeline(number) + nested[0].load()(number)


@pytest.mark.long
def test_a_map_has_its_weights_to_its_end(store_use: Callable[[], int]) -> None:
    """`map` keeps its weights to its end, also if its arguments are closed, dropped or emptied meanwhile."""
    search = pipelines.search(width=64)
    expected = [2 * search(float(number)) for number in range(6)]
    given, nested = [zerocopy.publish(search)], [zerocopy.publish(search)]

    def numbers() -> Iterator[float]:
        for number in range(6):
            if number == 2:
                given.pop().close()
                nested.pop().close()
            yield float(number)

    results = answer_each.map(given[0], nested, numbers(), max_in_flight=1)
    del search
    assert list(results) == pytest.approx(expected)
    del results
    assert wait_until(lambda: store_use() <= 0)


@ray.remote(num_cpus=CPUS)
def take_all_cpus(sign: str) -> None:
    while not Path(sign).exists():
        time.sleep(0.01)


def test_a_call_that_waits_has_its_weights(tmp_path: Path) -> None:
    """A publication may be closed while a direct call waits for a worker, also if that worker has dropped the weights."""
    search = pipelines.search(width=64)
    publication = zerocopy.publish(search)
    assert pipelines.answer(publication, 1.0) == search(1.0)  # later calls only name the weights that workers have
    blocker = take_all_cpus.remote(str(tmp_path / "go"))
    answers: list[float] = []
    thread = threading.Thread(target=lambda: answers.append(pipelines.answer(publication, 1.0)))
    thread.start()
    time.sleep(1)
    publication.close()
    time.sleep(Limits().idle_seconds)
    (tmp_path / "go").touch()
    thread.join()
    assert answers == [search(1.0)]
    ray.get(blocker)


LOSSES = """
import gc, os, pickle, sys, time, warnings
import ray
import pipelines, zerocopy
from conftest import bytes_in_store, wait_until
from ray.cluster_utils import Cluster
from zerocopy._store import object_store

def start():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")

def lost(call):
    try:
        call()
    except zerocopy.errors.PublicationLostError as error:
        print(error.reason, "|", str(error).splitlines()[-1], flush=True)

small = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(head_node_args={**small, "_system_config": {"fetch_fail_timeout_milliseconds": 2000}}, initialize_head=True)
other = cluster.add_node(**small, resources={"other": 1})
start()

@ray.remote(num_cpus=0.1)
class Process:
    def publish(self):
        self.publication = zerocopy.publish(pipelines.search(width=256))
        return self.publication, os.getpid()

    def load(self, pickled):
        return pickle.loads(pickled).load().top_k

here, there = Process.remote(), Process.options(resources={"other": 1}).remote()
(of_process, pid), (of_node, _) = ray.get([here.publish.remote(), there.publish.remote()])

def pickled_and_closed():
    before = bytes_in_store()
    with zerocopy.publish(pipelines.search(width=256)) as publication:
        pickled = pickle.dumps(publication)
    del publication
    assert wait_until(lambda: bytes_in_store() <= before)
    return pickled

lost(lambda: ray.get(here.load.remote(pickled_and_closed())))
lost(lambda: pickle.loads(pickled_and_closed()).load())
os.kill(pid, 9)
assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
time.sleep(4)  # until Ray has seen it: Ray 2.60 needs less than 1 s, 2.53 more
lost(of_process.load)
cluster.remove_node(other, allow_graceful=False)
assert wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
lost(of_node.load)
publication = zerocopy.publish(pipelines.search(width=256))
reference = publication.reference
open(sys.argv[1], "wb").write(pickle.dumps(publication))
ray.shutdown()
start()
lost(publication.load)
lost(lambda: object_store.get(reference))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
def test_what_is_lost_says_why(tmp_path: Path) -> None:
    """For each cause of lost weights the error has a message, a `reason` and a matching hint, also in a task."""
    pickled = tmp_path / "publication.pickle"
    done = run_python(LOSSES, "-", str(pickled), **ORDINARY)
    with pytest.raises(PublicationLostError, match="belongs to another cluster") as of_another:
        pickle.loads(pickled.read_bytes()).load()
    gone = "The weights of this publication are gone"
    told = [tuple(line.split(" | ", 1)) for line in done.stdout.splitlines() if " | " in line]
    told.append((of_another.value.reason, str(of_another.value)))
    expected = [
        ("references dropped", f"{gone}: all references that Ray had counted were closed or dropped. Hint: keep the"),
        ("not found in time", f"{gone}: Ray found no copy of them within its time limit. Hint: see whether the"),
        ("owner ended", f"{gone}: the process that published them ended. Hint: publish from a process that lives"),
        ("node lost", f"{gone}: the node of the process that published them, or the last one that held them, is"),
        ("connection ended", "This publication of Search belongs to a connection to Ray that has ended. Hint: publish"),
        ("connection ended", f"{gone}: they belong to an earlier connection of this process to Ray. Hint: publish the"),
        ("other cluster", "This publication of Search belongs to another cluster than this process. Hint: connect to"),
    ]
    assert [reason for reason, _ in told] == [reason for reason, _ in expected], done.stderr
    for (_, words), (_, start) in zip(told, expected, strict=True):
        assert start in words
