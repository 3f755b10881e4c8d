"""How do I pass a large model to many Ray tasks?

Functions and methods run as tasks. The model is published once, and arrives loaded without a copy.

python examples/tasks.py
"""

import logging
import os

import ray
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared


@zerocopy.task
def mean_score(network: nn.Module, batch: torch.Tensor) -> tuple[float, int]:
    """The mean of a network's outputs, and the process that computed it."""
    with torch.inference_mode():
        return network(batch).mean().item(), os.getpid()


@zerocopy.pipeline
class Ensemble:
    members: list[nn.Module] = shared()
    temperature: float = copied(default=1.0)

    @zerocopy.task
    def predict(self, features: torch.Tensor) -> int:
        with torch.inference_mode():
            votes = torch.stack([member(features) for member in self.members])
        return (votes / self.temperature).softmax(-1).mean(0).argmax().item()


def a_network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def main() -> None:
    torch.manual_seed(0)
    network, batches = a_network(), list(torch.randn(8, 32, 64))

    score, pid = mean_score(network, batches[0])  # a plain call, which runs in another process
    here, own_pid = mean_score.local(network, batches[0])
    print(f"{score:+.4f} from process {pid}, {here:+.4f} from this process, {own_pid}")

    scores = mean_score.map(network, batches)  # in order, a few at a time, the weights published once
    print("map:", *(f"{score:+.4f}" for score, _ in scores))

    ensemble = Ensemble([a_network() for _ in range(3)])
    features = list(torch.randn(6, 64))
    refs = [ensemble.predict.remote(row) for row in features]  # a method is a task too: `self` arrives loaded
    print("remote:", *ray.get(refs))
    print("map:   ", *ensemble.predict.map(features))
    print("local: ", *(ensemble.predict.local(row) for row in features))


if __name__ == "__main__":
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    main()
