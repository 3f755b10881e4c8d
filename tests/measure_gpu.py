"""How fast do weights get from the object store to a GPU? On a machine with one, this writes its section of docs/guide.md."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import safetensors.torch
import torch
from measure_nodes import spread, wrapped
from pages import renew
from peaks import peak_of_private_memory
from torch import nn

import zerocopy
from zerocopy._store import uploads

HEADING = "## Measured on a GPU"
LAYERS = 16
MB, GB = 1e6, 1e9
ACTORS = 4
DEVICE = "cuda"
LOAD = f'`publication.load(device="{DEVICE}")`'
ONE_THREAD = f"{LOAD} with one thread"
FROM_VIEWS = "`publication.load().cuda()`"
RAY_GET = "`ray.get` of the model, then `.cuda()`"
FILE = "`safetensors` from a file in the page cache"
ORDINARY = "`.cuda()` of a model in ordinary memory"
PINNED = "`.cuda()` of a model in pinned memory"
HOLD_A_COPY = (ORDINARY, PINNED)  # their memory is taken before they start


def model(width: int) -> nn.Sequential:
    """Linear layers in bfloat16, each of width by width."""
    return nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)])


def measured(way: Callable[[], Any]) -> float:
    """Seconds until the model is on the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    made = way()
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    assert all(tensor.is_cuda for tensor in made.parameters())
    return taken


def peak(way: Callable[[], Any]) -> int:
    """Bytes of private memory that this adds at its peak."""
    with peak_of_private_memory() as growth:
        way()
        return growth()


class Worker:
    """Brings the same model to the GPU in several ways."""

    def __init__(self, publication: zerocopy.Publication[nn.Sequential], width: int) -> None:
        self.publication = publication
        self.width = width
        torch.empty(1, device=DEVICE)  # starts CUDA
        self.load()

    def load(self) -> nn.Sequential:
        """The model on the GPU, from the object store."""
        return self.publication.load(device=DEVICE)

    def load_by_one_thread(self) -> nn.Sequential:
        """The same with one thread that copies."""
        count, uploads.THREADS = uploads.THREADS, 1
        try:
            return self.load()
        finally:
            uploads.THREADS = count

    def load_file(self, path: str) -> nn.Sequential:
        """The model on the GPU, from a file of safetensors."""
        with torch.device("meta"):
            empty = model(self.width)
        empty.load_state_dict(safetensors.torch.load_file(path, device=DEVICE), assign=True)
        return empty

    def at(self, moment: float) -> float:
        """Seconds of a load that starts at this time."""
        time.sleep(max(0.0, moment - time.time()))
        return measured(self.load)

    def all_ways(self, refs: list[ray.ObjectRef[nn.Sequential]], path: str, repeats: int) -> dict[str, Any]:
        """Seconds and bytes of each way, in turn. `refs` has one reference: in a list, Ray does not resolve it."""
        ordinary = model(self.width)
        pinned = model(self.width)
        for parameter in pinned.parameters():
            parameter.data = parameter.data.pin_memory()

        def fresh(original: nn.Sequential) -> Callable[[], Any]:
            return lambda: nn.ParameterList([parameter.cuda() for parameter in original.parameters()])

        ways: dict[str, Callable[[], Any]] = {
            LOAD: self.load,
            ONE_THREAD: self.load_by_one_thread,
            FROM_VIEWS: lambda: self.publication.load().cuda(),
            FILE: lambda: self.load_file(path),
            RAY_GET: lambda: ray.get(refs[0]).cuda(),
            ORDINARY: fresh(ordinary),
            PINNED: fresh(pinned),
        }
        return {
            name: ([measured(way) for _ in range(repeats + 1)][1:], peak(way))  # the first one fills torch's pools
            for name, way in ways.items()
        }


def use(model: nn.Sequential) -> None:
    """The body of both tasks."""
    assert next(model.parameters()).is_cuda


