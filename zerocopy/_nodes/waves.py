"""Which node fetches which object next, when many nodes want the same objects?

If all nodes started at once, all would pull from the few copies that exist at that time. Here, as many nodes pull an object as it
has copies; the other nodes follow when it has more. Nodes begin with different objects, so that they can pull from each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence


class Waves:
    """Decides which node may fetch which object now. Objects are identified by their position."""

    def __init__(self, have: Sequence[Collection[str]], nodes: Sequence[str]) -> None:
        """`have` lists for each object the nodes that have it. All of `nodes` want all objects."""
        self._copies = [sum(node not in nodes for node in those) for those in have]
        self._under_way = [0] * len(have)
        self._waiting: list[deque[str]] = []
        self._here: list[tuple[str, int]] = []
        self._given_up: set[str] = set()
        self._more = 0
        for position, those in enumerate(have):
            first = position * len(nodes) // len(have)
            order = [*nodes[first:], *nodes[:first]]
            self._waiting.append(deque(node for node in order if node not in those))
            self._here += [(node, position) for node in order if node in those]

    def start(self) -> Iterator[tuple[str, int]]:
        """Yield the pairs of a node and an object that may start now."""
        here, self._here = self._here, []
        for node, position in here:
            self._under_way[position] += 1
            yield node, position
        for position, waiting in enumerate(self._waiting):
            while waiting and self._under_way[position] < max(1, self._copies[position]) + self._more:
                node = waiting.popleft()
                if node not in self._given_up:
                    self._under_way[position] += 1
                    yield node, position

    def finish(self, position: int, *, has_come: bool = True) -> None:
        """Note that a node has fetched an object, or has failed."""
        self._under_way[position] -= 1
        self._copies[position] += has_come

    def widen(self) -> None:
        """Let one more node pull each object: the nodes that pull it now may never finish."""
        self._more += 1

    def give_up(self, node: str) -> None:
        """Start no more fetches for a node."""
        self._given_up.add(node)
