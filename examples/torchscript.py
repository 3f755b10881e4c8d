"""How do I share a TorchScript model between Ray workers?

Pass it like a module. Scripted, traced and frozen programs arrive over one copy of their weights.

python examples/torchscript.py
"""

import logging
import os

import ray
import torch
from torch import nn

import zerocopy


class Worker(zerocopy.Actor):
    def __init__(self, program: nn.Module) -> None:
        self.program = program  # arrives loaded

    @torch.inference_mode()
    def ask(self, features: torch.Tensor) -> float:
        return self.program(features).mean().item()

    def pid(self) -> int:
        return os.getpid()


@zerocopy.task
def ask(program: nn.Module, features: torch.Tensor) -> float:
    with torch.inference_mode():
        return program(features).mean().item()


def main() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 2048)).eval()
    features = list(torch.randn(4, 2048))
    expected = [ask.local(network, one) for one in features]

    scripted = torch.jit.script(network)
    programs = {
        "scripted": scripted,
        "traced": torch.jit.trace(network, features[0]),
        "frozen": torch.jit.freeze(scripted),  # its weights are constants of its code
    }
    for kind, program in programs.items():
        answers = list(ask.map(program, features))
        alike = torch.allclose(torch.tensor(answers), torch.tensor(expected), atol=1e-6)
        print(f"{kind}: tasks answer as the module does: {alike}")

    weights = zerocopy.plan(scripted).shared_bytes
    with Worker.options(num_cpus=0.5).pool(2, scripted) as pool:
        list(pool.map("ask", features))
        processes = zerocopy.memory_report(ray.get([worker.pid.remote() for worker in pool])).processes
        for process in processes:
            print(f"worker: {process.mapped / weights:.1f} of {weights / 1e6:.0f} MB of weights read in the store")


if __name__ == "__main__":
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=2, object_store_memory=500_000_000, include_dashboard=False, **quiet)
    main()
