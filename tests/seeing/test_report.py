"""Does a memory report show this cluster, with all its nodes, by publication?"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import IMPORT_PATH, ORDINARY, run_python, wait_until
from torch import nn

import zerocopy
from zerocopy._compat.ray import own_raylet
from zerocopy._seeing.ledger import MOST_LINES
from zerocopy.errors import MissingPackageError

WIDTH = 1024
NBYTES = WIDTH * WIDTH * 4


def weights() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


@ray.remote(num_cpus=0.1)
class Reader:
    def load(self, publication: zerocopy.Publication) -> int:
        self.model = publication.load()
        return os.getpid()

    def write(self) -> None:
        with torch.no_grad():
            self.model.weight.add_(1)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def drop(self) -> None:
        del self.model


def of_kind(report: zerocopy.MemoryReport, kind: str) -> list[zerocopy.PublicationMemory]:
    return [one for one in report.publications if one.kind == kind]


def test_a_publication_of_this_process_is_told(cluster: None) -> None:
    """A publication is in the report from its publishing until it is closed, and counts one copy before it is loaded."""

    class Mine(nn.Linear):
        pass

    publication = zerocopy.publish(Mine(WIDTH, WIDTH, bias=False))
    (told,) = of_kind(zerocopy.memory_report(), "Mine")
    assert (told.name, told.version, told.loads, told.processes) == ("", None, 0, 0)
    assert (told.shared, told.private, told.plain, told.saved) == (NBYTES, 0, 0, -NBYTES)
    publication.close()
    del publication
    assert wait_until(lambda: not of_kind(zerocopy.memory_report(), "Mine"), 20)


@pytest.mark.long
def test_loads_and_writes_of_busy_processes_are_told(cluster: None, name: str) -> None:
    """Each loading process saves one plain copy, written bytes count as private, and busy processes are measured too."""
    publication = zerocopy.publish(weights(), name=name)
    readers = [Reader.remote() for _ in range(3)]
    pids = ray.get([reader.load.remote(publication) for reader in readers])
    ray.get(readers[0].write.remote())
    readers[1].sleep.remote(30)
    report = zerocopy.memory_report()
    (told,) = [one for one in report.publications if one.name == name]
    assert (told.version, told.kind, told.processes, told.loads) == (1, "Linear", 3, 3)
    assert told.shared == NBYTES
    assert NBYTES <= told.dirtied < NBYTES + 3 * 65536
    assert told.dirtied <= told.private < told.dirtied + 3 * 65536
    assert 3 * NBYTES <= told.plain < 3 * (NBYTES + 65536)
    assert told.saved == told.plain - told.shared - told.private
    by_pid = {process.pid: process for process in report.processes}
    assert [by_pid[pid].dirtied >= NBYTES for pid in pids] == [True, False, False]
    assert report.dirtied >= NBYTES
    ray.get(readers[0].drop.remote())
    ray.kill(readers[1])

    def is_used_by_one() -> bool:
        (told,) = [one for one in zerocopy.memory_report().publications if one.name == name]
        return told.loads == 1 and told.dirtied == 0

    assert wait_until(is_used_by_one, 20)


@pytest.mark.long
def test_shared_is_never_below_one_copy(cluster: None) -> None:
    """Shared memory is at least one copy, also in a report on one process whose proportional share is smaller."""
    publication = zerocopy.publish(weights())
    readers = [Reader.remote() for _ in range(2)]
    pid, _ = ray.get([reader.load.remote(publication) for reader in readers])
    report = zerocopy.memory_report([pid])
    assert sum(process.share for process in report.processes) < NBYTES
    assert report.shared >= NBYTES
    (told,) = report.publications
    assert (told.shared, told.loads) == (NBYTES, 1)


def test_versions_of_a_name_share_what_is_equal(cluster: None, name: str) -> None:
    """Each version shows all bytes that it needs; the node's total counts each object in the store once."""
    model = nn.Sequential(*[weights() for _ in range(4)])
    before = sum(node.objects for node in zerocopy.memory_report().nodes)
    kept = [zerocopy.publish(model, name=name)]
    with torch.no_grad():
        model[3].weight.add_(1)
    kept.append(zerocopy.publish(model, name=name))
    report = zerocopy.memory_report()
    assert [one.shared for one in report.publications if one.name == name] == [4 * NBYTES, 4 * NBYTES]
    assert sum(node.objects for node in report.nodes) - before < 5.1 * NBYTES


def test_named_versions_outlive_the_knowledge_of_their_publisher(address: str, name: str) -> None:
    """A named version is in the report after its publisher has ended, also if no process has loaded it."""
    done = run_python(
        "import sys, ray, torch, zerocopy\n"
        "ray.init(sys.argv[1], log_to_driver=False)\n"
        "zerocopy.publish(torch.nn.Linear(256, 256, bias=False), name=sys.argv[2])\n",
        "-",
        address,
        name,
    )
    assert done.returncode == 0, done.stderr
    (told,) = [one for one in zerocopy.memory_report().publications if one.name == name]
    assert (told.shared, told.loads) == (256 * 256 * 4, 0)


def test_many_loads_are_told_exactly(cluster: None) -> None:
    """The number of loads is exact after many loads, because notes of freed memory are removed from time to time."""

    class Often(nn.Linear):
        pass

    publication = zerocopy.publish(Often(64, 64))
    kept = [publication.load(), *[publication.load() for _ in range(MOST_LINES + 10)][-2:]]
    (told,) = of_kind(zerocopy.memory_report([os.getpid()]), "Often")
    assert (told.loads, told.processes) == (len(kept), 1)
    assert told.plain - told.shared < 65536, "a plain process needs one copy, however often it is loaded here"


