"""Do the internals of Ray, torch, Linux and Python that the package uses still work as expected?

A new version that changes one of them fails here. Other tests check that only `_compat` uses such internals.
"""

from __future__ import annotations

import ast
import copy
import copyreg
import gc
import io
import logging
import mmap
import operator
import os
import pickle
import pickletools
import queue
import random
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import pytest
import ray
import ray.cloudpickle
import torch
from conftest import run_python, wait_until
from torch import nn
from torch.nn.utils import parametrize

import zerocopy
from zerocopy._compat import cpython, linux, notes
from zerocopy._compat import ray as compat_ray
from zerocopy._compat import torch as compat_torch
from zerocopy._store import object_store

# Ray:


def addresses(buffers: list[Any]) -> list[int]:
    return [np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] for buffer in buffers]


def test_a_driver_and_a_worker_have_different_modes(cluster: None) -> None:
    """The mode of this process is that of a script, and the mode of a process that runs a task is that of a worker."""

    @ray.remote
    def mode() -> int | None:
        return compat_ray.mode()

    assert compat_ray.mode() == ray.SCRIPT_MODE
    assert ray.get(mode.remote()) == ray.WORKER_MODE


RECONNECTING = """
import gc
import sys
import weakref
import ray
import zerocopy
from zerocopy._compat import cpython, linux, notes
from zerocopy._compat import ray as compat_ray

def start(address, **options):
    ray.init(address, logging_level="ERROR", log_to_driver=False, **options)

print(compat_ray.allows_out_of_band())
start(sys.argv[1])
first, cluster = compat_ray.connection(), compat_ray.cluster_id()
print(compat_ray.connection() is first, compat_ray.cluster_id() == cluster)
ref = ray.put(1)
kept = {1}
gone = weakref.ref(kept)
compat_ray.keep_while_connected(kept)
del kept
gc.collect()
print(gone() is None)
ray.shutdown()
print(gone() is None)
start("local", num_cpus=1, object_store_memory=100_000_000, include_dashboard=False)
print(compat_ray.connection() is first, compat_ray.cluster_id() == cluster)
try:
    ray.get(ref, timeout=10)
except ValueError as error:
    print(compat_ray.OWNER_UNKNOWN in str(error))
"""


@pytest.mark.long
def test_connections_and_clusters_are_told_apart(address: str) -> None:
    """Connection and cluster stay the same until `ray.shutdown()`; then kept objects are dropped and old owners are unknown."""
    done = run_python(RECONNECTING, "-", address, RAY_allow_out_of_band_object_ref_serialization="0")
    assert done.stdout.splitlines() == ["False", "True True", "False", "True", "False False", "True"], done.stderr


def test_workers_are_told_the_same_cluster(cluster: None) -> None:
    """A worker has its own connection, to the same cluster as the driver."""

    @ray.remote
    def cluster_id() -> str:
        assert compat_ray.connection() is not None
        return compat_ray.cluster_id()

    assert ray.get(cluster_id.remote()) == compat_ray.cluster_id()


def test_references_out_of_band_are_counted(cluster: None) -> None:
    """Pickling a reference outside of Ray's own serialization adds one to its count, and only `drop_reference` removes it."""
    ref = ray.put(1)
    worker: Any = ray._private.worker.global_worker

    def count() -> int:
        return worker.core_worker.get_all_reference_counts()[ref.hex().encode()]["local"]

    before = count()
    if compat_ray.allows_out_of_band():
        ray.cloudpickle.dumps(ref)
        assert count() == before + 1
        compat_ray.drop_reference(ref)
    assert count() == before


def test_serialization_is_noticed(cluster: None) -> None:
    """A reducer can find out whether Ray called it, for an argument or a put, or other code did."""
    seen: list[bool] = []

    class Noticing:
        def __reduce__(self) -> tuple[Any, ...]:
            seen.append(compat_ray.is_serializing())
            return int, ()

    ray.put(Noticing())
    ray.cloudpickle.dumps(Noticing())
    assert seen == [True, False]
    assert not compat_ray.is_serializing()


def test_an_unknown_owner_is_told_by_these_words(cluster: None) -> None:
    """Ray refuses an unknown reference with the error text that the package looks for."""
    with pytest.raises(ValueError, match=compat_ray.OWNER_UNKNOWN):
        ray.put([ray.ObjectRef(os.urandom(28))])


def test_the_node_of_an_owner_is_told(cluster: None) -> None:
    """The error of a lost object contains the node of its owner, if Ray knew the owner."""
    worker: Any = ray._private.worker.global_worker
    owner = worker.core_worker.get_owner_address(ray.put(1))
    error = ray.exceptions.OwnerDiedError("00", owner, "")
    assert compat_ray.node_of_owner(error) == ray.get_runtime_context().get_node_id()
    assert compat_ray.node_of_owner(ray.exceptions.OwnerDiedError("00", None, "")) is None


@ray.remote(num_cpus=0)
class Dropping:
    """A thread drops each reference some moments after a call, so that now and then it does so while the next call arrives."""

    def __init__(self) -> None:
        self.kept: queue.Queue[ray.ObjectRef[Any]] = queue.Queue()
        threading.Thread(target=self.drop, daemon=True).start()

    def drop(self) -> None:
        while True:
            time.sleep(random.random() * 0.003)
            self.kept.get()

    def length(self, given: list[ray.ObjectRef[Any]]) -> int:
        found = len(object_store.get(given[0]))
        self.kept.put(given.pop())
        return found


@pytest.mark.long
def test_a_lost_answer_of_an_owner_is_asked_for_again(cluster: None) -> None:
    """Ray itself loses the answer in one of some 6,000 of these calls (measured with Ray 2.60), and then waits forever."""
    ref, actor = ray.put(bytes(200_000)), Dropping.remote()
    for _ in range(20_000):
        assert ray.get(actor.length.remote([ref]), timeout=30) == 200_000
    ray.kill(actor)


