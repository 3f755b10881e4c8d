"""Is it really zero copy? The kernel measures workers' private memory, the publisher's peak, and the total."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pipelines
import ray
import torch
from peaks import peak_of_private_memory
from torch import nn

import zerocopy
from zerocopy._store.write import PACKS_PER_SHARD
from zerocopy.memory import MemoryReport, ProcessMemory, private_bytes

LAYERS = 8
MODEL_BYTES = LAYERS * 2048 * 2048 * 4


def model() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(LAYERS)])


@zerocopy.actor(num_cpus=0.1)
class Prober:
    def prepare(self) -> None:
        """Cause the memory costs that every torch process has once: thread pools, kernels, the imports of this module."""
        nn.Linear(2048, 2048)(torch.ones(1, 2048))
        private_bytes()

    def load_and_run(self, publication: zerocopy.Publication) -> tuple[int, int]:
        before = private_bytes()
        self.model = publication.load()
        with torch.inference_mode():
            self.model(torch.ones(1, 2048))
        return private_bytes() - before, os.getpid()

    def write(self, publication: zerocopy.Publication) -> int:
        loaded = publication.load()
        before = zerocopy.memory_report([os.getpid()]).processes[0].private
        with torch.no_grad():
            loaded[0].weight.add_(1)
        return zerocopy.memory_report([os.getpid()]).processes[0].private - before


def test_a_worker_takes_no_memory_of_its_own(cluster: None) -> None:
    """A load and a run add less than 2 % of the model to a worker, and all processes together less than 1.1 times its bytes."""
    weights = model()
    with Prober.pool(4) as pool:
        ray.get([prober.prepare.remote() for prober in pool])
        # All pages of the store that this process has touched stay mapped, so only additional memory counts.
        idle = {process.pid: process.private + process.share for process in zerocopy.memory_report().processes}
        publication = zerocopy.publish(weights)
        pids = [os.getpid()]
        for prober in pool:
            growth, pid = ray.get(prober.load_and_run.remote(publication))
            assert growth < 0.02 * MODEL_BYTES
            pids.append(pid)
        report = zerocopy.memory_report(pids)
        assert len(report.processes) == 5
        assert report.private + report.shared - sum(idle[pid] for pid in pids) < 1.1 * MODEL_BYTES
        assert all(process.mapped > 0.95 * MODEL_BYTES for process in report.processes)
        assert sum(process.saved for process in report.processes) > 2.5 * MODEL_BYTES


def test_publishing_makes_no_second_copy(cluster: None) -> None:
    """Publishing raises the peak of private memory by less than 2 % of the model; many small tensors need little more."""
    small = nn.ModuleList([nn.Linear(200, 200, bias=False) for _ in range(600)])
    zerocopy.publish(nn.Linear(8, 8)).close()
    weights = model()
    with peak_of_private_memory() as growth:
        publication = zerocopy.publish(weights)
        time.sleep(0.05)
    assert growth() < 0.02 * MODEL_BYTES
    assert publication.shared_bytes == MODEL_BYTES
    with peak_of_private_memory() as growth:
        assert zerocopy.publish(small).shared_bytes > 90_000_000
    assert growth() < PACKS_PER_SHARD + 12_000_000  # one pack at a time, and the skeleton of 600 modules


def test_report(cluster: None) -> None:
    """A memory report names processes, has totals, and prints as text and, in a notebook, as HTML."""
    report = zerocopy.memory_report()
    names = [process.name for process in report.processes]
    assert names[0] == "this process"
    assert "raylet" in names
    assert report.total >= report.private
    text = str(report)
    for word in ("process", "private", "shared", "saved", "PSS", "together", "raylet"):
        assert word in text
    assert report._repr_html_().count("<tr>") == len(report.processes) + 2
    ended = os.spawnv(os.P_NOWAIT, "/bin/true", ["true"])
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)  # it has ended, but nobody has waited for it yet
    assert zerocopy.memory_report([2**22 + 1, ended]).processes == ()
    os.waitpid(ended, 0)


def test_sums() -> None:
    """Shared pages count once, by their proportional shares; the saved bytes are the rest."""
    one = ProcessMemory(1, "one", private=10, mapped=100, share=50, total=60)
    report = MemoryReport((one, ProcessMemory(2, "two", 20, 100, 50, 70)))
    assert (report.shared, report.private, report.total, one.saved) == (100, 30, 130, 50)


def test_memory_written_is_private(cluster: None) -> None:
    """Written pages of a mapping count as private memory of the writer."""
    with Prober.pool(1) as pool:  # a new process, which has nothing else to free at the same time
        assert ray.get(pool[0].write.remote(zerocopy.publish(pipelines.encoder(1024)))) > 3_500_000


def test_no_file_stays_behind(cluster: None) -> None:
    """Dropped mappings leave no open file descriptor."""
    publication = zerocopy.publish(pipelines.encoder(256))
    publication.load()

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    kept: list[Any] = [publication.load() for _ in range(5)]
    assert descriptors() <= before + 5
    kept.clear()
    assert descriptors() <= before
