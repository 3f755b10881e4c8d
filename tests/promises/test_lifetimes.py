"""Do loaded pipelines keep their bytes when connections end, processes fork, threads run and owners end?"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import run_python, wait_until
from torch import nn

import zerocopy
from zerocopy._publish import adoption, publish
from zerocopy._store import mapping, object_store
from zerocopy._store.read import manifest_of
from zerocopy.errors import OutOfMemoryError
from zerocopy.testing import assert_zero_copy

CONNECTIONS = """
import gc, multiprocessing, os, sys, time, warnings
import numpy as np, ray, torch
from ray.cluster_utils import Cluster
import zerocopy
from zerocopy._compat.linux import sockets_to
from zerocopy._compat.ray import store_socket
from zerocopy.errors import ZeroCopyError

sys.stdout.reconfigure(line_buffering=True)  # what a child has not written yet it would write, too
warnings.simplefilter("ignore")
torch.set_num_threads(1)  # the threads of a pool do not survive a fork
cluster = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": 120 << 20, "include_dashboard": False})
sessions = []

def attach():
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)

def refill():
    for _ in range(2):
        kept = []
        while ray.available_resources() and len(kept) < 12:
            kept.append(ray.put(np.full(4 << 20, 0xAB, np.uint8)))
        del kept
        time.sleep(0.3)

def square(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(1500, 1500)

def loaded(seed):
    module = zerocopy.publish(square(seed)).load()  # nothing but the module keeps the weights now
    gc.collect()
    return module

def is_right(module, seed):
    return torch.equal(module.weight, square(seed).weight)

attach()
one, adopted, tensor = loaded(0), square(1), loaded(2).weight
zerocopy.publish(adopted, adopt=True)
right = lambda: is_right(one, 0) and is_right(adopted, 1) and torch.equal(tensor, square(2).weight)
ray.shutdown()
print("disconnected", right())
attach()
refill()
print("connected again, and the store filled", right())
print("published again", is_right(zerocopy.publish(one).load(), 0))
ray.shutdown()
attach()
refill()
print("and once more", right())
del one, adopted, tensor
gc.collect()

def in_child(target):
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join()
    refill()
    return child.exitcode

module = loaded(3)
publication = zerocopy.publish(square(4))
other = publication.load()

def drop_all():
    global module, publication, other
    assert is_right(module, 3)
    with torch.no_grad():
        module.weight.zero_()
    publication.close()
    del module, publication, other
    gc.collect()

print("a child drops everything", in_child(drop_all))
print("the parent keeps it", is_right(module, 3), is_right(other, 4), is_right(publication.load(), 4))

def use_ray():
    for call in (publication.load, lambda: zerocopy.publish(module)):
        try:
            call()
        except ZeroCopyError as error:
            print(type(error).__name__, str(error)[:60], flush=True)

print("a child uses Ray", in_child(use_ray), is_right(publication.load(), 4))

child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)
store = store_socket()
ray.shutdown()
print("the connection is kept", len(list(sockets_to(store))))
del module, other, publication
gc.collect()
print("the connection is closed", len(list(sockets_to(store))))
os.kill(child, 9)
os.waitpid(child, 0)
cluster.shutdown()
"""


@pytest.mark.long
def test_a_pipeline_outlives_its_connection_and_its_children() -> None:
    """Loaded and adopted pipelines keep their bytes after `ray.shutdown()`, and after forked children drop their copies."""
    # They keep them also when another session fills the store. A child that uses its parent's connection gets a clear error.
    done = run_python(CONNECTIONS)
    assert done.stdout.splitlines() == [
        "disconnected True",
        "connected again, and the store filled True",
        "published again True",
        "and once more True",
        "a child drops everything 0",
        "the parent keeps it True True True",
        "PublicationLostError This publication of Linear belongs to a connection to Ray th",
        "ZeroCopyError This process was forked from one that is connected to Ray, a",
        "a child uses Ray 0 True",
        "the connection is kept 1",
        "the connection is closed 0",
    ], done.stderr


def square(seed: int = 0, size: int = 1500) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(size, size)


@contextlib.contextmanager
def in_other_threads(*steps: Callable[[], object]) -> Iterator[None]:
    """Repeat each of `steps` in its own thread, and fail if one of them raises."""
    errors: list[BaseException] = []
    done = threading.Event()

    def repeat(step: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                step()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


@pytest.mark.usefixtures("cluster")
def test_readers_and_writers_notice_nothing_of_unshare() -> None:
    """During `unshare` other threads read the right bytes, and none of their writes is lost."""
    expected = square().weight.detach().clone()
    for _ in range(5):
        module = zerocopy.publish(square()).load()
        counters = module.bias.detach()
        counters.zero_()
        written = [0]

        def read(module: nn.Linear = module) -> None:
            assert torch.equal(module.weight, expected)

        def write(counters: torch.Tensor = counters, written: list[int] = written) -> None:
            counters += 1
            written[0] += 1

        with in_other_threads(read, write):
            zerocopy.unshare(module)
        assert counters.tolist() == [float(written[0])] * len(counters)
        read()


@pytest.mark.usefixtures("cluster")
def test_threads_go_on_during_an_adoption_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an adoption fails, the adopted tensors get private memory again, and other threads read the same bytes all the time."""
    put, puts = object_store.put, []

    def put_some(value: object) -> Any:
        puts.append(value)
        if len(puts) % 3 == 0:
            raise OSError("the disk is full")
        return put(value)

    monkeypatch.setattr(object_store, "put", put_some)
    expected = [square(seed).weight.detach().clone() for seed in range(3)]
    module = nn.ModuleList([square(seed) for seed in range(3)])

    def read() -> None:
        for part, weight in zip(module, expected, strict=True):
            assert torch.equal(part.weight, weight)

    with in_other_threads(read, read):
        for _ in range(3):
            with pytest.raises(OSError, match="full"):
                zerocopy.publish(module, adopt=True)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert torch.equal(module[0].weight, expected[0] + 1)


