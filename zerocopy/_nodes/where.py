"""Which nodes does the cluster have, and how much of some weights does each node have?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import ray

from zerocopy._store import object_store
from zerocopy._tables import as_html, as_text, format_bytes

Location: TypeAlias = tuple[list[str], int]  # ids of the nodes that have an object, and its bytes


@attrs.frozen
class NodeCopy:
    """How much of some weights one node has.

    Attributes:
        node: id of the node.
        host: host name of the node.
        nbytes: bytes of the weights that its store has.
        of: bytes of all these weights.
    """

    node: str
    host: str
    nbytes: int
    of: int

    @property
    def is_complete(self) -> bool:
        """Whether the node has all of the weights, so that a load there waits for no other node."""
        return self.nbytes >= self.of


@attrs.frozen(repr=False)
class NodeCopies(Mapping[str, NodeCopy]):
    """How much of some weights each node has, by node id. Prints as a table, in a notebook as HTML."""

    copies: tuple[NodeCopy, ...]

    def __getitem__(self, node: str) -> NodeCopy:
        for copy in self.copies:
            if copy.node == node:
                return copy
        raise KeyError(node)

    def __iter__(self) -> Iterator[str]:
        return (copy.node for copy in self.copies)

    def __len__(self) -> int:
        return len(self.copies)

    @property
    def complete(self) -> list[str]:
        """Ids of the nodes that have all of the weights."""
        return [copy.node for copy in self.copies if copy.is_complete]

    def __str__(self) -> str:
        return as_text(_HEADERS, self._rows(), right=_HEADERS[2:])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(_HEADERS, self._rows(), right=_HEADERS[2:])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for copy in self.copies:
            share = copy.nbytes / copy.of if copy.of else 1.0
            yield copy.node, copy.host, format_bytes(copy.nbytes), f"{share:.0%}"


_HEADERS = ("node", "host", "bytes", "share")


@attrs.frozen
class Node:
    """A node that is up.

    Attributes:
        capacity: bytes of its object store.
        runs_tasks: whether it has CPUs or GPUs for tasks.
    """

    id: str
    host: str
    capacity: int
    runs_tasks: bool


def nodes() -> dict[str, Node]:
    """The nodes that are up, by id."""
    return {told["NodeID"]: _node_of(told) for told in ray.nodes() if told["Alive"]}


def _node_of(told: dict[str, Any]) -> Node:
    resources = told["Resources"]
    runs_tasks = any(resources.get(kind, 0) > 0 for kind in ("CPU", "GPU"))
    return Node(told["NodeID"], told["NodeManagerHostname"], int(resources.get("object_store_memory", 0)), runs_tasks)


def copies_of(refs: Sequence[ray.ObjectRef[Any]]) -> NodeCopies:
    """Return how much of some objects each running node has.

    Raises:
        PublicationLostError: the owner of an object has ended.
    """
    located = object_store.locations(refs)
    total = sum(size for _, size in located)
    return NodeCopies(
        tuple(NodeCopy(node.id, node.host, bytes_on(node.id, located), total) for node in nodes().values())
    )


def bytes_on(node: str, located: Sequence[Location]) -> int:
    """Return how many bytes of some objects a node has."""
    return sum(size for ids, size in located if node in ids)