def test_adopted_weights_are_a_load(cluster: None) -> None:
    """An adopting publisher counts as a load, because it uses the copy in the store."""

    class Adopted(nn.Linear):
        pass

    model = Adopted(WIDTH, WIDTH, bias=False)
    publication = zerocopy.publish(model, adopt=True)
    (told,) = of_kind(zerocopy.memory_report(), "Adopted")
    assert (told.loads, told.shared, publication.shared_bytes) == (1, NBYTES, NBYTES)


def test_a_report_as_data(cluster: None) -> None:
    """A report can be a dict that is valid JSON, and has all columns as text and HTML."""
    publication = zerocopy.publish(weights())
    loaded = publication.load()
    report = zerocopy.memory_report()
    told = json.loads(json.dumps(report.to_dict()))
    assert told["together"]["shared"] == report.shared
    assert told["together"]["saved"] == report.saved
    assert [one["pid"] for one in told["processes"]] == [process.pid for process in report.processes]
    assert [one["loads"] for one in told["publications"]] == [one.loads for one in report.publications]
    assert {"name", "version", "kind", "node", "shared", "private", "dirtied", "plain", "saved"} <= {
        *told["publications"][0]
    }
    assert repr(report) == str(report)
    for word in ("publication", "version", "shared", "private", "dirtied", "plain copies", "saved"):
        assert word in str(report)
        assert f">{word}</th>" in report._repr_html_()
    assert report._repr_html_().count("<tr class=") == len(report.publications) + 2
    del loaded


def test_a_report_as_a_plot(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot shows bars of shared and private bytes and of plain copies, and can be saved to a file."""
    publication = zerocopy.publish(weights())
    loaded = [publication.load() for _ in range(3)]
    report = zerocopy.memory_report([os.getpid()])
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    widths = [round(bar.get_width()) for bar in figure.axes[0].patches]
    wanted = [figures for one in report.publications for figures in (one.shared, one.private, one.plain)]
    assert widths == wanted
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"zerocopy-ray\[plot\]") as error:
        report.plot()
    assert isinstance(error.value, ImportError)
    del loaded


def test_without_ray() -> None:
    """Without Ray a report measures only this process, and a note says so."""
    done = run_python(
        "import os, ray, zerocopy\n"
        "report = zerocopy.memory_report()\n"
        "assert not ray.is_initialized()\n"
        "assert [process.pid for process in report.processes] == [os.getpid()]\n"
        "print(report)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "not connected to Ray" in done.stdout


NODES = """
import json, os, signal, sys, time, warnings
import psutil, ray, torch, zerocopy
from ray.cluster_utils import Cluster
from test_report import NBYTES, Reader, weights

small = {"num_cpus": 2, "object_store_memory": 120_000_000}
cluster = Cluster(head_node_args=small, initialize_head=True)
other = cluster.add_node(**small, resources={"other": 1})
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
here = ray.get_runtime_context().get_node_id()
publication = zerocopy.publish(weights(), name="both")
readers = [Reader.options(resources={"other": 0.1} if n else {}, num_cpus=0.1).remote() for n in (0, 0, 1, 1)]
pids = ray.get([reader.load.remote(publication) for reader in readers])
ray.get(readers[3].write.remote())
started = time.monotonic()
report = zerocopy.memory_report(timeout=60)
seconds = time.monotonic() - started
raylet = next(p.pid for p in report.processes if p.name == "raylet" and p.node == other.node_id)
os.kill(raylet, signal.SIGSTOP)
try:
    started = time.monotonic()
    stopped = zerocopy.memory_report(timeout=2)
    waited = time.monotonic() - started
finally:
    os.kill(raylet, signal.SIGCONT)
print(json.dumps({
    "report": report.to_dict(), "pids": pids, "nodes": [here, other.node_id], "own": os.getpid(), "seconds": seconds,
    "notes": list(stopped.notes), "waited": waited, "left": sorted({p.node for p in stopped.processes}),
}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
def test_all_nodes_of_this_cluster_and_no_other(cluster: None) -> None:
    """With several nodes and clusters on one host, each process is listed once on its node; a stopped node is left out."""
    other_cluster = own_raylet()
    assert other_cluster is not None
    done = run_python(NODES, **ORDINARY, PYTHONPATH=IMPORT_PATH)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    head, other = told["nodes"]
    node_of = {one["pid"]: one["node"] for one in told["report"]["processes"]}
    assert len(node_of) == len(told["report"]["processes"])
    assert other_cluster.pid not in node_of
    assert [node_of[pid] for pid in (told["own"], *told["pids"])] == [head, head, head, other, other]
    assert [one["name"] for one in told["report"]["processes"]].count("raylet") == 2
    publications = {one["node"]: one for one in told["report"]["publications"] if one["name"] == "both"}
    assert {node: one["loads"] for node, one in publications.items()} == {head: 2, other: 2}
    assert {node: one["shared"] for node, one in publications.items()} == {head: NBYTES, other: NBYTES}
    assert publications[head]["dirtied"] == 0
    assert publications[other]["dirtied"] >= NBYTES
    assert told["report"]["together"]["shared"] >= 2 * NBYTES
    assert any(f"Node {other[:8]} is left out: it did not answer within 2 s." in note for note in told["notes"])
    assert (told["left"], told["waited"] < 10) == ([head], True)