@pytest.mark.usefixtures("cluster")
def test_threads_go_on_during_adoption() -> None:
    """Operators that run in other threads during an adoption give the right answer."""
    batch = torch.ones(64, 1500)
    for seed in range(8):
        module = nn.Sequential(square(seed), square(seed + 1)).requires_grad_(False)
        expected = module(batch)

        def answer(module: nn.Module = module, expected: torch.Tensor = expected) -> None:
            assert torch.equal(module(batch), expected)

        with in_other_threads(answer, answer):
            zerocopy.publish(module, adopt=True)
            answer()


@pytest.mark.usefixtures("cluster")
def test_replaced_memory_is_kept_for_a_while_if_threads_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced memory is freed at once if no other thread computes, else after a grace period."""
    monkeypatch.setattr(adoption, "GRACE_SECONDS", 1.0)
    freed: list[str] = []

    def adopt(name: str) -> None:
        module = square()
        weakref.finalize(module.weight.untyped_storage(), freed.append, name)
        zerocopy.publish(module, adopt=True)

    adopt("alone")
    assert freed == ["alone"]
    with in_other_threads(lambda: torch.ones(500, 500) @ torch.ones(500, 500)):
        adopt("beside others")
        assert freed == ["alone"]
        assert wait_until(lambda: freed == ["alone", "beside others"], 5)


@pytest.mark.usefixtures("cluster")
def test_unshare_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`unshare` raises an error, before it changes anything, if the weights do not fit in free memory."""
    module = zerocopy.publish(square()).load()
    monkeypatch.setattr(mapping, "available_memory", lambda: 1_000_000)
    with pytest.raises(OutOfMemoryError, match="1,000,000 are free") as caught:
        zerocopy.unshare(module)
    assert caught.value.needed > caught.value.free == 1_000_000
    assert_zero_copy(module)
    monkeypatch.undo()
    zerocopy.unshare(module)
    assert torch.equal(module.weight, square().weight)


@ray.remote
class Publisher:
    def publish(self, seed: int) -> zerocopy.Publication:
        self.publication = zerocopy.publish(square(seed, 300))
        return self.publication

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.usefixtures("cluster")
def test_a_pipeline_outlives_its_publisher() -> None:
    """A loaded pipeline whose publisher has ended can be published again, and then has a living owner."""
    publisher = Publisher.remote()
    publication = ray.get(publisher.publish.remote(0))
    untouched, passed, in_part = publication.load(), publication.load(), publication.load()
    in_part.weight.requires_grad_(False)
    ray.get(ray.put([zerocopy.publish(passed), zerocopy.publish(in_part)]))
    pid = ray.get(publisher.pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not object_store.with_owner([publication.reference]), 15)
    time.sleep(object_store.OWNER_SECONDS)
    for module in (untouched, passed, in_part):
        again = zerocopy.publish(module)
        assert again.reference != publication.reference
        assert object_store.with_owner(all_references(again)) == set(all_references(again))
        assert torch.equal(again.load().weight, square(0, 300).weight)


def all_references(publication: zerocopy.Publication) -> list[ray.ObjectRef[Any]]:
    """All object references that a publication needs."""
    return [publication.reference, *manifest_of(publication.reference).shards]


@pytest.mark.usefixtures("cluster")
def test_memory_that_arrays_share_by_dlpack_is_not_moved() -> None:
    """Adoption does not move memory that an array shares by DLPack, so the array and the tensor stay tied."""
    module = nn.Module()
    module.register_buffer("table", torch.ones(1000, 300))
    module.weight = nn.Parameter(torch.ones(1000, 300))
    array = np.from_dlpack(module.table)
    zerocopy.publish(module, adopt=True)
    module.table.fill_(2)
    assert array.sum() == 2 * array.size
    with pytest.raises(AssertionError, match=r"module\.table is not a view"):
        assert_zero_copy(module)


@pytest.mark.usefixtures("cluster")
def test_unshare_gives_back_what_several_adoptions_took() -> None:
    """After `unshare` a pipeline needs nothing from the store, also if its parts were adopted at different times."""
    module = nn.ModuleList([square(0, 300), square(1, 300)])
    zerocopy.publish(module, adopt=True)
    module[1] = square(2, 300)
    zerocopy.publish(module, adopt=True)
    zerocopy.unshare(module)
    for layer in module:
        with pytest.raises(AssertionError, match="360,000 of its 360,000 bytes"):
            assert_zero_copy(layer.weight)


@pytest.mark.usefixtures("cluster")
def test_a_child_waits_for_no_thread_of_its_parent() -> None:
    """A forked child can close a publication, also if another thread of its parent was publishing during the fork."""
    publication = zerocopy.publish(square(0, 300))
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with publish._lock:
            locked.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about forks in a process with threads
        child = os.fork()
    if child == 0:
        publication.close()
        os._exit(0)
    ended = wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, 20)
    done.set()
    thread.join()
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended
    assert torch.equal(publication.load().weight, square(0, 300).weight)
