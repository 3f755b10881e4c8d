"""How do the actors of `map_batches` share one model?

Batch inference with Ray Data: the constructor of each actor gets a handle, and all actors read the same weights.
Needs zerocopy-ray[data].

python examples/ray_data.py
"""

import collections
import logging
import os

import numpy as np
import ray
import ray.data
import torch
from torch import nn

import zerocopy
from zerocopy import shared


@zerocopy.pipeline
class Regressor:
    network: nn.Module = shared()

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.network(torch.tensor(inputs)).squeeze(1).numpy()


@zerocopy.actor
class Worker:
    def __init__(self, regressor: Regressor) -> None:
        self.regressor = regressor  # arrives loaded

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        predicted = self.regressor(batch["data"])
        memory = zerocopy.memory_report([os.getpid()]).processes[0]
        here = {"pid": os.getpid(), "from_store": memory.mapped}
        return {"predicted": predicted, **{name: np.full(len(predicted), value) for name, value in here.items()}}


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 3072), nn.ReLU(), nn.Linear(3072, 3072), nn.ReLU(), nn.Linear(3072, 1))
    regressor = Regressor(network)
    print(f"weights: {zerocopy.plan(regressor).shared_bytes / 1e6:.0f} MB")

    inputs = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    predictions = (
        ray.data.from_numpy(np.split(inputs, 20))
        .map_batches(
            Worker,
            fn_constructor_kwargs={"regressor": regressor},  # Ray Data pickles this: a handle, not the weights
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_size=100,
            num_cpus=0.5,
        )
        .take_all()
    )

    for pid, count in collections.Counter(row["pid"] for row in predictions).items():
        read = max(row["from_store"] for row in predictions if row["pid"] == pid)
        print(f"worker {pid}: {count} rows, reads {read / 1e6:.0f} MB from the store that all workers share")
    predicted = np.sort([row["predicted"] for row in predictions])
    print("the same as in this process:", np.allclose(predicted, np.sort(regressor(inputs)), atol=1e-5))


if __name__ == "__main__":
    # Ray prints a false error for each actor of Ray Data: https://github.com/ray-project/ray/issues/53727
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 300  # every worker is up before the first batch
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    main()