# Ray ends the worker of the first after each call, and keeps that of the second.
ended = zerocopy.task(num_gpus=0.25, device=DEVICE)(use)
kept = zerocopy.task(num_gpus=0.25, device=DEVICE, max_calls=0)(use)


def seconds_of(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call after the first."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken[1:]


def publish_from_gpu(width: int, repeats: int) -> list[float]:
    """Seconds to publish a model that is on the GPU and has changed."""
    ours = model(width).cuda()

    def publish() -> None:
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(1)
        torch.cuda.synchronize()
        zerocopy.publish(ours).close()

    return seconds_of(publish, repeats)


def measure(width: int, repeats: int) -> dict[str, Any]:
    """All figures of the section."""
    original = model(width)
    publication = zerocopy.publish(original)
    refs = [ray.put(original)]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        safetensors.torch.save_file(original.state_dict(), path)
        actor = ray.remote(num_gpus=1 / ACTORS, num_cpus=1)(Worker)
        workers = [actor.remote(publication, width) for _ in range(ACTORS)]
        ways = ray.get(workers[0].all_ways.remote(refs, path, repeats))
    at_once: list[float] = []
    for _ in range(repeats):
        moment = time.time() + 1
        at_once += ray.get([worker.at.remote(moment) for worker in workers])
    for worker in workers:
        ray.kill(worker)
    tasks = {
        "max_calls=0": seconds_of(lambda: ray.get(kept.remote(publication)), repeats),
        "default": seconds_of(lambda: ray.get(ended.remote(publication)), 3),
    }
    publication.close()
    return {
        "bytes": sum(parameter.nbytes for parameter in original.parameters()),
        "ways": ways,
        "at once": at_once,
        "tasks": tasks,
        "publish": publish_from_gpu(width, repeats),
    }


def section(told: dict[str, Any]) -> Iterator[str]:
    """The section of the page, line by line."""
    nbytes = told["bytes"]
    yield HEADING
    yield ""
    yield wrapped(
        "`python tests/measure_gpu.py --output docs/guide.md` writes this section. It was measured on one machine "
        f"({torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}, Ray {ray.__version__}). The "
        f"weights are {nbytes / GB:.1f} GB of bfloat16. The rates are medians, with the lowest and the highest value. The "
        "memory is what a load adds at its peak, after a first one."
    )
    yield ""
    yield "| how a worker gets its model to the GPU | GB/s | private memory, MB |"
    yield "| --- | ---: | ---: |"
    for name, (seconds, private) in told["ways"].items():
        yield row(name, nbytes, seconds, "the model" if name in HOLD_A_COPY else f"{private / MB:,.0f}")
        if name == LOAD:
            yield row(f"the same, in each of {ACTORS} actors that load at once", nbytes, told["at once"], "")
    yield ""
    stays, ends = (told["tasks"][name] for name in ("max_calls=0", "default"))
    publishing = spread(rates(nbytes, told["publish"]), ".1f")
    yield wrapped(
        f"Publishing a model that is on the GPU runs at {publishing} GB/s. The next call of a task takes "
        f"{spread([1000 * one for one in stays], '.1f')} ms with `max_calls=0`, and {spread(ends, '.1f')} seconds without, since "
        "Ray ends the worker after each call."
    )


def row(name: str, nbytes: int, seconds: list[float], private: str) -> str:
    """A row of the table, for the seconds that the bytes took."""
    return f"| {name} | {spread(rates(nbytes, seconds), '.1f')} | {private} |"


def rates(nbytes: int, seconds: list[float]) -> list[float]:
    """GB/s, for the seconds that the bytes took."""
    return [nbytes / GB / one for one in seconds]


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="the page to write the section into")
    options = parser.parse_args()
    size = 2 * LAYERS * options.width**2
    ray.init(
        "local",
        num_cpus=2 * ACTORS,
        num_gpus=1,
        object_store_memory=6 * size,
        include_dashboard=False,
        log_to_driver=False,
    )
    text = "\n".join(section(measure(options.width, options.repeats)))
    print(text)
    if options.output:
        renew(options.output, text)


if __name__ == "__main__":
    main()