def test_own_objects_are_told(cluster: None) -> None:
    """An object is `own` only in the process that put it."""
    ref = ray.put(1)

    @ray.remote
    def of_a_worker(given: list[Any]) -> list[bool]:
        return [compat_ray.is_own(given[0]), compat_ray.is_own(ray.put(1))]

    assert compat_ray.is_own(ref)
    assert ray.get(of_a_worker.remote([ref])) == [False, True]


@pytest.mark.long
def test_processes_that_end_with_a_task_are_told(cluster: None) -> None:
    """Only a process that runs a task with `max_calls=1` ends with its task, and every thread of it gets this answer."""

    def ends() -> bool:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(compat_ray.ends_with_task()))
        thread.start()
        thread.join()
        assert found == [compat_ray.ends_with_task()]
        return found[0]

    @ray.remote(max_calls=1)
    def once() -> bool:
        return ends()

    @ray.remote(max_calls=9)
    def nine_times() -> bool:
        return ends()

    @ray.remote
    def often() -> bool:
        return ends()

    @ray.remote
    class Actor:
        def ends(self) -> bool:
            return ends()

    assert not ends()
    assert ray.get([often.remote(), Actor.remote().ends.remote()]) == [False, False]
    assert ray.get([once.remote(), nine_times.remote()]) == [True, False]


def test_buffers_are_aligned(cluster: None) -> None:
    """Ray places the buffers of an object in order, large ones at the next multiple of the alignment."""
    sizes = [16, 5000, 2048, 3001, 70_000]
    starts = addresses(ray.get(ray.put([pickle.PickleBuffer(os.urandom(size)) for size in sizes])))
    assert not any(start % compat_ray.BUFFER_ALIGNMENT for start in starts)
    gaps = [following - start - size for start, following, size in zip(starts, starts[1:], sizes, strict=False)]
    assert all(0 <= gap < compat_ray.BUFFER_ALIGNMENT for gap in gaps)


def test_options_are_known_by_name_and_checked() -> None:
    """Ray lists its options by name and refuses wrong values, some of them only in `.options()`."""
    assert {"num_cpus", "max_restarts", "max_concurrency", "lifetime"} <= compat_ray.OPTIONS["actor"].keys()
    assert {"num_cpus", "num_returns", "max_retries"} <= compat_ray.OPTIONS["task"].keys()
    assert "max_restarts" not in compat_ray.OPTIONS["task"]
    compat_ray.check_values({"num_cpus": 1}, "actor", late=False)
    compat_ray.check_values({"num_returns": 2}, "task", late=True)
    for kind in ("actor", "task"):
        with pytest.raises(ValueError, match="num_cpus"):
            compat_ray.check_values({"num_cpus": -1}, kind, late=False)
    with pytest.raises(ValueError, match="concurrency_groups"):
        compat_ray.check_values({"concurrency_groups": {}}, "actor", late=True)


def test_classes_derived_by_ray_are_known() -> None:
    """Ray derives a class from the user's class, and marks the derived class."""

    class Plain: ...

    made: Any = ray.remote(Plain)
    derived = made.__ray_metadata__.modified_class
    assert issubclass(derived, Plain)
    assert compat_ray.is_ray_actor_class(derived)
    assert not compat_ray.is_ray_actor_class(Plain)


class Registered: ...


class BelowRegistered(Registered): ...


@pytest.mark.usefixtures("cluster")
def test_the_store_is_connected_to() -> None:
    """This process has one connection to the socket of its node's store, and at most one duplicate that zerocopy made."""
    assert 1 <= len(list(linux.sockets_to(compat_ray.store_socket()))) <= 2


def test_available_memory_is_told() -> None:
    """The available memory is about the value of psutil, or less in a container."""
    assert 0 < compat_ray.available_memory() <= 1.2 * psutil.virtual_memory().available


def test_a_registered_reducer_is_used_by_ray_alone() -> None:
    """A registered reducer applies to exactly one class, only in Ray's pickler and its subclasses, also without a connection."""
    compat_ray.register_reducer(Registered, lambda _: (str, ("reduced",)))
    assert pickle.loads(ray.cloudpickle.dumps(Registered())) == "reduced"
    assert type(pickle.loads(pickle.dumps(Registered()))) is Registered
    assert type(pickle.loads(ray.cloudpickle.dumps(BelowRegistered()))) is BelowRegistered


def test_what_users_register_goes_before_ours() -> None:
    """A user's serializer in Ray comes before ours until it is deregistered; ours comes before `copyreg`."""
    compat_ray.register_reducer(Registered, lambda _: (str, ("ours",)))

    def reduced() -> object:
        return pickle.loads(ray.cloudpickle.dumps(Registered()))

    copyreg.pickle(Registered, lambda _: "Registered")  # type: ignore[arg-type, return-value]
    try:
        assert reduced() == "ours"
        ray.util.register_serializer(Registered, serializer=str, deserializer=lambda _: "theirs")
        assert reduced() == "theirs"
        ray.util.deregister_serializer(Registered)
        assert reduced() == "ours"
    finally:
        copyreg.dispatch_table.pop(Registered)


def test_reducers_of_users_are_told() -> None:
    """A user's reducer, registered with Ray or `copyreg`, is found until it is deregistered; ours and cloudpickle's are not."""
    told = compat_ray.registered_reducer
    compat_ray.register_reducer(Registered, lambda _: (str, ("ours",)))
    assert told(Registered) is None
    assert told(io.TextIOWrapper) is None
    assert ray.cloudpickle.CloudPickler.dispatch_table[io.TextIOWrapper] is not None
    assert told(re.Pattern) is copyreg.dispatch_table[re.Pattern]
    ray.util.register_serializer(Registered, serializer=str, deserializer=str)
    found = told(Registered)
    assert found is not None
    assert found(Registered())[0] is str
    ray.util.deregister_serializer(Registered)
    assert told(Registered) is None


