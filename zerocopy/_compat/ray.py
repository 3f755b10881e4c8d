"""Which parts of Ray does the package use that Ray does not promise?

They were read in the source of Ray 2.60.0; links show where. Facts that any process may read about others come from psutil: this
file only knows the names of Ray's processes.
"""

from __future__ import annotations

import contextlib
import copyreg
import socket
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import psutil
import ray
import ray.cloudpickle
import ray.exceptions
from ray._common import ray_option_utils
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._common.utils import get_system_memory
from ray._private import internal_api, ray_constants, serialization, services, state, worker
from ray._private.utils import get_used_memory
from ray.cloudpickle import cloudpickle
from ray.core.generated import common_pb2, gcs_pb2

Kind: TypeAlias = Literal["actor", "task"]

# The connection of this process. It has more attributes than its class declares.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py
_worker: Any = worker.global_worker


def mode() -> int | None:
    """Return the role of this process: `ray.WORKER_MODE` if it runs tasks or an actor. In the same file: `Worker.mode`."""
    found: int | None = _worker.mode
    return found


def connection() -> object:
    """Return an object that is new each time that this process connects. In the same file: `Worker.core_worker`."""
    return _worker.core_worker


def available_memory() -> int:
    """Return the free bytes of main memory of this node or container.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_common/utils.py: `get_system_memory`,
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/utils.py: `get_used_memory`
    """
    return max(int(get_system_memory() - get_used_memory()), 0)


class _Inherited:
    """The connection of the parent, in a forked child. It works as before, except for actions that the child must not take."""

    def __init__(self, of_parent: Any) -> None:
        self._of_parent = of_parent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_parent, name)

    def remove_object_ref_reference(self, ref: object) -> None:
        """Ignore a dropped reference: the parent still has it, and at the fork a thread of the parent may have held the lock."""


def inherit_connection() -> None:
    """Keep the parent's reference counts unchanged when a forked child drops references. Called in the child.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/includes/object_ref.pxi: `ObjectRef.__dealloc__`
    """
    if _worker.connected and not isinstance(_worker.core_worker, _Inherited):
        _worker.core_worker = _Inherited(_worker.core_worker)


def is_inherited(found: object) -> bool:
    """Whether a connection belongs to the parent of this process."""
    return isinstance(found, _Inherited)


def store_socket() -> str:
    """Return the path of the socket of this node's object store.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/node.py: `Node.plasma_store_socket_name`
    """
    return str(_worker.node.plasma_store_socket_name)


def keep_while_connected(obj: object) -> None:
    """Keep an object alive until this process disconnects, which drops `Worker.node`. In the same file."""
    weakref.finalize(_worker.node, lambda _: None, obj).atexit = False


def cluster_id() -> str:
    """Return the id of the cluster that this process is connected to.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/includes/gcs_client.pxi
    """
    return str(_worker.gcs_client.cluster_id.hex())


def host_and_port(address: str) -> tuple[str, int]:
    """Return host and port of a cluster's control plane. "auto" is the cluster of this machine, as `ray.init` finds it.

    Raises:
        ConnectionError: no cluster runs here.
        ValueError: `address` is not an address.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/services.py: `canonicalize_bootstrap_address`
    """
    host, _, port = str(services.canonicalize_bootstrap_address(address)).rpartition(":")
    return host.strip("[]"), int(port)


def check_reachable(address: str) -> None:
    """Check that the control plane of a cluster accepts connections. Ray itself would try for minutes.

    Raises:
        OSError: no cluster runs there, or it does not accept connections.
        ValueError: `address` is not an address.
    """
    with socket.create_connection(host_and_port(address), REACH_SECONDS):
        pass


def head_node() -> str | None:
    """Return the id of the node that the control plane runs on; None if Ray does not report it.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_common/constants.py: `HEAD_NODE_RESOURCE_NAME`
    """
    heads = (node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD_NODE_RESOURCE_NAME in node["Resources"])
    return next(heads, None)


