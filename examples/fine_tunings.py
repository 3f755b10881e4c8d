"""How do I keep many fine-tunings of one model in little more memory than one?

Publish each under a name: weights are stored by their digests, so a fine-tuning takes only the tensors that differ.

python examples/fine_tunings.py
"""

import copy
import logging

import ray
import torch
from torch import nn

import zerocopy
from zerocopy.testing import shares_memory


def fine_tune(base: nn.Sequential, seed: int) -> nn.Sequential:
    """A copy of the base with a last layer trained on a customer's own examples. The other layers stay unchanged."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(base).requires_grad_(False)
    optimizer = torch.optim.SGD(tuned[-1].requires_grad_().parameters(), lr=0.1)
    examples, labels = torch.randn(64, 1024), torch.randint(10, (64,))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(tuned(examples), labels).backward()
        optimizer.step()
    return tuned.eval()


@zerocopy.task
def classify(model: nn.Module, features: torch.Tensor) -> list[int]:
    with torch.inference_mode():
        return model(features).argmax(1).tolist()


def stored() -> int:
    """Bytes that all publications take of the store: bytes that several of them share count once."""
    return sum(node.objects for node in zerocopy.memory_report().nodes)


def publish(model: nn.Module, name: str) -> None:
    """Publish a model under a name, and print how many bytes that wrote."""
    before = stored()
    zerocopy.publish(model, name=name)
    written = stored() - before
    print(f"{name}: {zerocopy.plan(model).shared_bytes:,} bytes of weights, {written:,} bytes written")


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 10)).eval()
    publish(base, "base")

    customers = ["anna", "ben", "cleo", "dora"]
    tuned = [fine_tune(base, seed) for seed in range(len(customers))]
    for name, model in zip(customers, tuned, strict=True):
        publish(model, name)
    print(zerocopy.publications())

    features = torch.randn(20, 1024)
    answers = [classify(zerocopy.lookup(name), features) for name in customers]  # found by name, in any process
    here = [classify.local(model, features) for model in tuned]
    print("answers as in this process:", answers == here, "- different from each other:", len(set(map(str, answers))))

    anna, ben = zerocopy.lookup("anna").load(), zerocopy.lookup("ben").load()
    print("first layers in the same memory:", shares_memory(anna[0], ben[0]))
    print("last layers in the same memory:", shares_memory(anna[-1], ben[-1]))
    for name in ["base", *customers]:
        zerocopy.remove(name)


if __name__ == "__main__":
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    main()
