"""How do several Ray actors share one copy of a model?

A pool of actors reads the same weights. If one actor overwrites them, the others do not see it.

python examples/actors.py
"""

import logging
import os

import ray
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared


@zerocopy.pipeline
class Classifier:
    network: nn.Module = shared()  # one copy per node
    labels: list[str] = copied()  # each worker has its own

    def __call__(self, features: torch.Tensor) -> str:
        with torch.inference_mode():
            return self.labels[self.network(features).argmax()]


@zerocopy.actor(num_cpus=0.5)
class Worker(zerocopy.Actor):
    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier  # arrives loaded

    def classify(self, features: torch.Tensor) -> str:
        return self.classifier(features)

    def spoil(self) -> None:
        """Overwrite a layer, as training or a bug would do."""
        with torch.no_grad():
            self.classifier.network[0].weight.zero_()

    def norm(self) -> float:
        return self.classifier.network[0].weight.norm().item()

    def pid(self) -> int:
        return os.getpid()


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 4096), nn.Tanh(), nn.Linear(4096, 3))
    classifier = Classifier(network, ["cat", "dog", "owl"])
    print(zerocopy.plan(classifier))

    features = list(torch.randn(12, 64))
    with Worker.pool(3, classifier) as pool:
        answers = list(pool.map("classify", features))
        print("\nthe pool answers: ", *answers)
        print("this process says:", *map(classifier, features))

        print("\nthree workers, one copy of the weights:")
        print(zerocopy.memory_report(ray.get([worker.pid.remote() for worker in pool])))

        ray.get(pool[0].spoil.remote())
        norms = ray.get([worker.norm.remote() for worker in pool])
        print("\nthe norm of the first layer, after worker 0 has overwritten it:")
        print("  in the workers:", *(f"{norm:.2f}" for norm in norms))
        print(f"  in this process: {network[0].weight.norm():.2f}")


if __name__ == "__main__":
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    main()
