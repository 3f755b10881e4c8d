"""How long does it take until many nodes have the same weights? This simulates how Ray pulls objects.

Ray pulls an object from one node. The node is chosen at random from those that have the object when the pull begins.
Each node sends and receives with a fixed bandwidth, which its transfers share. With `waves`, pulls start as in
`Publication.prefetch`. Without it, all nodes ask for all objects at the same time, as when workers load without
prefetching.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

from zerocopy._nodes.waves import Waves


class Spread(NamedTuple):
    """The result of a simulation.

    Attributes:
        seconds: the time until all nodes have all objects.
        first: the bytes that the first node sent, divided by the bytes of the weights.
    """

    seconds: float
    first: float


def simulate(nodes: int, objects: int, nbytes: float, bandwidth: float, *, waves: bool, seed: int = 0) -> Spread:
    """Simulate how all nodes get a copy from the only copy, which is on the first node.

    Args:
        nodes: the number of nodes, including the first one.
        objects: the number of objects that contain the weights.
        nbytes: the size of all objects together.
        bandwidth: the bytes per second that a node can send, and at the same time receive.
    """
    draw = random.Random(seed)
    names = [str(node) for node in range(nodes)]
    schedule = Waves([{"0"} for _ in range(objects)], names)
    holders: list[list[int]] = [[0] for _ in range(objects)]
    transfers = [(node, position) for node in range(1, nodes) for position in range(objects)]
    rows = {transfer: row for row, transfer in enumerate(transfers)}
    target = np.array([node for node, _ in transfers])
    source = np.zeros(len(transfers), int)
    left = np.full(len(transfers), nbytes / objects)
    active = np.zeros(len(transfers), bool)
    now, first = 0.0, 0

    def start() -> None:
        for name, position in schedule.start() if waves else ():
            if name == "0":
                schedule.finish(position)
            else:
                begin(rows[int(name), position], position)

    def begin(row: int, position: int) -> None:
        nonlocal first
        source[row] = draw.choice(holders[position])
        first += int(source[row] == 0)
        active[row] = True

    if waves:
        start()
    else:
        for (_, position), row in rows.items():
            begin(row, position)
    while active.any():
        running = np.flatnonzero(active)
        sending, receiving = (
            np.bincount(source[running], minlength=nodes),
            np.bincount(target[running], minlength=nodes),
        )
        rate = bandwidth / np.maximum(sending[source[running]], receiving[target[running]])
        step = float((left[running] / rate).min())
        now += step
        left[running] -= rate * step
        done = running[left[running] <= 1e-6 * nbytes / objects]
        active[done] = False
        for row in done:
            node, position = transfers[row]
            holders[position].append(node)
            schedule.finish(position)
        start()
    return Spread(now, first / objects)
