"""What the package uses that nobody promises is still so: a new Ray, torch, Linux or Python that changes it fails here."""

from __future__ import annotations

import io
import os
import pickle
import sys
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import ray.cloudpickle
from conftest import run_python

from zerocopy._compat import ray as compat_ray

# Of Ray:


def addresses(buffers: list[Any]) -> list[int]:
    return [np.frombuffer(buffer, np.uint8).__array_interface__["data"][0] for buffer in buffers]


def test_a_driver_and_a_worker_have_different_modes(cluster: None) -> None:
    """The mode of this process is that of a script, the mode where a task runs that of a worker."""

    @ray.remote
    def mode() -> int | None:
        return compat_ray.mode()

    assert compat_ray.mode() == ray.SCRIPT_MODE
    assert ray.get(mode.remote()) == ray.WORKER_MODE


RECONNECTING = """
import ray
from zerocopy._compat import ray as compat_ray

def start():
    ray.init("local", num_cpus=1, object_store_memory=100_000_000, include_dashboard=False, logging_level="ERROR",
             log_to_driver=False)

print(compat_ray.allows_out_of_band())
start()
first, cluster = compat_ray.connection(), compat_ray.cluster_id()
print(compat_ray.connection() is first, compat_ray.cluster_id() == cluster)
ref = ray.put(1)
ray.shutdown()
start()
print(compat_ray.connection() is first, compat_ray.cluster_id() == cluster)
try:
    ray.get(ref, timeout=10)
except ValueError as error:
    print(compat_ray.OWNER_UNKNOWN in str(error))
"""


def test_connections_and_clusters_are_told_apart() -> None:
    """Connection and cluster stay the same until Ray is shut down, and are others afterwards; objects of before have an unknown
    owner. Whether references may be pickled out of band is what the environment said."""
    done = run_python(RECONNECTING, RAY_allow_out_of_band_object_ref_serialization="0")
    assert done.stdout.splitlines() == ["False", "True True", "False False", "True"], done.stderr


def test_workers_are_told_the_same_cluster(cluster: None) -> None:
    """A worker has a connection of its own, to the cluster of the driver."""

    @ray.remote
    def cluster_id() -> str:
        assert compat_ray.connection() is not None
        return compat_ray.cluster_id()

    assert ray.get(cluster_id.remote()) == compat_ray.cluster_id()


def test_references_out_of_band_are_counted(cluster: None) -> None:
    """Pickling a reference outside of Ray's own serialization counts one more, which nothing but dropping it takes away."""
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
    """A reducer is told apart by whether Ray called it, for an argument or a put, or somebody else."""
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
    """A reference that nobody knows is refused with the words by which the package knows it."""
    with pytest.raises(ValueError, match=compat_ray.OWNER_UNKNOWN):
        ray.put([ray.ObjectRef(os.urandom(28))])


def test_buffers_are_aligned(cluster: None) -> None:
    """Ray lays the buffers of an object out in order, large ones at the next multiple of the alignment."""
    sizes = [16, 5000, 2048, 3001, 70_000]
    starts = addresses(ray.get(ray.put([pickle.PickleBuffer(os.urandom(size)) for size in sizes])))
    assert not any(start % compat_ray.BUFFER_ALIGNMENT for start in starts)
    gaps = [following - start - size for start, following, size in zip(starts, starts[1:], sizes, strict=False)]
    assert all(0 <= gap < compat_ray.BUFFER_ALIGNMENT for gap in gaps)


def test_options_are_known_by_name_and_checked() -> None:
    """Ray tells its options by name, and refuses values, some only before `.options()` or only there."""
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
    """Ray derives a class from the one that it is given, and marks it."""

    class Plain: ...

    made: Any = ray.remote(Plain)
    derived = made.__ray_metadata__.modified_class
    assert issubclass(derived, Plain)
    assert compat_ray.is_ray_actor_class(derived)
    assert not compat_ray.is_ray_actor_class(Plain)


class Registered: ...


class BelowRegistered(Registered): ...


def test_a_registered_reducer_is_used_by_ray_alone() -> None:
    """A reducer holds for exactly one class, in Ray's pickle and in subclasses of its pickler, without a connection."""
    compat_ray.register_reducer(Registered, lambda _: (str, ("reduced",)))
    assert pickle.loads(ray.cloudpickle.dumps(Registered())) == "reduced"
    assert type(pickle.loads(pickle.dumps(Registered()))) is Registered
    assert type(pickle.loads(ray.cloudpickle.dumps(BelowRegistered()))) is BelowRegistered


def test_the_pickler_can_be_derived_from() -> None:
    """A pickler derived from Ray's overrides how single objects travel, and leaves functions and classes to it."""

    class Pickler(compat_ray.CloudPickler):
        def reducer_override(self, obj: Any) -> Any:
            return (int, ("7",)) if isinstance(obj, Registered) else super().reducer_override(obj)

    file = io.BytesIO()
    Pickler(file, protocol=5).dump([Registered(), lambda: 5])
    number, function = pickle.loads(file.getvalue())
    assert (number, function()) == (7, 5)


def test_modules_pickled_by_value_are_known() -> None:
    """What a user registers to be pickled by value is told by name, until it is taken back."""
    this = sys.modules[__name__]
    assert not compat_ray.is_pickled_by_value(__name__)
    ray.cloudpickle.register_pickle_by_value(this)
    try:
        assert compat_ray.is_pickled_by_value(__name__)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(this)


def test_processes_of_ray_are_found(cluster: None) -> None:
    """The raylet of this node is found by name, from a worker first of all as its parent; and its workers by their titles."""

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
