"""Which nodes of the cluster have the weights of a publication, and which nodes should get them?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import ray

from zerocopy._load import partial
from zerocopy._load.load import shards_of
from zerocopy._nodes.prefetch import Keeper, OwnHolders, prefetch
from zerocopy._nodes.where import NodeCopies, copies_of
from zerocopy._store.manifest import Manifest, Outer

R = TypeVar("R")


class OnNodes:
    """The methods of a publication that concern nodes."""

    kind: str
    _holders: OwnHolders | None  # of the prefetched weights

    def nodes(self) -> NodeCopies:
        """Return how much of the weights each running node has in its store, as a table and by node id.

        Raises:
            As `load`.
        """
        return self._now(lambda handle: copies_of(handle._shards(None)))

    def prefetch(
        self,
        nodes: Literal["all"] | int | Iterable[str] = "all",
        *,
        fields: Sequence[str] | None = None,
        timeout: float | None = None,
        progress: bool = True,
    ) -> NodeCopies:
        """Copy the weights to nodes before any process loads them there, once per node, and keep them there.

        A load on such a node waits for no other node. A small actor on each node keeps the weights until `release`, or until
        this handle is closed or gone. With a name, it keeps them, no matter which process asked, until the version is superseded:
        until the alias that this handle follows points at another version, or the version is removed.

        Args:
            nodes: `"all"` for all nodes that have CPUs or GPUs, a number of nodes, or a list of node ids from `ray.nodes()`.
            fields: copy only the weights that a load of these fields needs.
            timeout: seconds to wait. With None, there is no limit.
            progress: whether to show a progress bar on a terminal or in a notebook.

        Returns:
            How much of the weights each of these nodes has now.

        Raises:
            ArgumentError: there are no such nodes or fields.
            StoreTooSmallError: the store of one node is smaller than the weights. Nothing was fetched.
            PrefetchError: some nodes failed, or were not ready in time. The other nodes keep what they have.
            As `load`.
        """
        options: dict[str, Any] = {"timeout": timeout, "progress": progress, "what": self.kind}
        return self._now(lambda handle: prefetch(handle._shards(fields), nodes, handle._keeper(), **options))

    def release(self) -> None:
        """Allow nodes to evict the weights that `prefetch` keeps there, when they need room."""
        self._holders = None

    def _keeper(self) -> Keeper:
        if self._holders is None:
            self._holders = OwnHolders()
        return self._holders

    def _shards(self, fields: Sequence[str] | None) -> list[ray.ObjectRef[Any]]:
        names = None if fields is None else partial.names_of(fields)
        return shards_of(*self._described(), names)

    def _now(self, call: Callable[[Any], R]) -> R:
        """The result of `call` for the weights that the handle refers to now."""
        return call(self)

    def _described(self) -> tuple[Manifest, Outer]:
        raise NotImplementedError