@pytest.mark.long
def test_async_actors_are_told_and_get_silently(cluster: None) -> None:
    """Only an actor with an async method is async; there `ray.get` logs its advice once, and `get_silently` logs nothing."""

    class Plain:
        def told(self, _: Any) -> Any:
            return compat_ray.is_async_actor()

    class Asynchronous:
        async def told(self, refs: list[ray.ObjectRef[int]]) -> Any:
            records: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
            logging.getLogger("ray._private.worker").addHandler(handler)
            silently = compat_ray.get_silently(refs), list(records)
            return compat_ray.is_async_actor(), silently, ray.get(refs), [text[:28] for text in records]

    refs = [[ray.put(1), ray.put(2)]]
    actors = [ray.remote(num_cpus=0.1)(cls).remote() for cls in (Plain, Asynchronous)]  # type: ignore[attr-defined]
    plain, asynchronous = ray.get([actor.told.remote(*refs) for actor in actors])
    assert not compat_ray.is_async_actor()
    assert not plain
    assert asynchronous == (True, ([1, 2], []), [1, 2], ["Using blocking ray.get inside"[:28]])


def test_the_pickler_can_be_derived_from() -> None:
    """A subclass of Ray's pickler can reduce some objects differently, and still pickles functions and classes as Ray does."""

    class Pickler(compat_ray.CloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            return (int, ("7",)) if isinstance(obj, Registered) else super().reducer_override(obj)

    file = io.BytesIO()
    Pickler(file, protocol=5).dump([Registered(), lambda: 5])
    number, function = pickle.loads(file.getvalue())
    assert (number, function()) == (7, 5)


def test_modules_pickled_by_value_are_known() -> None:
    """A module that a user registered to be pickled by value is found by its name, until it is unregistered."""
    this = sys.modules[__name__]
    assert not compat_ray.is_pickled_by_value(__name__)
    ray.cloudpickle.register_pickle_by_value(this)
    try:
        assert compat_ray.is_pickled_by_value(__name__)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(this)


def test_processes_of_ray_are_found(cluster: None) -> None:
    """The raylet is found by its process name, in a worker first as its parent; workers are found by their process titles."""

    @ray.remote
    class Worker:
        def pids(self) -> tuple[int, int, int]:
            return os.getpid(), os.getppid(), next(compat_ray.raylets()).pid

    worker = Worker.remote()
    pid, parent, found = ray.get(worker.pids.remote())
    assert found == parent
    raylet = next(raylet for raylet in compat_ray.raylets() if raylet.pid == parent)
    assert pid in [child.pid for child in compat_ray.workers_of(raylet)]
    assert psutil.Process(pid).cmdline()[0].startswith(compat_ray.WORKER_TITLE)
    assert list(compat_ray.workers_of(psutil.Process())) == []


def test_the_own_raylet_is_told_by_its_store(cluster: None) -> None:
    """The driver and its workers find the same raylet, which is the parent of the workers."""

    @ray.remote(num_cpus=0.1)
    def told() -> tuple[int, int]:
        raylet = compat_ray.own_raylet()
        assert raylet is not None
        return raylet.pid, os.getppid()

    raylet = compat_ray.own_raylet()
    assert raylet is not None
    assert ray.get(told.remote()) == (raylet.pid, raylet.pid)


def test_drivers_are_told_by_their_node(cluster: None) -> None:
    """This process is a driver on its own node, and on no other node."""
    assert os.getpid() in compat_ray.drivers_on(ray.get_runtime_context().get_node_id())
    assert compat_ray.drivers_on("00") == []


def test_actors_without_room_are_told(cluster: None) -> None:
    """An actor that runs has a process; an actor that waits for resources has none."""

    @ray.remote
    class Idle:
        def told(self) -> int:
            return os.getpid()

    placed = Idle.options(num_cpus=0.1).remote()
    ray.get(placed.told.remote())
    waiting = Idle.options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    assert (compat_ray.has_process(placed), compat_ray.has_process(waiting)) == (True, False)


def test_held_objects_are_told(cluster: None) -> None:
    """An object is held while this process refers to it, and the check itself does not change the object's lifetime."""
    ref = ray.put(np.zeros(1_000_000, np.uint8))
    key = ref.binary()
    for _ in range(3):
        assert compat_ray.are_held([key, b"\1" * len(key)]) == [True, False]
    assert ray.get(ray.remote(lambda array: len(array)).remote(ref)) == 1_000_000
    del ref
    assert wait_until(lambda: compat_ray.are_held([key]) == [False], 20)


# torch:


def test_versions_count_writes() -> None:
    """In-place writes count, also through views and detached tensors, but not through `.data` or for inference tensors."""
    tensor = torch.zeros(4)
    view, detached, data = tensor[1:], tensor.detach(), tensor.data
    assert list(map(compat_torch.version_of, (tensor, view, detached, data))) == [0, 0, 0, 0]
    view.add_(1)
    detached.add_(1)
    assert list(map(compat_torch.version_of, (tensor, view, detached, data))) == [2, 2, 2, 0]
    data.add_(1)
    assert (compat_torch.version_of(tensor), compat_torch.version_of(data)) == (2, 1)
    with torch.inference_mode():
        uncounted = torch.zeros(4)
    with pytest.raises(RuntimeError, match="version counter"):
        compat_torch.version_of(uncounted)


def test_views_know_their_base() -> None:
    """A view, and a view of a view, refer to the original tensor; other tensors have no base."""
    tensor = torch.zeros(4)
    assert compat_torch.base_of(tensor) is None
    assert compat_torch.base_of(tensor[1:][1:]) is tensor


@pytest.mark.parametrize("requires_grad", [True, False])
def test_leaves_of_a_class(requires_grad: bool) -> None:
    """A leaf of any class can be made over a view; it shares the view's memory and version, and is not a view itself."""

    class Special(nn.Parameter): ...

    tensor = torch.zeros(4)
    for cls in (torch.Tensor, nn.Parameter, Special):
        leaf = compat_torch.leaf_of_class(cls, tensor[1:], requires_grad)
        assert (type(leaf), leaf.requires_grad, leaf.is_leaf, leaf._is_view()) == (cls, requires_grad, True, False)
        assert leaf.data_ptr() == tensor.data_ptr() + 4
        before = compat_torch.version_of(leaf)
        tensor.add_(1)
        assert compat_torch.version_of(leaf) == before + 1


def test_negated_views() -> None:
    """A negated view shows its memory with the opposite sign, and `is_neg` is true."""
    tensor = torch.ones(2)
    view = compat_torch.negated_view(tensor)
    assert view.tolist() == [-1, -1]
    assert view.is_neg()
    assert view.data_ptr() == tensor.data_ptr()
    assert torch.complex(tensor, tensor).conj().imag.is_neg()


def test_mkldnn_has_a_layout() -> None:
    """Only MKLDNN tensors have this layout."""
    assert torch.ones(2, 2).to_mkldnn().layout is compat_torch.MKLDNN
    assert torch.ones(2, 2).layout is not compat_torch.MKLDNN


def test_storages_have_numbers() -> None:
    """Views of one storage have the id of that storage; assigning `.data` changes the storage."""
    tensor, other = torch.zeros(4), torch.zeros(4)
    assert compat_torch.storage_id(tensor) == compat_torch.storage_id(tensor[1:])
    assert compat_torch.storage_id(tensor) == compat_torch.id_of_storage(tensor.untyped_storage())
    assert compat_torch.storage_id(tensor) != compat_torch.storage_id(other)
    tensor.data = other
    assert compat_torch.storage_id(tensor) == compat_torch.storage_id(other)


def test_uses_of_a_storage_are_counted() -> None:
    """The count includes each tensor, also a hidden one under a NumPy array, and the Python object of the storage."""
    tensor = torch.zeros(4)
    storage = tensor.untyped_storage()

    def count() -> int:
        return compat_torch.storage_use_count(compat_torch.id_of_storage(storage))

    assert count() == 2
    view = tensor[1:]
    assert count() == 3
    array = view.numpy()
    del view
    assert count() == 3
    del array
    assert count() == 2


def test_numbers_of_storages_can_be_held() -> None:
    """While the id of a freed storage is held, no other storage gets this id; its memory is freed at once."""
    memory = np.zeros(10)
    is_alive = weakref.ref(memory)
    tensor = torch.from_numpy(memory)
    del memory
    number = compat_torch.storage_id(tensor)
    (held,) = compat_torch.hold_storage_ids([tensor])
    assert held == number
    assert is_alive() is not None
    del tensor
    assert is_alive() is None
    others = [torch.zeros(1) for _ in range(1000)]
    assert number not in map(compat_torch.storage_id, others)
    compat_torch.release_storage_id(held)


def test_registered_hooks_are_counted() -> None:
    """The number grows with each hook, of any kind and on any module."""
    before = compat_torch.hooks_registered()
    module = nn.Linear(2, 2)
    assert compat_torch.hooks_registered() == before
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_state_dict_pre_hook(lambda *_: None)
    assert compat_torch.hooks_registered() >= before + 3


def test_parametrizations_can_be_made_again() -> None:
    """A module with parametrizations has its own class, which can be rebuilt from the members of the module."""

    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    module = nn.Linear(2, 2)
    parametrize.register_parametrization(module, "weight", Double())
    assert compat_torch.is_parametrized_class(type(module))
    assert not compat_torch.is_parametrized_class(nn.Linear)
    assert type(module).__bases__ == (nn.Linear,)
    twin: Any = nn.Linear.__new__(nn.Linear)
    vars(twin).update(vars(module))
    compat_torch.parametrize_again(twin, twin._modules["parametrizations"])
    assert compat_torch.is_parametrized_class(type(twin))
    assert torch.equal(twin.weight, 2 * module.parametrizations.weight.original)


QUANTIZED = {
    "by tensor": lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.quint8),
    "by channel": lambda: torch.quantize_per_channel(
        torch.ones(2, 2), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    ),
}


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:torch.quantize_per_tensor")  # torch warns about its own code
@pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_tensors_are_rebuilt_over_memory(make: Callable[[], torch.Tensor]) -> None:
    """A quantized tensor can be rebuilt over a given storage, with its quantizer."""
    tensor = make()
    if tensor.qscheme() is torch.per_tensor_affine:
        quantizer: tuple[Any, ...] = tensor.qscheme(), tensor.q_scale(), tensor.q_zero_point()
    else:
        channels = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()
        quantizer = tensor.qscheme(), *channels
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    rebuilt = compat_torch.rebuild_quantized(tensor.untyped_storage(), tensor.dtype, *place, quantizer, False)
    assert torch.equal(rebuilt.dequantize(), tensor.dequantize())
    assert rebuilt.data_ptr() == tensor.data_ptr()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((2,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + torch.tensor([10.0, 20.0])


def test_tensors_of_exported_programs() -> None:
    """A program runs on the tensors in its dicts; a shallow copy can get other tensors without a change of the original."""
    program = torch.export.export(Scaled(), (torch.ones(1, 2),))
    expected = program.module()(torch.ones(1, 2))
    state, constants = compat_torch.tensors_of_exported(program)
    assert state is program.state_dict
    assert constants is program.constants
    assert set(state) == {"linear.weight", "linear.bias", "scale"}
    assert len(constants) == 1
    twin = copy.copy(program)
    compat_torch.set_tensors_of_exported(
        twin, {**state, "scale": torch.zeros(2)}, {name: torch.zeros(2) for name in constants}
    )
    assert twin.module()(torch.ones(1, 2)).tolist() == [[0, 0]]
    assert torch.equal(program.module()(torch.ones(1, 2)), expected)
    state["scale"] = torch.zeros(2)
    assert program.module()(torch.ones(1, 2)).tolist() == [[10, 20]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns about TorchScript
def test_compiled_modules_tell_their_parts() -> None:
    """A compiled module lists its tensors and submodules, runs on assigned `.data`, and a copy can get other tensors."""
    program = torch.jit.script(Scaled().eval())
    module = compat_torch.compiled_module(program)
    assert {"scale", "training"} <= set(compat_torch.attribute_names(module))
    assert "linear" not in compat_torch.attribute_names(module)
    assert compat_torch.attribute_names(module) == sorted(compat_torch.attribute_names(module))
    ((name, linear),) = compat_torch.submodules(module)
    assert name == "linear"
    assert {"weight", "bias"} <= set(compat_torch.attribute_names(linear))
    linear.getattr("weight").data = torch.zeros(2, 2)
    linear.getattr("bias").data = torch.ones(2)
    assert program(torch.ones(1, 2)).tolist() == [[13, 23]]
    twin = copy.copy(module)
    twin.setattr("scale", torch.zeros(2))
    assert program(torch.ones(1, 2)).tolist() == [[13, 23]]
    assert torch.jit.load(io.BytesIO(twin.save_to_buffer()))(torch.ones(1, 2)).tolist() == [[10, 20]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_code_holds_constants() -> None:
    """The weights of a frozen program are constants in its code, and the program runs on assigned `.data` of them."""
    frozen = torch.jit.freeze(torch.jit.script(Scaled().eval()))
    module = compat_torch.compiled_module(frozen)
    tensors = [value for value in compat_torch.constants_in_code(module) if isinstance(value, torch.Tensor)]
    (weight,) = (tensor for tensor in tensors if tensor.shape == (2, 2))
    weight.data = torch.zeros(2, 2)
    assert torch.equal(frozen(torch.ones(1, 2)), frozen(torch.zeros(1, 2)))


# Linux:

PAGE = mmap.PAGESIZE


@pytest.fixture
def file() -> Iterator[int]:
    """The descriptor of an unnamed file in memory with 256 pages, like the file of the store."""
    descriptor = os.memfd_create("zerocopy-test")
    os.write(descriptor, b"7" * 256 * PAGE)
    yield descriptor
    os.close(descriptor)


def address_of(memory: mmap.mmap) -> int:
    return addresses([memory])[0]


def test_mappings_tell_their_files(file: int) -> None:
    """A mapping has its addresses, the file's device and inode, the offset in the file, and whether writes reach the file."""
    status = os.fstat(file)
    for flag, letter in ((mmap.MAP_SHARED, "s"), (mmap.MAP_PRIVATE, "p")):
        with mmap.mmap(file, 4 * PAGE, flags=flag, offset=2 * PAGE) as memory:
            start = address_of(memory)
            (found,) = (mapping for mapping in linux.mappings() if mapping.start <= start < mapping.end)
            assert found.file_offset + start - found.start == 2 * PAGE
            assert found.end >= start + 4 * PAGE
            assert (found.device, found.inode) == (status.st_dev, status.st_ino)
            assert found.mode == f"rw-{letter}"
            assert found.path == "/memfd:zerocopy-test (deleted)"
            assert (found in list(linux.shared_files())) == (letter == "s")


def test_anonymous_memory_has_no_file() -> None:
    """Private memory without a file has the inode 0, and is not among the shared files."""
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = address_of(memory)
        (found,) = (mapping for mapping in linux.mappings() if mapping.start <= start < mapping.end)
        assert (found.inode, found.path) == (0, "")
    assert all(mapping.inode for mapping in linux.shared_files())


def test_a_system_without_mappings_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux there is no reason against mappings; on another system the reason is given."""
    assert linux.why_no_mappings() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert linux.why_no_mappings() == "darwin has no /proc"


def usage_around(address: int) -> linux.Usage:
    (found,) = (
        usage for mapping, usage in linux.usage(os.getpid()) if mapping.start <= address < mapping.end and mapping.inode
    )
    return found


def test_usage_of_mappings(file: int) -> None:
    """Touched pages of a file are resident and shared among its mappings; pages written in a private mapping are anonymous."""
    with mmap.mmap(file, 256 * PAGE, flags=mmap.MAP_SHARED) as memory:
        assert memory[:] == b"7" * 256 * PAGE
        memory[:] = b"8" * 256 * PAGE
        assert usage_around(address_of(memory)) == (256 * PAGE, 256 * PAGE, 0)
        with mmap.mmap(file, 256 * PAGE, flags=mmap.MAP_PRIVATE) as private:
            assert private[:] == memory[:]
            assert usage_around(address_of(private)) == (256 * PAGE, 128 * PAGE, 0)
            private[: 64 * PAGE] = b"9" * 64 * PAGE
            assert usage_around(address_of(private)) == (256 * PAGE, (192 // 2 + 64) * PAGE, 64 * PAGE)
        assert memory[0] == ord("8")


def test_usage_is_that_of_psutil() -> None:
    """The shares of all mappings sum up to psutil's value, and their anonymous memory to the kernel's total."""
    used = [usage for _, usage in linux.usage(os.getpid())]
    assert sum(usage.share for usage in used) == pytest.approx(psutil.Process().memory_full_info().pss, rel=0.05)
    assert sum(usage.anonymous for usage in used) == pytest.approx(linux.anonymous_bytes(os.getpid()), rel=0.05)


def test_anonymous_memory_grows_when_written() -> None:
    """Anonymous memory counts when it is written, not when it is allocated."""
    page = b"1" * PAGE
    with mmap.mmap(-1, 50_000 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        before = linux.anonymous_bytes(os.getpid())
        for start in range(0, len(memory), PAGE):
            memory[start : start + PAGE] = page
        after = linux.anonymous_bytes(os.getpid())
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(50_000 * PAGE, rel=0.2)  # Ray's threads also allocate some memory


def test_processes_that_have_ended() -> None:
    """A process that has ended has no usage and no open files, before and after it was waited for."""
    ended = os.spawnv(os.P_NOWAIT, "/bin/true", ["true"])
    assert wait_until(lambda: psutil.Process(ended).status() == psutil.STATUS_ZOMBIE)
    assert linux.usage(ended) == []
    assert list(linux.open_files(ended)) == []
    os.waitpid(ended, 0)
    for ask in (linux.usage, linux.anonymous_bytes):
        with pytest.raises(OSError, match=str(ended)):
            ask(ended)
    assert list(linux.open_files(ended)) == []


def own_pages(memory: mmap.mmap) -> tuple[list[tuple[int, int]], ...]:
    """Ranges of private pages, as page numbers: from the public function, and from each of its two implementations."""
    start, end = address_of(memory), address_of(memory) + len(memory)
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        ways = (linux._scanned, linux._read)
        found = [linux.own_pages(start, end), *(list(way(pagemap.fileno(), start, end)) for way in ways)]
    return tuple([((first - start) // PAGE, (last - start) // PAGE) for first, last in ranges] for ranges in found)


def test_written_pages_are_told(file: int) -> None:
    """In a private mapping, written pages are distinguished from pages of the file and from untouched pages."""
    with mmap.mmap(file, 8 * PAGE, flags=mmap.MAP_PRIVATE) as memory:
        assert own_pages(memory) == ([], [], [])
        assert memory[:PAGE] == b"7" * PAGE
        assert own_pages(memory) == ([], [], [])
        memory[3 * PAGE + 5] = 1
        memory[4 * PAGE] = ord("7")
        memory[7 * PAGE] = 1
        assert own_pages(memory) == ([(3, 5), (7, 8)],) * 3


def test_many_written_pages_are_told(file: int) -> None:
    """All written pages are found, also if one call to the kernel or one read cannot return all of them."""
    count = 2 * linux._ENTRIES_READ + 10
    os.ftruncate(file, count * PAGE)
    with mmap.mmap(file, count * PAGE, flags=mmap.MAP_PRIVATE) as memory:
        written = [*range(0, 3 * linux._MOST_RANGES, 2), linux._ENTRIES_READ - 1, linux._ENTRIES_READ, count - 1]
        for page in written:
            memory[page * PAGE] = 1
        for ranges in own_pages(memory):
            assert [page for first, last in ranges for page in range(first, last)] == written


def test_pages_that_may_be_swapped_are_told(file: int) -> None:
    """A written page stays private after the kernel was asked to swap it out, which it does if a swap device exists."""
    with mmap.mmap(file, 4 * PAGE, flags=mmap.MAP_PRIVATE) as memory:
        memory[PAGE] = 1
        memory.madvise(21)  # MADV_PAGEOUT
        assert own_pages(memory) == ([(1, 2)],) * 3


def test_open_files_can_be_opened_again(file: int) -> None:
    """A deleted file that a process has open can be opened again; pipes are not listed. psutil does not list deleted files."""
    paths = list(linux.open_files(os.getpid()))
    (found,) = (path for path in paths if os.path.samestat(Path(path).stat(), os.fstat(file)))
    with Path(found).open("rb") as again:
        assert again.read(3) == b"777"
    assert not any("zerocopy-test" in entry.path for entry in psutil.Process().open_files())
    read, write = os.pipe()
    assert set(linux.open_files(os.getpid())) <= set(paths)
    os.close(read)
    os.close(write)


def test_connections_to_a_socket_are_told(tmp_path: Path) -> None:
    """Only those sockets of this process are found that are connected to the given path."""
    path = str(tmp_path / "socket")
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as one,
        socket.socket(socket.AF_UNIX) as other,
    ):
        server.bind(path)
        server.listen()
        assert list(linux.sockets_to(path)) == []
        one.connect(path)
        other.connect(path)
        assert sorted(linux.sockets_to(path)) == sorted([one.fileno(), other.fileno()])
    assert list(linux.sockets_to(path)) == []


def test_pages_are_populated(file: int) -> None:
    """A populated range of a private mapping keeps its content, written bytes included, when the file changes."""
    with mmap.mmap(file, 4 * PAGE, flags=mmap.MAP_PRIVATE) as memory:
        memory[2 * PAGE] = 1
        start = address_of(memory)
        linux.populate(start, start + 3 * PAGE, PAGE)
        os.pwrite(file, b"8" * 4 * PAGE, 0)
        assert memory[:] == b"7" * 2 * PAGE + b"\1" + b"7" * (PAGE - 1) + b"8" * PAGE


def test_pages_are_populated_without_the_kernel(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a kernel without MADV_POPULATE_WRITE: it refuses the unknown number."""
    monkeypatch.setattr(linux, "_MADV_POPULATE_WRITE", 1 << 20)
    test_pages_are_populated(file)


def test_what_cannot_be_populated_is_refused() -> None:
    """A range that is not mapped is an error."""
    with pytest.raises(OSError, match="private memory"):
        linux.populate(PAGE, 2 * PAGE, PAGE)


def test_memory_is_not_reserved() -> None:
    """A mapping made with this flag has the flag "nr": the kernel does not count it in its overcommit limit."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | linux.MAP_NORESERVE
    with mmap.mmap(-1, PAGE, flags=flags) as memory:
        start = address_of(memory)
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        header = next(line for line in lines if line.startswith(f"{start:08x}-"))
        told = next(line for line in lines if line.startswith("VmFlags:"))
        assert "nr" in told.split(), header
    assert getattr(mmap, "MAP_NORESERVE", linux.MAP_NORESERVE) == linux.MAP_NORESERVE


def test_bytes_are_compared() -> None:
    """Bytes at two addresses are equal if all of them are equal; zero bytes are always equal."""
    one, other = np.arange(100, dtype=np.uint8), np.arange(100, dtype=np.uint8)
    other[99] = 0
    first, second = addresses([one, other])
    assert linux.is_equal(first, second, 99)
    assert not linux.is_equal(first, second, 100)
    assert linux.is_equal(first, second + 5, 0)


def test_freed_memory_is_given_back() -> None:
    """Freed memory between blocks in use returns to the system when the C library is asked for it."""
    blocks = [bytearray(100_000) for _ in range(1000)]
    kept = blocks[1::2]
    del blocks
    before = psutil.Process().memory_info().rss
    linux.give_back_heap()
    assert before - psutil.Process().memory_info().rss > 20_000_000
    assert all(len(block) == 100_000 for block in kept)


# CPython:


def test_the_collector_is_paused() -> None:
    """The garbage collector does not run inside the context; with `promote=True` new objects move to the oldest generation."""
    assert gc.isenabled()
    with cpython.collector_paused():
        assert not gc.isenabled()
        with cpython.collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        young = [[]]
    assert gc.isenabled()
    assert any(obj is young for obj in gc.get_objects(generation=0))
    with cpython.collector_paused(promote=True):
        old = [[]]
    assert any(obj is old for obj in gc.get_objects(generation=2))
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        with cpython.collector_paused(promote=True):
            pass
        assert gc.get_freeze_count() == frozen  # what a program has frozen stays so
    finally:
        gc.unfreeze()


def test_references_are_counted() -> None:
    """An object in several containers has the reference count for that many, checked alone or in any kind of sequence."""
    holders: list[list[Any]] = [[object()]]
    for count in (1, 2, 3, 4):
        assert cpython.reference_counts(holders[0]) == [cpython.count_for(count)]
        assert cpython.most_references(holders[0]) == cpython.count_for(count)
        alone = cpython.reference_count(holders[0][0])  # not inside an assertion: pytest keeps references to its parts
        assert alone == cpython.count_for(count)
        assert cpython.reference_counts(tuple(holders[0])) == [cpython.count_for(count + 1)]
        assert cpython.reference_counts({0: holders[0][0]}.values()) == [cpython.count_for(count + 1)]
        holders.append(list(holders[0]))


def test_what_others_hold_is_told() -> None:
    """The objects of a mapping are found that have more than the given number of holders, the mapping included."""
    objects = {name: [] for name in ("one", "two", "three")}
    two, three = [objects["two"]], [[objects["three"]], [objects["three"]]]
    assert cpython.held_by_more_than(1, objects) == {"two", "three"}
    assert cpython.held_by_more_than(2, objects) == {"three"}
    assert cpython.held_by_more_than(3, objects) == set()
    del two, three
    assert cpython.held_by_more_than(1, objects) == set()


def test_members_of_a_module_are_held_by_three() -> None:
    """A module's containers have three holders: its dict, the copied state, and the caller; a further holder adds one."""
    module = nn.Module()
    containers = operator.itemgetter("_parameters", "_modules", "_forward_hooks")
    state = module.__getstate__()
    assert cpython.reference_counts(containers(state)) == 3 * [cpython.count_for(3)]
    alone = cpython.reference_count(state["_modules"])
    assert alone == cpython.count_for(2)
    other = module._modules
    assert cpython.most_references(containers(state)) == cpython.count_for(4)
    del other


@pytest.mark.parametrize("pickler", [pickle.Pickler, ray.cloudpickle.CloudPickler])
def test_a_pickler_remembers_what_it_wrote(pickler: Any) -> None:
    """A pickler's memo keeps alive every object that it may refer to again, also objects that a reducer created."""

    class Reduced:
        def __reduce__(self) -> Any:
            return list, (["only", "for pickling"],)

    inner = [1]
    outer = {"inner": inner}
    writer = pickler(io.BytesIO(), protocol=5)
    writer.dump([outer, Reduced()])
    written = cpython.written_objects(writer)
    assert {id(inner), id(outer)} <= set(map(id, written))
    assert ["only", "for pickling"] in written
    assert not any(type(obj) is int for obj in written)


def test_what_is_immortal_is_never_dropped() -> None:
    """An immortal object is not freed when its last reference is deleted."""
    done = run_python(
        """
from zerocopy._compat.cpython import make_immortal

class Told:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        print("dropped", self.name, flush=True)

mortal, immortal = Told("mortal"), Told("immortal")
make_immortal(immortal)
del mortal, immortal
"""
    )
    assert done.stdout.splitlines() == ["dropped mortal"], done.stderr


def test_threads_that_compute_are_told_from_those_that_wait() -> None:
    """A thread that runs operators may compute, also if its target is an operator itself; a waiting thread does not."""
    done = threading.Event()
    for target in (done.wait, queue.Queue().get):
        threading.Thread(target=target, daemon=True).start()
    assert wait_until(lambda: not cpython.other_threads_may_compute())

    def compute() -> None:
        while not done.is_set():
            torch.ones(300, 300) @ torch.ones(300, 300)

    matrix = torch.ones(3000, 3000)
    for target, args in ((compute, ()), (torch.mm, (matrix, matrix))):
        thread = threading.Thread(target=target, args=args)
        thread.start()
        assert wait_until(cpython.other_threads_may_compute, 5)
        done.set()
        thread.join()
    assert wait_until(lambda: not cpython.other_threads_may_compute())


def test_slots_are_named() -> None:
    """Slots are listed by the names of their attributes, inherited ones included; a class without slots has none."""

    class Above:
        __slots__ = ("__private", "first")

    class Below(Above):
        __slots__ = ("second",)

    assert sorted(cpython.slot_names(Below)) == ["_Above__private", "first", "second"]
    assert cpython.slot_names(Registered) == cpython.slot_names(nn.Linear) == []


class Remade:
    def __init__(self) -> None:
        self.made = True

    def __reduce__(self) -> Any:
        return cpython.new_object, (Remade,)


def test_new_objects_have_an_opcode() -> None:
    """Pickle recognizes the function by its name, writes one opcode for it, and makes the object without its `__init__`."""
    data = pickle.dumps(Remade(), protocol=5)
    assert "NEWOBJ" in [opcode.name for opcode, _, _ in pickletools.genops(data)]
    assert vars(pickle.loads(data)) == {}


def test_inits_of_protocols_are_told() -> None:
    """The generated `__init__` of a Protocol and its subclasses is recognized; a hand-written one is not."""

    class Callable_(Protocol):
        def __call__(self) -> None: ...

    class Below(Callable_): ...

    class Written(Callable_):
        def __init__(self) -> None: ...

    assert cpython.is_init_of_protocol(Callable_.__init__)
    assert cpython.is_init_of_protocol(Below.__init__)
    assert not cpython.is_init_of_protocol(Written.__init__)


def test_the_module_of_a_caller_is_told() -> None:
    """The module of the calling code is found: a call of a class adds no frame, a function of the standard library does."""

    class Made:
        def __init__(self) -> None:
            self.by = cpython.module_of_caller(1)

    class Copied:
        def __deepcopy__(self, memo: object) -> str:
            return cpython.module_of_caller(1)

    assert Made().by == __name__
    assert copy.deepcopy(Copied()) == "copy"


# Notes:


def test_notes_are_read_by_others_and_end_with_their_process() -> None:
    """Notes are read in order and replaced as a whole; a child has its parent's notes, and the parent never gets the child's."""
    own = notes.Notes()

    def told(pid: int) -> list[str]:
        words = ("first", "second", "third", "fourth", "of the child")
        return [line for line in notes.notes_of(pid) if line in words]  # this process also has other notes

    own.add(["first", "second"])
    own.add(["third"])
    assert told(os.getpid()) == ["first", "second", "third"]
    own.replace(["fourth"])
    assert told(os.getpid()) == ["fourth"]
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        own.add(["of the child"])
        os.write(ready[1], b"1")
        os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    of_child = told(child)
    os.write(go_on[1], b"1")
    os.waitpid(child, 0)
    assert of_child == ["fourth", "of the child"]
    assert told(os.getpid()) == ["fourth"]
    assert notes.notes_of(child) == []


# The fence:

PACKAGE = Path(zerocopy.__file__).parent

# These must not appear outside `_compat`, also not in comments and docstrings.
FORBIDDEN = re.compile(
    r"""
      \b(ray|torch|copyreg)\._(?!_version__) | /proc | CDLL
    | cloudpickle\.CloudPickler | CloudPickler\.dispatch | \.memo\b | (?<!nn\.)ModuleDict | /plasma | owner\ is\ unknown
    | \b( global_worker | core_worker | gcs_client | get_serialization_context | list_registry_pickle_by_value
        | __ray_actor_class__ | ConcreteModuleType | findAllNodes | RemovableHandle | next_id | getrefcount | __newobj__
        | malloc_trim | memcmp | _getframe | _no_init_or_replace_init )\b
    """,
    re.VERBOSE,
)

# Private names of torch, listed because some names of the package look like them.
OF_TORCH = {
    "_C", "_base", "_c", "_cdata", "_constants", "_free_weak_ref", "_get_method", "_inject_new_class", "_inject_property",
    "_make_subclass", "_method_names", "_mkldnn", "_neg_view", "_rebuild_qtensor", "_state_dict", "_storage_Use_Count",
    "_storage_id", "_type", "_utils", "_version", "_weak_ref",
}  # fmt: skip

# Members of modules that are used everywhere, see `_compat/torch.py`; a documented method of named tuples; a name of attrs.
ALLOWED = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_make", "_default"}


def files_outside() -> list[Path]:
    """All files of the package outside `_compat`."""
    return [path for path in PACKAGE.rglob("*.py") if not {"_compat", "bench"} & set(path.parts)]


def private_attributes(tree: ast.AST, context: type) -> set[str]:
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, context))
    return {node.attr for node in found if node.attr.startswith("_") and not node.attr.endswith("__")}


def own_names(tree: ast.AST) -> set[str]:
    """Names of the functions, classes, variables and attributes that a file defines."""
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return defined | assigned | private_attributes(tree, ast.Store)


def test_nothing_private_stands_outside() -> None:
    """Only `_compat` uses private names of Ray, torch, Linux and CPython, also in strings."""
    trees = {path: ast.parse(path.read_text()) for path in files_outside()}
    known = set().union(*map(own_names, trees.values())) - OF_TORCH | ALLOWED
    for path, tree in trees.items():
        assert not [line for line in path.read_text().splitlines() if FORBIDDEN.search(line)], path
        assert not private_attributes(tree, ast.Load) - known, path
        assert not private_attributes(tree, ast.Store) & OF_TORCH, path
        assert not {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} & OF_TORCH, path


def test_the_fence_stands_alone() -> None:
    """`_compat` imports nothing from the rest of the package."""
    for path in (PACKAGE / "_compat").glob("*.py"):
        assert not re.search(r"^\s*(from|import) zerocopy", path.read_text(), re.MULTILINE), path