def free_room() -> int:
    """Return the bytes of this node's store that no object uses.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/internal_api.py: `get_memory_info_reply`
    """
    node = _worker.node
    stats = internal_api.get_memory_info_reply(state.state, node.node_ip_address, node.node_manager_port).store_stats
    return int(stats.object_store_bytes_avail - stats.object_store_bytes_used)


def drop_reference(ref: ray.ObjectRef[Any]) -> None:
    """Subtract one from this process' count of a reference: pickling out of band has added one, and Ray never removes it.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_raylet.pyx: `CoreWorker.remove_object_ref_reference`.
    """
    _worker.core_worker.remove_object_ref_reference(ref)


def is_serializing() -> bool:
    """Whether this thread is inside Ray's serialization of an argument, a result or a put.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/serialization.py: `is_in_band_serialization`.
    """
    return bool(_worker.get_serialization_context().is_in_band_serialization())


def allows_out_of_band() -> bool:
    """Whether references may be pickled elsewhere: the value of RAY_allow_out_of_band_object_ref_serialization at import.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/serialization.py
    """
    return bool(serialization.ALLOW_OUT_OF_BAND_OBJECT_REF_SERIALIZATION)


def ends_with_task() -> bool:
    """Whether this process ends with the task that it runs (`max_calls=1`), and with it all objects that this process owns.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/function_manager.py: `FunctionExecutionInfo`
    """
    if mode() != ray.WORKER_MODE or not _worker.actor_id.is_nil():
        return False
    known = list(_worker.function_actor_manager._function_execution_info.values())
    return any(function.max_calls == 1 for function in known)


def is_own(ref: ray.ObjectRef[Any]) -> bool:
    """Whether this process owns an object. Such an object is lost when this process ends.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_raylet.pyx: `CoreWorker.get_owner_address`
    """
    return bool(_owner_of(ref).worker_id == _worker.worker_id)


def owner_node(ref: ray.ObjectRef[Any]) -> str:
    """Return the id of the owner's node of an object. In the same file."""
    return str(_owner_of(ref).node_id.hex())


def _owner_of(ref: ray.ObjectRef[Any]) -> Any:
    owner = common_pb2.Address()  # type: ignore[attr-defined]
    owner.ParseFromString(_worker.core_worker.get_owner_address(ref))
    return owner


def is_async_actor() -> bool:
    """Whether this process is an actor with async methods. There, `ray.get` warns its author to use `await`.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py: `get`.
    """
    return hasattr(_worker, "core_worker") and bool(_worker.core_worker.current_actor_is_asyncio())


def get_silently(refs: list[ray.ObjectRef[Any]], seconds: float | None = None) -> list[Any]:
    """Like `ray.get`, without that warning. Ray warns once per process, so `ray.get` in the author's code still warns.

    In the same file: `Worker.get_objects`.
    """
    values: list[Any] = _worker.get_objects(refs, timeout=seconds)[0]
    return values


def ask_owner_again(ref: ray.ObjectRef[Any]) -> None:
    """Ask the owner of an object again where the object is.

    Ray asks only once, when a reference arrives. If another thread drops the last earlier reference of this process at that
    moment, Ray may delete the answer that belongs to the new reference. Then `ray.get` waits forever.

    https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/core_worker/core_worker.cc: `RemoveLocalReference` deletes after it
    has released its lock, and `RegisterOwnershipInfoAndResolveFuture` asks. _private/serialization.py calls it.
    """
    core = _worker.core_worker
    _, owner, _ = core.serialize_object_ref(ref)
    core.deserialize_and_register_object_ref(ref.binary(), ray.ObjectRef.nil(), owner, b"")


REACH_SECONDS = 5.0  # within which a head node must accept a connection

# Part of the `ValueError` that `ray.get` raises for an object if this process knows neither its owner nor its location.
# https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/core_worker/core_worker.cc: `GetOwnerAddress`
OWNER_UNKNOWN = "owner is unknown"


