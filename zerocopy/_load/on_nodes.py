"""What does a publication know of the nodes of its cluster: who has the weights, and who shall have them?"""

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
    """The part of a publication that is about nodes."""

    kind: str
    _holders: OwnHolders | None  # of what was prefetched

    def nodes(self) -> NodeCopies:
        """What each node of the cluster that is up has of the weights in its store, as a table and by the node's id.

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
        """Bring the weights to nodes before anybody loads them there, once for each node, and keep them there.

        A small actor on each node keeps them until `release`, or until this handle is closed or gone. Under a name it keeps
        them, whoever asked, until the version is superseded: until the alias that this handle follows points elsewhere, or the
        version is gone. A load on such a node waits for no other node.

        Args:
            nodes: `"all"` nodes that have CPUs or GPUs, a number of them, or a list of the ids that `ray.nodes()` tells.
            fields: only what a load of these fields needs.
            timeout: seconds to wait, None for as long as it takes.
            progress: whether to show a bar on a terminal or in a notebook.

        Returns:
            What each of these nodes has now.

        Raises:
            ArgumentError: there are no such nodes or fields.
            StoreTooSmallError: one of the nodes can never hold them. Nothing was fetched.
            PrefetchError: some nodes failed, or were not ready in time; the others keep what they have.
            As `load`.
        """
        options: dict[str, Any] = {"timeout": timeout, "progress": progress, "what": self.kind}
        return self._now(lambda handle: prefetch(handle._shards(fields), nodes, handle._keeper(), **options))

    def release(self) -> None:
        """Let nodes go of what `prefetch` keeps there. They may evict it when they need room."""
        self._holders = None

    def _keeper(self) -> Keeper:
        if self._holders is None:
            self._holders = OwnHolders()
        return self._holders

    def _shards(self, fields: Sequence[str] | None) -> list[ray.ObjectRef[Any]]:
        names = None if fields is None else partial.names_of(fields)
        return shards_of(*self._described(), names)

    def _now(self, call: Callable[[Any], R]) -> R:
        """What a call gives for the weights that the handle refers to now."""
        return call(self)

    def _described(self) -> tuple[Manifest, Outer]:
        raise NotImplementedError
