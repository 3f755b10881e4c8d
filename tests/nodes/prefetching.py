"""Does prefetching work on four nodes? This file runs as a program: see `clusters`."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from clusters import MB, Nodes, run
from conftest import wait_until
from torch import nn

import zerocopy
from zerocopy import shared
from zerocopy.errors import ArgumentError, PrefetchError, StoreTooSmallError

WEIGHTS = 40 * MB


@zerocopy.pipeline
class Two:
    small: nn.Module = shared()
    large: nn.Module = shared()

    def __call__(self) -> float:
        return float(self.small.weight[0, 0] + self.large.weight[0, 0])


def two(number: float) -> Two:
    """A pipeline of 40 MB, 4 MB of them in `small`."""
    pipeline = Two(small=nn.Linear(1024, 1024, bias=False), large=nn.Linear(9 * 1024, 1024, bias=False))
    with torch.no_grad():
        for parameter in (*pipeline.small.parameters(), *pipeline.large.parameters()):
            parameter.fill_(number)
    return pipeline


def on(nodes: Nodes, name: str) -> Any:
    """The decorator for tasks that run on this node."""
    return ray.remote(num_cpus=0, resources={name: 1})


def bytes_on(publication: Any, nodes: Nodes, name: str) -> int:
    copies: int = publication.nodes()[nodes.id_of(name)].nbytes
    return copies


def crowd(nbytes: int = 140 * MB) -> None:
    """Fill the store of a task's node, so that Ray evicts unused objects."""
    kept = [ray.put(np.ones(20 * MB, np.uint8)) for _ in range(nbytes // (20 * MB))]
    time.sleep(0.5)
    del kept


def check_the_second_mapper(nodes: Nodes) -> None:
    """After a prefetch, weights no longer count as a reader's private memory, because the holder maps the same pages.

    Ray's memory monitor charges a worker for pages that only it maps. The check needs a node that has received no object yet: a
    raylet that has received objects maps their pages as well.
    """

    @ray.remote(num_cpus=0, resources={"fourth": 1})
    class Publisher:
        def __init__(self) -> None:
            zerocopy.publish(two(8), name="charged")

        def store(self) -> None:
            """Does nothing. Its result shows that `__init__` has published."""

    @ray.remote(num_cpus=0, resources={"fourth": 1})
    class Reader:
        def __init__(self) -> None:
            self.pipeline = zerocopy.lookup("charged").load()
            self.total = sum(float(parameter.sum()) for parameter in self.pipeline.large.parameters())

        def charged(self) -> int:
            found: int = psutil.Process().memory_full_info().uss
            return found

    publisher = Publisher.remote()
    ray.get(publisher.store.remote())
    reader = Reader.remote()
    together = ray.get(reader.charged.remote())
    for process in psutil.process_iter(["name", "ppid"]):  # end idle processes of store tasks, which map the pages too
        if process.info["ppid"] == nodes.raylet("fourth") and "IDLE" in process.info["name"]:
            process.kill()
    ray.kill(publisher)
    assert wait_until(lambda: ray.get(reader.charged.remote()) >= together + 0.8 * WEIGHTS, 10)
    zerocopy.lookup("charged").prefetch([nodes.id_of("fourth")])
    assert wait_until(lambda: ray.get(reader.charged.remote()) <= together + 0.2 * WEIGHTS, 10)
    zerocopy.remove("charged")


def check_a_node_has_them_before_anybody_loads(nodes: Nodes) -> None:
    """`nodes()` reports the bytes on each node; a full store keeps prefetched weights and evicts merely loaded ones."""
    publication = zerocopy.publish(two(1))
    assert publication.nodes().complete == [nodes.id_of("first")]
    fetched = publication.prefetch([nodes.id_of("second")])
    assert (fetched.complete, len(fetched)) == ([nodes.id_of("second")], 1)
    assert ray.get(on(nodes, "third")(lambda given: given.load()()).remote(publication)) == 2
    assert set(publication.nodes().complete) == {nodes.id_of(name) for name in ("first", "second", "third")}
    assert str(publication.nodes()).count("100%") == 3
    ray.get([on(nodes, name)(crowd).remote() for name in ("second", "third")])
    assert wait_until(lambda: bytes_on(publication, nodes, "third") < WEIGHTS / 2, 10)
    assert bytes_on(publication, nodes, "second") >= WEIGHTS


def holders() -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            found += [process.pid] if process.name().startswith("ray::Holder") and is_of_this_cluster(process) else []
        except psutil.Error:
            continue
    return found


def is_of_this_cluster(process: psutil.Process) -> bool:
    return process.ppid() in RAYLETS


RAYLETS: set[int] = set()


def check_they_go_when_released_closed_or_dropped(nodes: Nodes) -> None:
    """The holders of prefetched weights end when the publication is released, closed or dropped."""
    ways: list[Callable[[Any], object]] = [
        lambda publication: publication.release(),
        lambda publication: publication.close(),
        lambda publication: None,
    ]
    for way in ways:
        publication, earlier = zerocopy.publish(two(2)), set(holders())
        publication.prefetch(nodes.id_of(name) for name in ("second", "third"))
        new = set(holders()) - earlier
        assert len(new) == 2
        way(publication)
        del publication
        gc.collect()
        assert wait_until(lambda new=new: new.isdisjoint(holders()), 20)


def check_a_holder_that_was_killed(nodes: Nodes) -> None:
    """The next prefetch starts another holder, with and without a name."""
    zerocopy.publish(two(11), name="killed")
    for publication in (zerocopy.publish(two(12)), zerocopy.lookup("killed")):
        earlier = set(holders())
        second = nodes.id_of("second")
        publication.prefetch([second])
        for pid in set(holders()) - earlier or {max(holders())}:
            os.kill(pid, signal.SIGKILL)
        assert publication.prefetch([second]).complete == [second]
        publication.release()
    zerocopy.remove("killed")


def check_under_a_name_until_it_is_superseded(nodes: Nodes) -> None:
    """Prefetched named weights stay after the prefetching process ends, until their alias points at another version."""
    zerocopy.publish(two(3), name="search")
    ids = [nodes.id_of(name) for name in ("second", "third")]
    ray.get(ray.remote(max_calls=1)(lambda: zerocopy.lookup("search").prefetch(ids).complete).remote())
    first = zerocopy.lookup("search", version=1)
    ray.get(on(nodes, "second")(crowd).remote())
    assert bytes_on(first, nodes, "second") >= WEIGHTS
    zerocopy.publish(two(4), name="search")
    ray.get(on(nodes, "second")(crowd).remote())
    assert wait_until(lambda: bytes_on(first, nodes, "second") < WEIGHTS / 2, 10)
    first.prefetch(ids)  # a handle of one version: its weights stay until they are released
    zerocopy.publish(two(5), name="search")
    ray.get(on(nodes, "second")(crowd).remote())
    assert bytes_on(first, nodes, "second") >= WEIGHTS
    first.release()
    ray.get(on(nodes, "second")(crowd).remote())
    assert wait_until(lambda: bytes_on(first, nodes, "second") < WEIGHTS / 2, 10)
    zerocopy.remove("search")


def check_parts_and_numbers_of_nodes(nodes: Nodes) -> None:
    """`fields` prefetches only these fields; a number of nodes selects the nodes that already have most of the weights."""
    publication = zerocopy.publish(two(6))
    third = nodes.id_of("third")
    part = publication.prefetch([third], fields=["small"])
    assert 4 * MB <= part[third].nbytes < 30 * MB
    assert publication.prefetch(1).complete == [nodes.id_of("first")]
    assert set(publication.prefetch("all").complete) == {nodes.id_of(name) for name in nodes.raylets}


def check_what_makes_no_sense(nodes: Nodes) -> None:
    """Wrong arguments are refused before anything is fetched."""
    publication = zerocopy.publish(two(7))
    for wanted in (0, True, 5, [], "second", ["0" * 56], [1]):
        with pytest.raises(ArgumentError):
            publication.prefetch(wanted)
    with pytest.raises(ArgumentError, match="no attribute"):
        publication.prefetch(1, fields=["other"])
    large = zerocopy.publish(nn.Linear(5000, 5000))  # 100 MB; the third store has less

    with pytest.raises(StoreTooSmallError, match="of node"):
        large.prefetch("all")
    assert large.nodes().complete == [nodes.id_of("first")]


def check_progress_is_shown(nodes: Nodes) -> None:
    """Progress is shown on a terminal, unless `progress=False`."""
    publication = zerocopy.publish(two(9))
    for options, is_shown in (({}, True), ({"progress": False}, False)):
        with pytest.MonkeyPatch.context() as patch:
            written: list[str] = []
            patch.setenv("FORCE_COLOR", "1")
            patch.setattr("sys.stderr.write", written.append)
            publication.prefetch([nodes.id_of("second")], **options)
        assert ("Prefetching Two" in "".join(written)) is is_shown


def check_a_node_that_does_not_answer(nodes: Nodes) -> None:
    """The other nodes get the weights, and the error names the node that does not answer."""
    # This is the last check, because Ray soon counts the node as dead.
    publication = zerocopy.publish(two(10))
    second, third = nodes.id_of("second"), nodes.id_of("third")
    os.kill(nodes.raylet("third"), signal.SIGSTOP)
    try:
        with pytest.raises(PrefetchError, match=f"1 of 2 nodes could not fetch Two: node {third}") as failed:
            publication.prefetch([second, third], timeout=15)
        assert failed.value.copies.complete == [second]
        assert list(failed.value.failed) == [third]
    finally:
        os.kill(nodes.raylet("third"), signal.SIGCONT)


if __name__ == "__main__":
    started = Nodes({"first": 160 * MB, "second": 160 * MB, "third": 90 * MB, "fourth": 90 * MB})
    RAYLETS.update(map(started.raylet, started.raylets))
    run(started, globals())