def node_of_owner(error: ray.exceptions.ObjectLostError) -> str | None:
    """Return the node of the process that owned a lost object, or None if Ray does not report it.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/exceptions.py: `OwnerDiedError.__str__`.
    """
    owner = common_pb2.Address()  # type: ignore[attr-defined]
    owner.ParseFromString(error.owner_address or b"")
    node: str = owner.node_id.hex()
    return node or None


# The part of the store that the arguments of all running tasks of a node may use, unless the variable sets another part:
# `max_task_args_memory_fraction`. Ray lets further tasks wait, without a message. References inside arguments do not count.
# https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/common/ray_config_def.h
ARGUMENTS_FRACTION_VARIABLE = "RAY_max_task_args_memory_fraction"
ARGUMENTS_FRACTION = 0.7

# The default part of a node's memory that Ray gives to its store, and the smallest store that Ray creates, in bytes.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/ray_constants.py
STORE_FRACTION: float = ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
LEAST_STORE: int = ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES

# When Ray begins to kill workers: at which used part of the memory, and the interval of its checks; 0 means no checks.
# https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/common/ray_config_def.h
MEMORY_THRESHOLD_VARIABLE, MEMORY_THRESHOLD = "RAY_memory_usage_threshold", 0.95
MEMORY_REFRESH_VARIABLE, MEMORY_REFRESH_MS = "RAY_memory_monitor_refresh_ms", 250

# The prefix of variables that let Ray drop or delay messages, for its own tests. In the same file.
TESTING_VARIABLES = "RAY_testing_"

# Each buffer of at least 2048 bytes starts at a multiple of this many bytes in its object: `kMajorBufferAlign`.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/includes/serialization.pxi
BUFFER_ALIGNMENT = 64
SMALL_BUFFER = 2048  # bytes. Shorter buffers have another alignment

# The options that Ray knows, by name, also those with an underscore; and the objects that check their values.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_common/ray_option_utils.py
OPTIONS: Mapping[Kind, Mapping[str, object]] = {
    "actor": ray_option_utils.actor_options,
    "task": ray_option_utils.task_options,
}


def check_values(options: Mapping[str, Any], kind: Kind, *, late: bool) -> None:
    """Let Ray check the values of options. With `late`, they are options of `.options()`.

    Raises:
        ValueError, TypeError: Ray refuses one.
    """
    if kind == "actor":
        ray_option_utils.validate_actor_options(dict(options), in_options=late)
    else:
        ray_option_utils.validate_task_options(dict(options), in_options=late)


def is_ray_actor_class(cls: object) -> bool:
    """Whether `cls` is the class that Ray derived from a user's class for actors. Ray has added methods to it.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/actor.py: `_modify_class`.
    """
    return hasattr(cls, "__ray_actor_class__")


# The pickler of arguments and results. Its `reducer_override` handles functions and classes. Not typed.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py
CloudPickler: Any = ray.cloudpickle.CloudPickler


# In this chain of dicts, CloudPickler finds the reducer for instances of exactly one class: first the reducers that
# `ray.util.register_serializer` added, then those of `copyreg`. Our dict is between the two: a user's reducer has priority, and
# after the user has deregistered it, our reducer is used again.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py: `Pickler.dispatch_table`,
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/util/serialization.py
_of_users, *_others = CloudPickler.dispatch_table.maps
_ours: dict[type, Callable[[Any], Any]] = {}
CloudPickler.dispatch_table.maps[:] = [_of_users, _ours, *_others]


def register_reducer(cls: type, reduce: Callable[[Any], Any]) -> None:
    """Let Ray pickle instances of exactly `cls` with `reduce`, in this process. Receivers need no registration."""
    _ours[cls] = reduce


def registered_reducer(cls: type) -> Callable[[Any], Any] | None:
    """Return the reducer that a user registered for instances of exactly `cls`, with Ray or with `copyreg`; or None.

    Reducers of the pickler itself do not count.
    """
    reduce: Callable[[Any], Any] | None = _of_users.get(cls) or copyreg.dispatch_table.get(cls)
    return None if getattr(reduce, "__module__", "") == CloudPickler.__module__ else reduce


