"""How are weights copied to nodes before a process loads them there? Each node pulls them once, and a holder keeps them."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import ray
import ray.exceptions

from zerocopy._compat import owners
from zerocopy._compat.ray import pickled_by_value
from zerocopy._nodes import holder, where
from zerocopy._nodes.holder import Holders
from zerocopy._nodes.waves import Waves
from zerocopy._nodes.where import Location, Node, NodeCopies, NodeCopy
from zerocopy._progress import progress_bar
from zerocopy._store import object_store
from zerocopy._store.lost import raise_if_lost
from zerocopy._words import check_seconds
from zerocopy.errors import ArgumentError, PrefetchError, StoreTooSmallError

# If nothing arrives during this time, a node that pulls may have failed, and other nodes stop waiting for it. The time is a
# number of seconds, plus the time for all bytes at a rate in bytes per second.
PATIENCE_SECONDS, PATIENCE_RATE = 3.0, 100e6

CALLS = 4  # for all objects, if there is only one node

Wanted: TypeAlias = Literal["all"] | int | Iterable[str]


class Keeper(Protocol):
    """Keeps objects on nodes, by means of holders."""

    def hold(self, node: str, refs: Sequence[ray.ObjectRef[Any]]) -> ray.ObjectRef[Any]:
        """Let a node hold objects."""

    def outcome(self, reply: ray.ObjectRef[Any]) -> Exception | None:
        """Return the error of a call of `hold` that has answered, or None."""


class OwnHolders:
    """Holders that this process owns. They end with the process, or when nothing refers to this object."""

    def __init__(self) -> None:
        self._holders = Holders()
        self._key = uuid.uuid4().hex
        self._asked: dict[ray.ObjectRef[Any], Any] = {}

    def hold(self, node: str, refs: Sequence[ray.ObjectRef[Any]]) -> ray.ObjectRef[Any]:
        with pickled_by_value((holder, owners)):
            actor = self._holders.on(node)
        reply: ray.ObjectRef[Any] = actor.hold.remote(self._key, list(refs))  # a list: else Ray passes the objects
        self._asked[reply] = actor
        return reply

    def outcome(self, reply: ray.ObjectRef[Any]) -> Exception | None:
        actor = self._asked.pop(reply)
        try:
            object_store.await_reply(reply)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.ActorDiedError):
                self._holders.forget(actor)
            return error
        return None


def prefetch(
    refs: Sequence[ray.ObjectRef[Any]],
    wanted: Wanted,
    keeper: Keeper,
    *,
    timeout: float | None,
    progress: bool,
    what: str,
) -> NodeCopies:
    """Copy objects to nodes; see `Publication.prefetch`."""
    if timeout is not None:
        check_seconds(timeout)
    located = object_store.locations(refs)
    chosen = _chosen(wanted, where.nodes(), located)
    needed = sum(size for _, size in located)
    for node in chosen:
        if needed > node.capacity:
            raise StoreTooSmallError(
                f"{what} takes {needed:,} bytes, but the object store of node {node.id} ({node.host}) has {node.capacity:,}.",
                hint="prefetch to other nodes, or start that node with a larger `--object-store-memory`.",
                needed=needed,
                capacity=node.capacity,
            )
    fetching = _Fetching(refs, located, chosen, keeper)
    fetching.run(timeout, f"Prefetching {what}", shown=progress)
    copies = NodeCopies(tuple(NodeCopy(node.id, node.host, fetching.there[node.id], needed) for node in chosen))
    if fetching.failed:
        reasons = "; ".join(f"node {node}: {reason}" for node, reason in fetching.failed.items())
        raise PrefetchError(
            f"{len(fetching.failed)} of {len(chosen)} nodes could not fetch {what}: {reasons}.",
            hint="the others keep it. Call prefetch again for the rest.",
            copies=copies,
            failed=fetching.failed,
        )
    return copies


def _chosen(wanted: Wanted, known: dict[str, Node], located: Sequence[Location]) -> list[Node]:
    """Return the nodes to copy to. If a number is wanted, choose the nodes that already have the most bytes."""
    workers = [node for node in known.values() if node.runs_tasks]
    if wanted == "all":
        return workers
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0:
        if wanted > len(workers):
            raise ArgumentError(
                f"nodes={wanted} was asked for, but {len(workers)} of the nodes that are up can run tasks.",
                hint=f'write nodes="all", or a number up to {len(workers)}.',
            )
        return sorted(workers, key=lambda node: where.bytes_on(node.id, located), reverse=True)[:wanted]
    ids = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else []
    if not ids or not all(isinstance(node, str) for node in ids):
        raise ArgumentError(
            f"nodes={wanted!r} does not name any nodes.",
            hint='give "all", a number of nodes, or a list of the ids that ray.nodes() tells.',
        )
    unknown = [node for node in ids if node not in known]
    if unknown:
        raise ArgumentError(
            f"No node with the id {unknown[0]!r} is up.", hint=f"the ids are {', '.join(known)}.", nodes=unknown
        )
    return [known[node] for node in dict.fromkeys(ids)]


class _Fetching:
    """One call of `prefetch`.

    Attributes:
        there: bytes that each node has.
        failed: the reason why a node does not have all objects, by node id.
    """

    def __init__(
        self, refs: Sequence[ray.ObjectRef[Any]], located: Sequence[Location], nodes: Sequence[Node], keeper: Keeper
    ) -> None:
        self._refs, self._keeper = refs, keeper
        self._sizes = [size for _, size in located]
        self._waves = Waves([ids for ids, _ in located], [node.id for node in nodes])
        self._pending: dict[ray.ObjectRef[Any], tuple[str, list[int]]] = {}
        self.there = {node.id: 0 for node in nodes}
        self.failed: dict[str, str] = {}
        self._again: set[tuple[Any, ...]] = set()  # nodes and positions of repeated calls: a holder had ended

    def run(self, timeout: float | None, description: str, *, shown: bool) -> None:
        """Fetch everything."""
        end = None if timeout is None else time.monotonic() + timeout
        with progress_bar(description, len(self.there) * sum(self._sizes), shown=shown, is_bytes=True) as bar:
            while self._start():
                left = math.inf if end is None else max(0.0, end - time.monotonic())
                patience = PATIENCE_SECONDS + sum(self._sizes) / PATIENCE_RATE
                ready, _ = ray.wait(list(self._pending), timeout=min(left, patience), fetch_local=False)
                if not ready and left > patience:
                    self._waves.widen()
                elif not ready:
                    late = [node for node, nbytes in self.there.items() if nbytes < sum(self._sizes)]
                    self.failed = {**dict.fromkeys(late, f"it was not ready after {timeout:g} s"), **self.failed}
                    return
                for reply in ready:
                    self._take(reply)
                if bar:
                    bar(sum(self.there.values()))

    def _start(self) -> bool:
        for node, positions in self._grouped(self._waves.start()):
            self._ask(node, positions)
        return bool(self._pending)

    def _ask(self, node: str, positions: list[int]) -> None:
        reply = self._keeper.hold(node, [self._refs[position] for position in positions])
        self._pending[reply] = node, positions

    def _grouped(self, started: Iterable[tuple[str, int]]) -> Iterable[tuple[str, list[int]]]:
        """Group objects into calls: one per call, so that other nodes can pull it soon; many per call if there is one node."""
        if len(self.there) > 1:
            return [(node, [position]) for node, position in started]
        pairs = list(started)
        parts = [pairs[number::CALLS] for number in range(min(CALLS, len(pairs)))]
        return [(part[0][0], [position for _, position in part]) for part in parts]

    def _take(self, reply: ray.ObjectRef[Any]) -> None:
        node, positions = self._pending.pop(reply)
        error = self._keeper.outcome(reply)
        if isinstance(error, ray.exceptions.ActorDiedError) and (node, *positions) not in self._again:
            self._again.add((node, *positions))  # the node may work: its next holder will show
            self._ask(node, positions)
            return
        if error is None:
            self.there[node] += sum(self._sizes[position] for position in positions)
        else:
            raise_if_lost(error)
            self._waves.give_up(node)
            self.failed[node] = str(error).strip().splitlines()[-1]
        for position in positions:
            self._waves.finish(position, has_come=error is None)
