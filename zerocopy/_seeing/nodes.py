"""How much memory do all nodes of this cluster use? Each node measures its own processes: other nodes do so in a short task."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zerocopy._compat.ray import drivers_on, own_raylet, workers_of
from zerocopy._seeing.accounts import Accounts, PublicationMemory
from zerocopy._seeing.ledger import LEDGER, Told
from zerocopy._seeing.processes import ProcessMemory, measure
from zerocopy._store.lost import nodes_up


@attrs.frozen
class NodeMemory:
    """The memory of the processes and publications of one node.

    Attributes:
        node: id of the node; empty without Ray.
        objects: bytes of the objects in its store that hold publications, each object counted once.
        processes: one entry per process.
        publications: one entry per publication.
        notes: figures that are missing, in words.
    """

    node: str
    objects: int
    processes: tuple[ProcessMemory, ...]
    publications: tuple[PublicationMemory, ...]
    notes: tuple[str, ...]

    @property
    def shared(self) -> int:
        """Bytes of the node's store that are in use, each page counted once. Never less than one copy of each publication.

        The sum of the processes' proportional shares would be less if a process outside the report has mapped the same pages.
        """
        return max(self.objects, sum(process.share for process in self.processes))

    @property
    def saved(self) -> int:
        """Bytes that plain copies of the loaded publications would take in addition. Each object of the store counts once."""
        return sum(one.plain - one.private for one in self.publications) - self.objects


def measure_processes(
    pids: Sequence[int], node: str = "", told: Sequence[Told] = (), *, is_whole_node: bool = False, is_here: bool = True
) -> NodeMemory:
    """Measure processes of this machine, and what they have loaded.

    Args:
        node: the id of their node.
        told: publications that the registry reports.
        is_whole_node: whether to report also publications that no process has loaded.
        is_here: whether this process is called "this process".
    """
    LEDGER.drop_gone()
    measured = measure(pids, node, is_here=is_here)
    accounts = Accounts(told)
    for process in measured.processes:
        accounts.add_process(process.pid, measured.of_store[process.pid])
    if not is_whole_node:
        accounts.keep_loaded()
    publications, notes = accounts.publications(node), list(measured.notes)
    if not all(one.kind for one in publications):
        notes.append(
            "No process reports a publication for the rows without a class: another program maps the store, or a process has "
            "just mapped it."
        )
    return NodeMemory(node, accounts.objects(), tuple(measured.processes), tuple(publications), tuple(notes))


def measure_here(told: Sequence[Told] = (), *, is_here: bool = True) -> NodeMemory:
    """Measure the node that this process is connected to: its raylet, its workers, its drivers."""
    node = ray.get_runtime_context().get_node_id()
    raylet = own_raylet()
    workers = [] if raylet is None else [raylet.pid, *(worker.pid for worker in workers_of(raylet))]
    pids = [*([os.getpid()] if is_here else []), *workers, *drivers_on(node)]
    found = measure_processes(pids, node, told, is_whole_node=True, is_here=is_here)
    if raylet is None:
        note = f"The raylet of node {node[:8]} and its workers are left out: this process cannot see them."
        found = attrs.evolve(found, notes=(*found.notes, note))
    return found


def measure_nodes(told: Mapping[str, Sequence[Told]], timeout: float) -> tuple[list[NodeMemory], list[str]]:
    """Measure all nodes of the cluster, this node first. Also returns notes on nodes that did not answer in time.

    Args:
        told: publications with a name, by the id of each node that has them.
        timeout: seconds.
    """
    here = ray.get_runtime_context().get_node_id()
    others = sorted(nodes_up() - {here})
    refs = {node: _task().options(scheduling_strategy=_on(node)).remote(told.get(node, ())) for node in others}
    replies = {node: ref.future() for node, ref in refs.items()}
    found, notes = [measure_here(told.get(here, ()))], []
    concurrent.futures.wait(replies.values(), timeout)
    for node, reply in replies.items():
        try:
            found.append(reply.result(0))
        except concurrent.futures.TimeoutError:
            notes.append(f"Node {node[:8]} is left out: it did not answer within {timeout:g} s.")
            with contextlib.suppress(Exception):
                ray.cancel(refs[node])
        except Exception as error:  # the node has just ended, or cannot run this
            reason = str(error).strip().splitlines() or [""]
            notes.append(f"Node {node[:8]} is left out: {type(error).__name__}: {reason[-1]}")
    return found, notes


@functools.cache
def _task() -> Any:
    return ray.remote(num_cpus=0, max_retries=0)(_measure_there)


def _measure_there(told: Sequence[Told]) -> NodeMemory:
    return measure_here(told, is_here=False)


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)