def is_pickled_by_value(module: str) -> bool:
    """Whether a user asked Ray to pickle the content of `module` by value.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py: `register_pickle_by_value`.
    """
    return module in ray.cloudpickle.list_registry_pickle_by_value()


@contextlib.contextmanager
def pickled_by_value(modules: Iterable[types.ModuleType]) -> Iterator[None]:
    """Let Ray pickle the content of some modules by value, inside the `with` block."""
    added = [module for module in modules if not is_pickled_by_value(module.__name__)]
    for module in added:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            ray.cloudpickle.unregister_pickle_by_value(module)


def is_id_of_class(text: object) -> bool:
    """Whether this is the random id that cloudpickle gives to a class that it pickles by value.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py: `_get_or_create_tracker_id`.
    """
    return isinstance(text, str) and text in cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID


def is_store_file(path: str) -> bool:
    """Whether a path in a process' memory maps is a file of the object store, also of a fallback allocation.

    https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/object_manager/plasma/dlmalloc.cc: `create_and_mmap_buffer`.
    """
    return "/plasma" in path


# Names of Ray's processes: `PROCESS_TYPE_RAYLET`, and the prefix of the title of each process that runs user code.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/ray_constants.py
RAYLET, WORKER_TITLE = "raylet", "ray::"


def raylets() -> Iterator[psutil.Process]:
    """Yield the raylets of this machine. The raylet that started this process comes first, if this process is a worker."""
    parent = psutil.Process().parent()
    if parent is not None and _name_of(parent) == RAYLET:
        yield parent
    yield from (found for found in psutil.process_iter() if found != parent and _name_of(found) == RAYLET)


def workers_of(raylet: psutil.Process) -> Iterator[psutil.Process]:
    """Yield the processes in which a raylet runs user code."""
    try:
        children = raylet.children()
    except psutil.Error:  # it has ended
        return
    yield from (child for child in children if _name_of(child).startswith(WORKER_TITLE))


def own_raylet() -> psutil.Process | None:
    """Return the raylet of the node that this process is connected to; None if this process cannot see it.

    Its command line contains the socket of its store. No other raylet of this machine has the same socket.
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/services.py: `start_raylet`
    """
    option = f"--store_socket_name={store_socket()}"
    return next((found for found in raylets() if option in _words_of(found)), None)


def option_of(raylet: psutil.Process, option: str) -> str | None:
    """Return the value of an option on a raylet's command line, such as `plasma_directory`; None if it is missing.

    In the same file: `start_raylet`.
    """
    start = f"--{option}="
    return next((word.removeprefix(start) for word in _words_of(raylet) if word.startswith(start)), None)


def drivers_on(node_id: str) -> list[int]:
    """Return the process ids of the drivers that are connected to a node of this cluster.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/state.py: `GlobalState.job_table`
    """
    table = state.state._connect_and_get_accessor().get_job_table(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True
    )
    jobs = map(gcs_pb2.JobTableData.FromString, table)  # type: ignore[attr-defined]
    return [job.driver_pid for job in jobs if not job.is_dead and job.driver_address.node_id.hex() == node_id]


def has_process(actor: ray.actor.ActorHandle[Any]) -> bool:
    """Whether an actor has received its resources, and so has a process.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/state.py: `GlobalState._gen_actor_info`
    """
    pid: int = state.actors(actor._actor_id.hex()).get("Pid", 0)
    return pid != 0


def are_held(ids: Iterable[bytes]) -> list[bool]:
    """Whether this process has a reference to each of these objects, and the store of its node has the object.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_raylet.pyx: `CoreWorker.object_exists`. The other
    function, `get_if_local`, needs no reference, but ends the process if an object is missing.
    """
    # Each ObjectRef counts while it lives. With `skip_adding_local_ref`, its end would lower the count, and nothing raises it.
    refs: list[ray.ObjectRef[Any]] = [ray.ObjectRef(key) for key in ids]
    return [bool(_worker.core_worker.object_exists(ref)) for ref in refs]


def _words_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it has ended
        return []


def _name_of(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:  # it has ended, or belongs to another user
        return ""
