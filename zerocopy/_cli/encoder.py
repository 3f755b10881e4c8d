"""Which model shows the cost of copies? An encoder of 1 GB, created on the spot, with random weights and no download."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import attrs
import ray
import torch
from torch import nn

import zerocopy
from zerocopy._cli.saving import Taken
from zerocopy._store import object_store
from zerocopy.errors import MissingPackageError

TOKENS = 32  # in each text that a worker encodes
TEXTS = 4
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
}


def encoder(**shape: Any) -> nn.Module:
    """A BERT of the given shape; by default of 1 GB.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise MissingPackageError(
            f"The demo's encoder needs transformers: {error}.",
            hint="pip install 'zerocopy-ray[demo]'.",
            package="transformers",
        ) from error
    made: nn.Module = BertModel(BertConfig(**(shape or LARGE)))
    return made.train(False)


class Worker:
    """Encodes texts of random tokens."""

    def __init__(self, model: nn.Module, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = model

    @torch.inference_mode()
    def encode(self) -> int:
        """Run the whole model. Returns the process id."""
        vocabulary: int = self.model.config.vocab_size  # type: ignore[union-attr,assignment]
        self.model(input_ids=torch.randint(vocabulary, (TEXTS, TOKENS)))
        gc.collect()
        return os.getpid()


class SharedWorker(Worker, zerocopy.Actor):
    """The same as an actor of zerocopy: its arguments arrive loaded."""


class PlainWorker(Worker):
    """The same with plain Ray, which pickles the model into each worker."""


@attrs.frozen
class Ran:
    """The result of a run of several workers.

    Attributes:
        taken: their memory, after each has run the model.
        seconds: from the model in this process until all workers had run it.
    """

    taken: Taken
    seconds: float


def run_shared(model: nn.Module, workers: int) -> Ran:
    """Run workers that share the weights. This process keeps no second copy of the weights either."""
    start = time.monotonic()
    share, threads = _share(workers)
    with zerocopy.publish(model, adopt=True) as publication:
        actor: Any = SharedWorker.options(num_cpus=share)
        actors: list[Any] = [actor.remote(publication, threads) for _ in range(workers)]
        return _measured("zerocopy", actors, start)


def run_copies(model: nn.Module, workers: int) -> Ran:
    """Run workers with one copy each, as with plain Ray."""
    start = time.monotonic()
    share, threads = _share(workers)
    actor: Any = ray.remote(num_cpus=share)(PlainWorker)
    ref = object_store.put(model)
    actors = [actor.remote(ref, threads) for _ in range(workers)]
    return _measured("plain copies", actors, start)


def _share(workers: int) -> tuple[float, int]:
    """The CPUs and the threads of each worker."""
    cpus = ray.cluster_resources().get("CPU", 1.0)
    return min(1.0, int(100 * cpus / workers) / 100), max(1, int(cpus / workers))


def _measured(way: str, actors: list[Any], start: float) -> Ran:
    pids = ray.get([actor.encode.remote() for actor in actors])
    seconds = time.monotonic() - start
    taken = Taken.of(way, zerocopy.memory_report(pids))
    for actor in actors:
        ray.kill(actor)
    return Ran(taken, seconds)
