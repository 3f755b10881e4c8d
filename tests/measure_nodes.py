"""What does it cost to bring weights to nodes? `nox -s nodes` measures it on nodes of this machine, and writes docs/nodes.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from benchmarks.spreading import simulate
from clusters import MB, Nodes
from pages import renew
from torch import nn

import zerocopy

HEADING = "## Measured and computed"
PARTS = 16  # objects in the store that contain the weights
LARGE, LINK = 70e9, 1.25e9  # bytes, and bytes per second: 10 Gbit/s


def weights(nbytes: int) -> nn.Module:
    """Random parameters of equal size."""
    count = nbytes // (4 * PARTS)
    return nn.ParameterList([nn.Parameter(torch.rand(count)) for _ in range(PARTS)])


def plain(nbytes: int) -> list[ray.ObjectRef[Any]]:
    """The same number of bytes as plain objects of Ray."""
    return [ray.put(np.random.default_rng().random(nbytes // PARTS // 8)) for _ in range(PARTS)]


@ray.remote(num_cpus=0)
class Getter:
    """Gets plain objects."""

    def get(self, refs: list[ray.ObjectRef[Any]]) -> None:
        ray.get(refs)


def price(nbytes: int, repeats: int) -> dict[str, Any]:
    """Seconds to prefetch weights to a node, and to get the same bytes there with plain Ray, measured in turn."""
    nodes = Nodes({"first": 4 * nbytes, "second": 4 * nbytes})
    getter = Getter.options(resources={"second": 1}).remote()
    ray.get(getter.get.remote([]))
    seconds: dict[str, list[float]] = {"prefetch": [], "get": []}
    for turn in range(repeats + 1):
        zerocopy.publish(weights(nbytes), name="weights", keep=0)
        start = time.monotonic()
        zerocopy.lookup("weights").prefetch([nodes.id_of("second")], progress=False)
        seconds["prefetch"].append(time.monotonic() - start)
        refs = plain(nbytes)
        start = time.monotonic()
        ray.get(getter.get.remote(refs))
        seconds["get"].append(time.monotonic() - start)
        del refs
        zerocopy.remove("weights")
        time.sleep(2)
        if not turn:  # the first prefetch on a node starts its holder
            cold = seconds["prefetch"].pop()
            seconds["get"].clear()
    ray.shutdown()
    nodes.cluster.shutdown()
    ratios = [one / other for one, other in zip(seconds["prefetch"], seconds["get"], strict=True)]
    return {"ratios": ratios, "cold": cold, "rate": nbytes / median(seconds["get"]), **seconds}


def pushed(nodes: Nodes) -> dict[str, float]:
    """Bytes that each node has sent to other nodes so far, from Ray's metrics."""
    found = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        sent = [
            line for line in lines if line.startswith("ray_object_manager_bytes") and "PushedFromLocalPlasma" in line
        ]
        found[node["NodeID"]] = sum(float(line.split()[-1]) for line in sent)
    return found


def sources(count: int, nbytes: int) -> dict[str, float]:
    """Bytes that the first of several nodes sends, divided by the weights' bytes: in waves, and if all nodes ask at once."""
    names = [f"node-{number}" for number in range(count)]
    nodes = Nodes(dict.fromkeys(names, 3 * nbytes), metrics_report_interval_ms=500)
    getters = [Getter.options(resources={name: 1}).remote() for name in names[1:]]
    ray.get([getter.get.remote([]) for getter in getters])
    first = nodes.id_of(names[0])
    told: dict[str, float] = {}
    time.sleep(3)
    before = pushed(nodes)[first]
    zerocopy.publish(weights(nbytes), name="weights")
    zerocopy.lookup("weights").prefetch("all", progress=False)
    time.sleep(3)
    after = pushed(nodes)[first]
    told["waves"] = (after - before) / nbytes
    zerocopy.remove("weights")
    time.sleep(2)
    refs = plain(nbytes)
    ray.get([getter.get.remote(refs) for getter in getters])
    time.sleep(3)
    told["at once"] = (pushed(nodes)[first] - after) / nbytes
    ray.shutdown()
    nodes.cluster.shutdown()
    return told


def run(*arguments: object) -> dict[str, Any]:
    """Run one measurement in a separate process."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def spread(values: list[float], form: str) -> str:
    """The median, with the lowest and the highest value."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def section(priced: dict[str, Any], seen: dict[int, dict[str, float]], nbytes: int) -> Iterator[str]:
    """The section of the page, line by line."""
    yield HEADING
    yield ""
    yield wrapped(
        f"`nox -s nodes` writes this section. It was measured on one machine ({os.cpu_count()} cores, {platform.machine()}, Ray "
        f"{ray.__version__}) whose nodes send to each other over the loopback device. The weights are {nbytes / 1e6:.0f} MB."
    )
    yield ""
    yield "| measured | |"
    yield "| --- | ---: |"
    ratio = "time of a prefetch to a node, divided by that of `ray.get` of the same bytes there"
    yield f"| {ratio} | {spread(priced['ratios'], '.2f')} |"
    yield f"| time of the `ray.get`, seconds | {spread(priced['get'], '.2f')} |"
    yield f"| time of the prefetch, seconds | {spread(priced['prefetch'], '.2f')} |"
    yield f"| time of the first prefetch on a node, which starts its holder, seconds | {priced['cold']:.2f} |"
    yield ""
    yield wrapped(
        "The next table shows the bytes that the first node sends, divided by the bytes of the weights: measured by Ray's own "
        "counters, and simulated."
    )
    yield ""
    yield "| nodes | prefetch, measured | prefetch, simulated | all ask at once, measured | all ask at once, simulated |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for count, told in seen.items():
        simulated = [
            [simulate(count, PARTS, 1.0, 1.0, waves=waves, seed=n).first for n in range(20)] for waves in (True, False)
        ]
        waves, at_once = (f"{median(those):.1f}" for those in simulated)
        yield f"| {count} | {told['waves']:.1f} | {waves} | {told['at once']:.1f} | {at_once} |"
    yield ""
    loopback = f"{priced['rate'] / 1e6:.0f} MB/s"
    yield wrapped(
        f"The last table is computed, not measured, for {LARGE / 1e9:.0f} GB in {PARTS} parts. It assumes a link of 10 Gbit/s "
        f"per node, or the rate of this machine's loopback, {loopback} (that of `ray.get` above)."
    )
    yield ""
    yield f"| nodes | prefetch, 10 Gbit/s | all ask at once, 10 Gbit/s | prefetch, {loopback} | all ask at once, {loopback} |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for count in (10, 100, 1000):
        taken = [
            simulate(count, PARTS, LARGE, rate, waves=waves).seconds
            for rate in (LINK, priced["rate"])
            for waves in (True, False)
        ]
        yield f"| {count:,} | {' | '.join(map(duration, taken))} |"


def wrapped(text: str) -> str:
    """A paragraph wrapped into lines."""
    return textwrap.fill(text, 128)


def duration(seconds: float) -> str:
    """A time in minutes or hours."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nodes", type=int, nargs="*", default=[3, 5])
    parser.add_argument("--output", type=Path, help="the page to write the section into")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, *numbers = options.one
        print(json.dumps({"price": price, "sources": sources}[what](*map(int, numbers))))
        return
    nbytes = options.megabytes * MB
    priced = run("price", nbytes, options.repeats)
    seen = {count: run("sources", count, nbytes // 2) for count in options.nodes}
    text = "\n".join(section(priced, seen, nbytes))
    print(text)
    if options.output:
        renew(options.output, text)


if __name__ == "__main__":
    main()
