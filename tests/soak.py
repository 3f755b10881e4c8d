"""Do weights stay right under load? Workers load, write, pass on and drop; the driver publishes, adopts, forks and closes.

Every weight of a model is the number of its version, so each reader knows the right value. `python tests/soak.py --seconds 60`
runs for 60 seconds, and fails if a reader has found another value.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import ray
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared

SIDE = 300  # rows and columns of a weight: 360 kB
HELD = 6  # pipelines that a process holds at the same time


class Net(nn.Module):
    """A module with weights of several sizes, statistics, and a counter of a few bytes."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.large = nn.ModuleList(nn.Linear(SIDE, SIDE) for _ in range(3))
        self.norm = nn.BatchNorm1d(64)
        for tensor in self.state_dict().values():
            tensor.fill_(version)


@zerocopy.pipeline
class Model:
    net: nn.Module = shared()
    version: int = copied()


def new_model(version: int) -> Model:
    return Model(Net(version), version)


def is_right(model: Model) -> bool:
    """Return whether every weight is the number of the model's version."""
    return all(bool((tensor == model.version).all()) for tensor in model.net.state_dict().values())


def fused_step(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, fused=True)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, -1000.0)
    optimizer.step()
    optimizer.zero_grad()


def by_numpy(net: Net) -> None:
    for tensor in net.state_dict().values():
        tensor.numpy()[...] += 1000


def by_data(net: Net) -> None:
    for tensor in net.state_dict().values():
        tensor.data.add_(1000)


def one_row(net: Net) -> None:
    net.large[1].weight.data[7] += 1000


def swapped(net: Net) -> None:
    torch.utils.swap_tensors(net.large[0].weight, nn.Parameter(net.large[0].weight.detach() + 1000))


WRITES: Sequence[Callable[[Net], None]] = (fused_step, by_numpy, by_data, one_row, swapped)


def sums(model: Model) -> list[float]:
    return [float(tensor.double().sum()) for tensor in model.net.state_dict().values()]


class Churn:
    """The actions of one process, and how often it found right and wrong values."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.held: list[Model] = []
        self.found: Counter[str] = Counter()

    def check(self, what: str, is_as_expected: bool) -> None:
        self.found[what if is_as_expected else f"WRONG: {what}"] += 1

    def use(self, publication: zerocopy.Publication) -> None:
        """Load, write to another load, pass it on, and check all held pipelines."""
        loaded, written = publication.load(), publication.load()
        self.check("loaded", is_right(loaded))
        self.random.choice(WRITES)(written.net)
        expected = sums(written)
        arrived = ray.get(ray.put(written))
        self.check("handed on after a write", sums(arrived) == expected == sums(written))
        loaded.net.requires_grad_(False)
        self.check("handed on after freezing", is_right(ray.get(ray.put(loaded))))
        if self.random.random() < 0.2:
            zerocopy.unshare(loaded)
        self.held.append(loaded)
        self.look()

    def look(self) -> None:
        """Check that all held pipelines are unchanged, and drop some of them."""
        for model in self.held:
            self.check("held", is_right(model))
        while len(self.held) > HELD:
            self.held.pop(self.random.randrange(len(self.held)))


@ray.remote(num_cpus=0.5)
class Worker:
    def __init__(self, seed: int) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        self.churn = Churn(seed)

    def use(self, publications: list[zerocopy.Publication]) -> dict[str, int]:
        for publication in publications:
            self.churn.use(publication)
        found, self.churn.found = dict(self.churn.found), Counter()
        return found


@zerocopy.task(num_cpus=0.5)
def find_and_write(model: Model, position: int) -> bool:
    """Return whether a call finds right weights in a worker where earlier calls have written, and then write."""
    found = is_right(model)
    WRITES[position](model.net)
    return found


class Driver(Churn):
    """Publishes, adopts, forks, fills the store, and calls workers."""

    def __init__(self, seed: int, workers: int) -> None:
        super().__init__(seed)
        self.workers = [Worker.remote(seed + 1 + number) for number in range(workers)]
        self.open: list[zerocopy.Publication] = []
        self.version = 0

    def step(self) -> None:
        self.version = self.version % 900 + 1
        model = new_model(self.version)
        self.open.append(zerocopy.publish(model, adopt=self.random.random() < 0.5))
        self.held.append(model)
        asked = [worker.use.remote([self.random.choice(self.open)]) for worker in self.workers]
        position = self.random.randrange(len(WRITES))
        self.check("a call of a task", find_and_write(self.random.choice(self.open), position))
        self.check("an instance passed", find_and_write(model, position))
        if self.random.random() < 0.2:
            self.fork()
        if self.random.random() < 0.5:
            self.change(model)
        kept = [ray.put(np.full(1 << 20, 0xAB, np.uint8)) for _ in range(8)]  # overwrites freed memory of the store
        for found in ray.get(asked):
            self.found.update(found)
        del kept
        while len(self.open) > HELD:
            self.open.pop(self.random.randrange(len(self.open))).close()
        self.look()

    def change(self, model: Model) -> None:
        """Write to the publisher's own weights, which were already passed."""
        self.random.choice([fused_step, by_numpy, by_data])(model.net)
        expected = sums(model)
        self.check("passed again after a write", sums(ray.get(ray.put(model))) == expected)
        self.held.remove(model)

    def fork(self) -> None:
        """Fork a child that drops everything that its parent holds."""

        def drop() -> None:
            wrong = [model for model in self.held if not is_right(model)]
            self.held.clear()
            self.open.clear()
            os._exit(len(wrong))

        child = multiprocessing.get_context("fork").Process(target=drop)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about forks in a process with threads
            child.start()
        child.join()
        self.check("a forked child", child.exitcode == 0)


def run(seconds: float, seed: int = 0, workers: int = 2) -> Counter[str]:
    """Run on the cluster of this process, and return how often each kind of check was right and wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of a pool do not survive a fork
    driver = Driver(seed, workers)
    try:
        driver.step()  # starts the workers, which takes some time
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            driver.step()
    finally:
        torch.set_num_threads(threads)
        for worker in driver.workers:
            ray.kill(worker)
        for publication in driver.open:
            publication.close()
    return driver.found


def main() -> None:
    """Start a cluster with a small store, run, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    ray.init("local", num_cpus=2, object_store_memory=150_000_000, include_dashboard=False, logging_level="ERROR")
    found = run(options.seconds, options.seed)
    for what, count in sorted(found.items()):
        print(f"{count:8,}  {what}")
    wrong = sum(count for what, count in found.items() if what.startswith("WRONG"))
    print(f"{sum(found.values()):,} checks, {wrong:,} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
