"""How long does it take until many nodes have the same weights? A simulation of how Ray pulls objects.

Ray pulls an object from one node, drawn at random among those that had it when the pull began. Each node sends and receives with
a fixed bandwidth, which its transfers share. `waves` starts pulls as `Publication.prefetch` does; without, all nodes ask for all
objects at one moment, as they do when workers load without prefetching.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

from zerocopy._nodes.waves import Waves


class Spread(NamedTuple):
    """What a simulation found.

    Attributes:
        seconds: until all nodes have everything.
        first: bytes that the first node sent, over the bytes of the weights.
    """

    seconds: float
    first: float


def simulate(nodes: int, objects: int, nbytes: float, bandwidth: float, *, waves: bool, seed: int = 0) -> Spread:
    """One copy on the first node is brought to all others.

    Args:
        nodes: how many there are, the first one included.
        nbytes: of all objects together.
        bandwidth: bytes per second that a node sends, and as many that it receives.
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
        start()  # what the first node has makes room for others
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
