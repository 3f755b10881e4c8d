"""What of Ray does the package use that Ray does not promise. Read in Ray 2.60.0; a link says where.

psutil is asked for what any process may know of others; only what Ray's processes are called is here.
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

# The connection of this process; it has more than its class declares.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py
_worker: Any = worker.global_worker


def mode() -> int | None:
    """What this process is to the cluster: `ray.WORKER_MODE` where it runs tasks or an actor. In the same file: `Worker.mode`."""
    found: int | None = _worker.mode
    return found


def connection() -> object:
    """What is made anew each time that this process connects. In the same file: `Worker.core_worker`."""
    return _worker.core_worker


def available_memory() -> int:
    """Bytes of main memory that this node has left, or this container.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_common/utils.py: `get_system_memory`,
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/utils.py: `get_used_memory`
    """
    return max(int(get_system_memory() - get_used_memory()), 0)


class _Inherited:
    """The connection of the parent, in a forked child: as before, but for what the child must not do."""

    def __init__(self, of_parent: Any) -> None:
        self._of_parent = of_parent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_parent, name)

    def remove_object_ref_reference(self, ref: object) -> None:
        """Called for each reference that is dropped. The parent has it still; and a thread of it may have held the lock."""


def inherit_connection() -> None:
    """Let references that a forked child drops be counted as before in its parent. Called in the child.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/includes/object_ref.pxi: `ObjectRef.__dealloc__`
    """
    if _worker.connected and not isinstance(_worker.core_worker, _Inherited):
        _worker.core_worker = _Inherited(_worker.core_worker)


def is_inherited(found: object) -> bool:
    """Whether a connection is that of the parent of this process."""
    return isinstance(found, _Inherited)


def store_socket() -> str:
    """The path of the socket at which this node's object store waits for processes.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/node.py: `Node.plasma_store_socket_name`
    """
    return str(_worker.node.plasma_store_socket_name)


def keep_while_connected(obj: object) -> None:
    """Keep an object alive until this process disconnects: as long as it has its node, in the same file."""
    weakref.finalize(_worker.node, lambda _: None, obj).atexit = False


def cluster_id() -> str:
    """Tells the cluster that this process is connected to from any other.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/includes/gcs_client.pxi
    """
    return str(_worker.gcs_client.cluster_id.hex())


def host_and_port(address: str) -> tuple[str, int]:
    """Where the control plane of the cluster at an address is; "auto" is the cluster that runs here, as `ray.init` finds it.

    Raises:
        ConnectionError: none runs here.
        ValueError: this is no address.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/services.py: `canonicalize_bootstrap_address`
    """
    host, _, port = str(services.canonicalize_bootstrap_address(address)).rpartition(":")
    return host.strip("[]"), int(port)


def check_reachable(address: str) -> None:
    """Find out whether the control plane of a cluster accepts connections. Ray itself would try for minutes.

    Raises:
        OSError: none runs there, or nobody listens.
        ValueError: this is no address.
    """
    with socket.create_connection(host_and_port(address), REACH_SECONDS):
        pass


def head_node() -> str | None:
    """The id of the node that the control plane runs on; None where Ray does not say.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_common/constants.py: `HEAD_NODE_RESOURCE_NAME`
    """
    heads = (node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD_NODE_RESOURCE_NAME in node["Resources"])
    return next(heads, None)


def free_room() -> int:
    """Bytes of this node's store that no object takes.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/internal_api.py: `get_memory_info_reply`
    """
    node = _worker.node
    stats = internal_api.get_memory_info_reply(state.state, node.node_ip_address, node.node_manager_port).store_stats
    return int(stats.object_store_bytes_avail - stats.object_store_bytes_used)


def drop_reference(ref: ray.ObjectRef[Any]) -> None:
    """Count one reference of this process less: what pickling out of band has added, and nothing else takes away.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_raylet.pyx: `CoreWorker.remove_object_ref_reference`.
    """
    _worker.core_worker.remove_object_ref_reference(ref)


def is_serializing() -> bool:
    """Whether this thread is inside Ray's serialization of an argument, a result or a put.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/serialization.py: `is_in_band_serialization`.
    """
    return bool(_worker.get_serialization_context().is_in_band_serialization())


def allows_out_of_band() -> bool:
    """Whether references may be pickled outside of that: what RAY_allow_out_of_band_object_ref_serialization said at import.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/serialization.py
    """
    return bool(serialization.ALLOW_OUT_OF_BAND_OBJECT_REF_SERIALIZATION)


def ends_with_task() -> bool:
    """Whether this process ends with the task that it runs, which has `max_calls=1`, and with it what this process owns.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/function_manager.py: `FunctionExecutionInfo`
    """
    if mode() != ray.WORKER_MODE or not _worker.actor_id.is_nil():
        return False
    known = list(_worker.function_actor_manager._function_execution_info.values())
    return any(function.max_calls == 1 for function in known)


def is_own(ref: ray.ObjectRef[Any]) -> bool:
    """Whether this process owns an object, which then goes when this process ends.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_raylet.pyx: `CoreWorker.get_owner_address`
    """
    return bool(_owner_of(ref).worker_id == _worker.worker_id)


def owner_node(ref: ray.ObjectRef[Any]) -> str:
    """The id of the node of the process that owns an object. In the same file."""
    return str(_owner_of(ref).node_id.hex())


def _owner_of(ref: ray.ObjectRef[Any]) -> Any:
    owner = common_pb2.Address()  # type: ignore[attr-defined]
    owner.ParseFromString(_worker.core_worker.get_owner_address(ref))
    return owner


def is_async_actor() -> bool:
    """Whether this process is an actor with async methods: there `ray.get` advises its author to use `await`.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py: `get`.
    """
    return hasattr(_worker, "core_worker") and bool(_worker.core_worker.current_actor_is_asyncio())


def get_silently(refs: list[ray.ObjectRef[Any]], seconds: float | None = None) -> list[Any]:
    """As `ray.get`, but without that advice, which is given once in a process: the next `ray.get` of the author's is still told.

    In the same file: `Worker.get_objects`.
    """
    values: list[Any] = _worker.get_objects(refs, timeout=seconds)[0]
    return values


# Of the `ValueError` that getting an object raises of which this process knows neither owner nor place.
# https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/core_worker/core_worker.cc: `GetOwnerAddress`
REACH_SECONDS = 5.0  # in which a head node must accept a connection
OWNER_UNKNOWN = "owner is unknown"


def node_of_owner(error: ray.exceptions.ObjectLostError) -> str | None:
    """The node of the process that owned a lost object, or None where Ray does not say.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/exceptions.py: `OwnerDiedError.__str__`.
    """
    owner = common_pb2.Address()  # type: ignore[attr-defined]
    owner.ParseFromString(error.owner_address or b"")
    node: str = owner.node_id.hex()
    return node or None


# How much of the store the arguments of the tasks that run on a node may take, where this variable says nothing else:
# `max_task_args_memory_fraction`. Ray lets further tasks wait, and says nothing. References inside of arguments do not count.
# https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/common/ray_config_def.h
ARGUMENTS_FRACTION_VARIABLE = "RAY_max_task_args_memory_fraction"
ARGUMENTS_FRACTION = 0.7

# How much of a node's memory Ray gives its store if nobody says so, and the smallest store that it makes, in bytes.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/ray_constants.py
STORE_FRACTION: float = ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
LEAST_STORE: int = ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES

# When Ray begins to kill workers: at which part of the memory, and how often it looks; 0 for never.
# https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/common/ray_config_def.h
MEMORY_THRESHOLD_VARIABLE, MEMORY_THRESHOLD = "RAY_memory_usage_threshold", 0.95
MEMORY_REFRESH_VARIABLE, MEMORY_REFRESH_MS = "RAY_memory_monitor_refresh_ms", 250

# How variables start that let Ray drop messages or wait, for its own tests. In the same file.
TESTING_VARIABLES = "RAY_testing_"

# Each buffer of at least 2048 bytes starts at a multiple of so many in its object: `kMajorBufferAlign`.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/includes/serialization.pxi
BUFFER_ALIGNMENT = 64
SMALL_BUFFER = 2048  # bytes: shorter ones are not aligned so

# The options that Ray knows by name, those with an underscore among them, and what checks their values.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_common/ray_option_utils.py
OPTIONS: Mapping[Kind, Mapping[str, object]] = {
    "actor": ray_option_utils.actor_options,
    "task": ray_option_utils.task_options,
}


def check_values(options: Mapping[str, Any], kind: Kind, *, late: bool) -> None:
    """Let Ray check the values of options. `late` ones are given by `.options()`.

    Raises:
        ValueError, TypeError: Ray refuses one.
    """
    if kind == "actor":
        ray_option_utils.validate_actor_options(dict(options), in_options=late)
    else:
        ray_option_utils.validate_task_options(dict(options), in_options=late)


def is_ray_actor_class(cls: object) -> bool:
    """Whether Ray derived `cls` from a user's class, to make actors of it: it has methods of Ray's own.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/actor.py: `_modify_class`.
    """
    return hasattr(cls, "__ray_actor_class__")


# The pickler of arguments and results; its `reducer_override` knows functions and classes. Not typed.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py
CloudPickler: Any = ray.cloudpickle.CloudPickler


# By it CloudPickler finds what reduces instances of exactly one class: a chain of what `ray.util.register_serializer` wrote,
# and of what `copyreg` has. Ours stands between the two: a user who registers wins, and deregistering brings ours back.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py: `Pickler.dispatch_table`,
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/util/serialization.py
_of_users, *_others = CloudPickler.dispatch_table.maps
_ours: dict[type, Callable[[Any], Any]] = {}
CloudPickler.dispatch_table.maps[:] = [_of_users, _ours, *_others]


def register_reducer(cls: type, reduce: Callable[[Any], Any]) -> None:
    """Let Ray pickle instances of exactly `cls` by `reduce`, in this process. Receivers need no registration."""
    _ours[cls] = reduce


def registered_reducer(cls: type) -> Callable[[Any], Any] | None:
    """What a user registered to reduce instances of exactly `cls`, with Ray or with `copyreg`; None where nobody did.

    What the pickler itself brings is no user's.
    """
    reduce: Callable[[Any], Any] | None = _of_users.get(cls) or copyreg.dispatch_table.get(cls)
    return None if getattr(reduce, "__module__", "") == CloudPickler.__module__ else reduce


def is_pickled_by_value(module: str) -> bool:
    """Whether a user asked for what is in `module` to be pickled by value.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py: `register_pickle_by_value`.
    """
    return module in ray.cloudpickle.list_registry_pickle_by_value()


@contextlib.contextmanager
def pickled_by_value(modules: Iterable[types.ModuleType]) -> Iterator[None]:
    """Let what is in some modules be pickled by value meanwhile."""
    added = [module for module in modules if not is_pickled_by_value(module.__name__)]
    for module in added:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            ray.cloudpickle.unregister_pickle_by_value(module)


def is_id_of_class(text: object) -> bool:
    """Whether this is what cloudpickle calls a class that it pickles by value: a random number.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/cloudpickle/cloudpickle.py: `_get_or_create_tracker_id`.
    """
    return isinstance(text, str) and text in cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID


def is_store_file(path: str) -> bool:
    """Whether a path in a process' memory maps is a file of the object store, be it a fallback allocation.

    https://github.com/ray-project/ray/blob/ray-2.60.0/src/ray/object_manager/plasma/dlmalloc.cc: `create_and_mmap_buffer`.
    """
    return "/plasma" in path


# What Ray's processes are called: `PROCESS_TYPE_RAYLET`, and how every title of a process that runs user code starts.
# https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/ray_constants.py
RAYLET, WORKER_TITLE = "raylet", "ray::"


def raylets() -> Iterator[psutil.Process]:
    """The raylets of this node. First the one that started this process, as they do with workers."""
    parent = psutil.Process().parent()
    if parent is not None and _name_of(parent) == RAYLET:
        yield parent
    yield from (found for found in psutil.process_iter() if found != parent and _name_of(found) == RAYLET)


def workers_of(raylet: psutil.Process) -> Iterator[psutil.Process]:
    """The processes in which a raylet runs user code."""
    try:
        children = raylet.children()
    except psutil.Error:  # it has ended
        return
    yield from (child for child in children if _name_of(child).startswith(WORKER_TITLE))


def own_raylet() -> psutil.Process | None:
    """The raylet of the node that this process is connected to; None where it cannot be seen.

    Its command line names the socket of its store, and no other raylet of this machine has that.
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/services.py: `start_raylet`
    """
    option = f"--store_socket_name={store_socket()}"
    return next((found for found in raylets() if option in _words_of(found)), None)


def option_of(raylet: psutil.Process, option: str) -> str | None:
    """What an option on a raylet's command line says, such as `plasma_directory`; None where it is not told.

    In the same file: `start_raylet`.
    """
    start = f"--{option}="
    return next((word.removeprefix(start) for word in _words_of(raylet) if word.startswith(start)), None)


def drivers_on(node_id: str) -> list[int]:
    """Process ids of the drivers that are connected to a node of this cluster.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/state.py: `GlobalState.job_table`
    """
    table = state.state._connect_and_get_accessor().get_job_table(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True
    )
    jobs = map(gcs_pb2.JobTableData.FromString, table)  # type: ignore[attr-defined]
    return [job.driver_pid for job in jobs if not job.is_dead and job.driver_address.node_id.hex() == node_id]


def has_process(actor: ray.actor.ActorHandle[Any]) -> bool:
    """Whether an actor got the resources that it asks for, and with them a process.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/state.py: `GlobalState._gen_actor_info`
    """
    pid: int = state.actors(actor._actor_id.hex()).get("Pid", 0)
    return pid != 0


def are_held(ids: Iterable[bytes]) -> list[bool]:
    """Whether this process has a reference to each of these objects, and the store of its node has the object.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_raylet.pyx: `CoreWorker.object_exists`. What would tell of
    objects without a reference, `get_if_local`, ends the process where one is missing.
    """
    # Each counts while it lives. With `skip_adding_local_ref` it would be counted down at its end, and never up.
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
