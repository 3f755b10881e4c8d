"""How are weights brought to nodes before anybody loads them there? Each node pulls them once, and a holder keeps them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import ray
import ray.exceptions

from zerocopy._compat import ray as compat_ray
from zerocopy._compat.ray import pickled_by_value
from zerocopy._nodes import holder, where
from zerocopy._nodes.holder import Holders
from zerocopy._nodes.where import Node, NodeCopies, NodeCopy
from zerocopy._progress import progress_bar
from zerocopy._store import object_store
from zerocopy.errors import ArgumentError, PrefetchError, StoreTooSmallError

Wanted: TypeAlias = Literal["all"] | int | Iterable[str]

LOOK_SECONDS = 0.2  # between two looks at how far it is, for a progress bar


class Keeper(Protocol):
    """Whose holders keep objects on nodes."""

    def hold(self, node: str, refs: Sequence[ray.ObjectRef[Any]]) -> ray.ObjectRef[Any]:
        """Let a node hold objects."""

    def check(self, reply: ray.ObjectRef[Any]) -> None:
        """Raise what went wrong, when it has answered."""

    def forget(self, node: str) -> None:
        """The holder of a node has ended: another one is made next time."""


class OwnHolders:
    """Holders of this process. They end with it, or when nothing refers to this object."""

    def __init__(self) -> None:
        self._holders = Holders()
        self._key = uuid.uuid4().hex

    def hold(self, node: str, refs: Sequence[ray.ObjectRef[Any]]) -> ray.ObjectRef[Any]:
        with pickled_by_value((holder, compat_ray)):
            reply: ray.ObjectRef[Any] = self._holders.hold(node, self._key, refs)
        return reply

    def check(self, reply: ray.ObjectRef[Any]) -> None:
        object_store.await_reply(reply)

    def forget(self, node: str) -> None:
        self._holders.forget(node)


def prefetch(
    refs: Sequence[ray.ObjectRef[Any]],
    wanted: Wanted,
    keeper: Keeper,
    *,
    timeout: float | None,
    progress: bool,
    what: str,
) -> NodeCopies:
    """Bring objects to nodes; see `Publication.prefetch`."""
    known, here = where.nodes(), where.copies_of(refs)
    chosen = _chosen(wanted, known, here)
    needed = max((copy.of for copy in here.copies), default=0)
    for node in chosen:
        if needed > node.capacity:
            raise StoreTooSmallError(
                f"{what} takes {needed:,} bytes, but the object store of node {node.id} ({node.host}) has {node.capacity:,}.",
                hint="prefetch to other nodes, or start it with a larger `--object-store-memory`.",
                needed=needed,
                capacity=node.capacity,
            )
    replies = {keeper.hold(node.id, refs): node for node in chosen}
    pending = _wait(replies, refs, timeout, needed, shown=progress, what=what)
    failed: dict[str, str] = {}
    for reply, node in replies.items():
        if reply in pending:
            failed[node.id] = f"it was not ready after {timeout:g} s"
            continue
        try:
            keeper.check(reply)
        except ray.exceptions.RayError as error:
            keeper.forget(node.id)
            object_store.raise_if_lost(error)
            failed[node.id] = str(error).strip().splitlines()[-1]
    there = {node: 0 if node.id in failed else needed for node in chosen}
    copies = NodeCopies(tuple(NodeCopy(node.id, node.host, nbytes, needed) for node, nbytes in there.items()))
    if failed:
        reasons = "; ".join(f"node {node}: {reason}" for node, reason in failed.items())
        raise PrefetchError(
            f"{len(failed)} of {len(chosen)} nodes could not fetch {what}: {reasons}.",
            hint="the others keep it. Call prefetch again for the rest.",
            copies=copies,
            failed=failed,
        )
    return copies


def _chosen(wanted: Wanted, known: dict[str, Node], here: NodeCopies) -> list[Node]:
    """The nodes that are asked for. Of a number of nodes, those that have most of it already."""
    workers = [node for node in known.values() if node.runs_tasks]
    if wanted == "all":
        return workers
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0:
        if wanted > len(workers):
            raise ArgumentError(
                f"nodes={wanted}, but {len(workers)} nodes are up that run tasks.", hint='write nodes="all".'
            )
        has = {copy.node: copy.nbytes for copy in here.copies}
        return sorted(workers, key=lambda node: has.get(node.id, 0), reverse=True)[:wanted]
    ids = None if isinstance(wanted, (str, int)) else list(wanted)
    if not ids or not all(isinstance(node, str) for node in ids):
        raise ArgumentError(
            f"nodes={wanted!r} are no nodes.", hint='give "all", a number of nodes, or a list of their ids.'
        )
    unknown = [node for node in ids if node not in known]
    if unknown:
        raise ArgumentError(
            f"No node with the id {unknown[0]!r} is up.", hint=f"there are {', '.join(known)}.", nodes=unknown
        )
    return [known[node] for node in dict.fromkeys(ids)]


def _wait(
    replies: dict[ray.ObjectRef[Any], Node],
    refs: Sequence[ray.ObjectRef[Any]],
    timeout: float | None,
    needed: int,
    *,
    shown: bool,
    what: str,
) -> set[ray.ObjectRef[Any]]:
    """Wait for all replies. Returns those that have not come in time."""
    pending, end = list(replies), None if timeout is None else time.monotonic() + timeout
    chosen = {node.id for node in replies.values()}
    with progress_bar(f"Prefetching {what}", needed * len(replies), shown=shown, is_bytes=True) as bar:
        while pending:
            left = None if end is None else max(0.0, end - time.monotonic())
            look = min(LOOK_SECONDS, left) if bar and left is not None else LOOK_SECONDS if bar else left
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=look, fetch_local=False)
            if bar:
                there = where.copies_of(refs).copies if pending else ()
                bar(sum(copy.nbytes for copy in there if copy.node in chosen) if pending else needed * len(replies))
            if left == 0:
                break
    return set(pending)
