"""How does zerocopy use Ray's object store? This file puts and gets objects, and knows the state of the connection to Ray."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import ray
import ray.exceptions
import ray.experimental

from zerocopy._compat.cpython import warn_caller
from zerocopy._compat.ray import (
    ARGUMENTS_FRACTION,
    ARGUMENTS_FRACTION_VARIABLE,
    OWNER_UNKNOWN,
    allows_out_of_band,
    ask_owner_again,
    check_reachable,
    cluster_id,
    connection,
    drop_reference,
    ends_with_task,
    free_room,
    get_silently,
    inherit_connection,
    is_async_actor,
    is_inherited,
    is_serializing,
    mode,
)
from zerocopy._store.lost import Located, have_no_copy, lost, reason_of
from zerocopy.errors import (
    OutOfBandError,
    RayClientError,
    StoreFullError,
    StoreTooSmallError,
    ZeroCopyError,
)

R = TypeVar("R")

OWNER_TIMEOUT_MS = 2000  # an owner that does not answer in this time counts as busy, and so as alive
LOOK_TIMEOUT_MS = 1000  # the same during a wait for objects. After it, the owner's node must be alive instead
HERE_SECONDS = 0.2  # enough for objects that are on this node. During this time, no other thread can get objects
WAIT_SECONDS = 0.25  # of each wait for objects of other nodes. Waits of several threads run one after the other
LOOK_SECONDS = 1.0  # between two checks whether copies exist
OWNER_SECONDS = 0.5  # how long an owner counts as alive after it has answered


os.register_at_fork(after_in_child=inherit_connection)


def is_running() -> bool:
    """Whether this process is connected to a cluster, in any way. A forked child is not: the connection is its parent's."""
    return bool(ray.is_initialized()) and not is_inherited(connection())


def is_client() -> bool:
    """Whether the connection goes through Ray Client, which has no object store on this side."""
    return bool(ray.util.client.ray.is_connected())


def node() -> str:
    """The id of the node that this process is connected to; empty without a connection."""
    return "" if is_client() or not is_running() else str(ray.get_runtime_context().get_node_id())


def require(*, may_start: bool = True) -> None:
    """Connect to Ray if this process has not done so, as Ray's own calls do.

    Args:
        may_start: whether to start Ray if none runs. False for lookups: a new cluster has no publications.

    Raises:
        RayClientError: the connection goes through Ray Client.
        ZeroCopyError: no Ray runs here, and none may be started; or this process was forked from a connected one.
    """
    if not ray.is_initialized():
        if os.environ.get("RAY_ENABLE_AUTO_CONNECT", "") == "0":
            raise ZeroCopyError("Ray is not running in this process.", hint="call ray.init() first.")
        if may_start:
            ray.init()
        else:
            _join()
        _say_that_ray_was_started()
    if not is_running():
        raise ZeroCopyError(
            "This process was forked from one that is connected to Ray, and cannot use the connection of its parent.",
            hint="start it with multiprocessing's 'spawn' method, or let Ray start it.",
        )
    if is_client():
        raise RayClientError(
            "zerocopy cannot work through Ray Client (ray://): it has no object store on this side.",
            hint="run the driver on a node of the cluster, with ray.init(address='auto'), or submit it as a Ray job.",
        )


def _join() -> None:
    try:
        if not os.environ.get("RAY_ADDRESS", "").startswith("ray://"):  # `require` refuses Ray Client
            check_reachable("auto")
        ray.init("auto")
    except (OSError, ValueError) as error:
        raise ZeroCopyError(
            "This process is not connected to Ray, and no Ray cluster runs on this machine that it could join.",
            hint="connect to the cluster first: ray.init(address='HOST:PORT').",
        ) from error


@functools.cache
def _say_that_ray_was_started() -> None:
    """Print one line, once per process. A logger would be silent until the user configures it."""
    place = ray.get_runtime_context().gcs_address
    print(
        f"zerocopy has called ray.init(), because nobody had: Ray runs at {place}. Call ray.init(...) first to choose the "
        "cluster, or the CPUs and the memory of a new one.",
        file=sys.stderr,
    )


def check_running(what: str) -> None:
    """Refuse an action that needs a connection to the cluster.

    Raises:
        ZeroCopyError: Ray is not running in this process.
    """
    if not is_running():
        raise ZeroCopyError(
            f"{what} needs Ray, which is not running in this process.",
            hint="connect to the cluster that holds the weights: ray.init(address='auto').",
        )


def is_worker() -> bool:
    """Whether this process runs Ray tasks or an actor."""
    return mode() == ray.WORKER_MODE


def put(value: object) -> ray.ObjectRef[Any]:
    """Put `value` into the object store of this node.

    If this thread is serializing, the put runs on another thread. Else Ray would count the references inside `value`, and the
    reference to it, as captured out of band, and would never free them.

    Raises:
        StoreFullError: neither the store nor the disk has room.
    """
    try:
        return in_background(lambda: ray.put(value))() if is_serializing() else ray.put(value)
    except NO_ROOM as error:
        raise store_full() from error


NO_ROOM = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


def store_full() -> StoreFullError:
    """Create the error for the user if Ray raises one of `NO_ROOM`."""
    return StoreFullError(
        "The object store of this node is full, and so is the disk to which Ray writes objects that do not fit.",
        hint="release publications that are not needed, free the disk, or raise `object_store_memory`; then publish again.",
    )


def get(ref: ray.ObjectRef[Any]) -> Any:
    """Return the object of `ref`.

    Raises:
        PublicationLostError: it cannot be reached any more. The error has the reason.
    """
    return get_all([ref])[0]


def get_all(refs: list[ray.ObjectRef[Any]]) -> list[Any]:
    """Return the objects of `refs`, in order; see `get`."""
    try:
        try:
            return _get(refs, HERE_SECONDS)
        except ray.exceptions.GetTimeoutError:  # on the way from another node, or lost, but Ray does not know it
            return _get_while_there_are_copies(refs)
    except ray.exceptions.ObjectLostError as error:
        raise lost(reason_of(error)) from error
    except ValueError as error:
        if OWNER_UNKNOWN not in str(error):
            raise
        raise lost("connection ended") from error


def _get(refs: list[ray.ObjectRef[Any]], seconds: float) -> list[Any]:
    # Without Ray's warning in an async actor: its author did not write this call, and the bytes are here or on the way.
    return get_silently(refs, seconds) if is_async_actor() else ray.get(refs, timeout=seconds)


def _get_while_there_are_copies(refs: list[ray.ObjectRef[Any]]) -> list[Any]:
    """Wait for objects, and check now and then whether a copy still exists.

    Ray itself waits forever if the raylet that had the objects is gone, but the process that owns them still answers; and if Ray
    has forgotten an owner's answer, see `ask_owner_again`. A wait by `ray.get` would block other threads: they could not get
    objects of this node meanwhile.
    """
    wanted = list(dict.fromkeys(refs))
    for ref in wanted:
        ask_owner_again(ref)
    missing, next_look = 0, time.monotonic() + LOOK_SECONDS
    while missing < 2:  # twice: a copy that was just created may not be known yet
        _, absent = ray.wait(wanted, num_returns=len(wanted), timeout=WAIT_SECONDS)
        if not absent:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):  # it has been evicted again
                return _get(refs, HERE_SECONDS)
        if time.monotonic() >= next_look:
            missing = missing + 1 if have_no_copy(_located(wanted, LOOK_TIMEOUT_MS), wanted) else 0
            next_look = time.monotonic() + (0 if missing else LOOK_SECONDS)
    raise lost("node lost")


def _located(refs: Collection[ray.ObjectRef[Any]], timeout_ms: int = OWNER_TIMEOUT_MS) -> Located | None:
    """Return the owners' answers about objects, without objects whose owner has ended; None if an owner does not answer."""
    try:
        found: Located = ray.experimental.get_object_locations(list(refs), timeout_ms) if refs else {}
    except ray.exceptions.GetTimeoutError:
        return None
    return found


def put_plainly(value: object) -> ray.ObjectRef[Any]:
    """Put `value` while nothing is serialized. The registry gets this function by value, so it uses nothing of this file."""
    return ray.put(value)


def await_reply(ref: ray.ObjectRef[Any]) -> Any:
    """Return the result of a method of an actor."""
    return get_silently([ref])[0] if is_async_actor() else ray.get(ref)


def with_owner(refs: Collection[ray.ObjectRef[Any]]) -> set[ray.ObjectRef[Any]]:
    """Return those `refs` whose owner is alive. Other nodes cannot fetch the rest, even if this node has the objects."""
    located = _located(refs)
    return set(refs) if located is None else set(located)  # None: an owner is busy


def locations(refs: Collection[ray.ObjectRef[Any]]) -> list[tuple[list[str], int]]:
    """Return the ids of the nodes that have each object, and the object's size in bytes.

    Raises:
        PublicationLostError: the owner of one of them has ended, or does not answer.
    """
    found = _located(refs)
    if found is None:
        raise lost("not found in time")
    if len(found) < len(set(refs)):
        raise lost("owner ended")
    return [(found[ref]["node_ids"], found[ref]["object_size"] or 0) for ref in refs]


class Borrowed:
    """References that other processes may own."""

    def __init__(self, refs: Collection[ray.ObjectRef[Any]]) -> None:
        self._refs = refs
        self._is_known_until = 0.0

    def have_owners(self) -> bool:
        """Whether the owners of all references are alive, or were a moment ago: asking them takes a millisecond."""
        now = time.monotonic()
        if self._refs and now > self._is_known_until:
            if len(with_owner(self._refs)) < len(self._refs):
                return False
            self._is_known_until = now + OWNER_SECONDS
        return True


def in_background(call: Callable[[], R]) -> Callable[[], R]:
    """Start `call` on its own thread. The returned function waits for the result, or raises the error of `call`.

    While the store copies bytes, other threads may run.
    """
    results: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="zerocopy-put")
    thread.start()

    def wait() -> R:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return wait


def check_out_of_band(what: str, is_ours: Callable[[], bool]) -> None:
    """Refuse to pickle references outside of Ray's own pickling, if Ray may not count them or if their objects are lost soon.

    Args:
        is_ours: returns whether this process owns the pickled objects. It is called only if this matters.

    Raises:
        OutOfBandError: this process ends with the task that it runs, such as the task in which Ray Serve builds an app from a
            config; or RAY_allow_out_of_band_object_ref_serialization is 0.
    """
    if is_serializing():
        return
    # Ray itself sets max_calls=1 for tasks with GPUs, and their authors may not know it.
    if ends_with_task() and not assigned_gpu() and is_ours():
        raise OutOfBandError(
            f"{what} was pickled in a task with max_calls=1, but not as an argument of a Ray call. In such a task Ray Serve "
            "builds an app from a config. Its process ends with the task, and so would the weights.",
            hint="give them a name, under which they stay: zerocopy.publish(pipeline, name=...).",
        )
    if not allows_out_of_band():
        raise OutOfBandError(
            f"{what} was captured by a closure, a global or a plain pickle. "
            "RAY_allow_out_of_band_object_ref_serialization=0 allows references to the object store in arguments alone.",
            hint="pass it as an argument, or unset that variable.",
        )


def capacity() -> int | None:
    """Return the bytes of this node's object store, or None if Ray does not report them."""
    return _capacity_of(ray.get_runtime_context().get_node_id())


@functools.lru_cache(8)
def _capacity_of(node_id: str) -> int | None:
    """Cached: it never changes, and Ray takes a millisecond to answer."""
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            size = node["Resources"].get("object_store_memory")
            return None if size is None else int(size)
    return None


def check_room(needed: int, what: str) -> None:
    """Refuse weights that can never fit. Ray itself would accept them, and spill them to disk.

    Raises:
        StoreTooSmallError: `needed` bytes are more than this node's object store has.
    """
    size = capacity()
    if size is not None and needed > size:
        raise StoreTooSmallError(
            f"The weights of {what} take {needed:,} bytes, but the object store of this node has {size:,}.",
            hint="raise it with ray.init(object_store_memory=...) or `ray start --object-store-memory ...`.",
            needed=needed,
            capacity=size,
        )


def arguments_fraction() -> float:
    """Return the part of the store that the arguments of a node's running calls may use. Ray lets further calls wait silently."""
    return float(os.environ.get(ARGUMENTS_FRACTION_VARIABLE, ARGUMENTS_FRACTION))


_warned: set[str] = set()


def warn_of_crowding(shared: int, copied: int, what: str) -> None:
    """Warn if weights leave little of this node's store, or if each handle is so large that calls wait. Each warning comes once.

    Args:
        shared: bytes of the weights. Ray does not count them as arguments of a call, so any number of calls can run at a time.
        copied: bytes of the copied part, which each call carries.
    """
    size = capacity() or math.inf
    fraction = arguments_fraction()
    rule = (
        f"Calls whose own arguments take more than {fraction:.0%} of the object store together wait for each other, which Ray "
        f"does not say; {ARGUMENTS_FRACTION_VARIABLE} sets another limit when the cluster is started"
    )
    if shared > fraction * size:
        _warn_once(
            "shared",
            f"The weights of {what} take {shared:,} of {size:,} bytes of this node's object store. Ray writes other objects that "
            f"do not fit to disk. {rule}; `object_store_memory` makes the store larger.",
        )
    if 2 * copied > fraction * size:
        _warn_once(
            "copied",
            f"Each call with {what} among its arguments carries a copy of {copied:,} bytes. {rule}. To avoid that, put its "
            "large objects into shared() fields.",
        )


def warn_of_little_room(needed: int, what: str) -> None:
    """Warn once if the store must make room first. It cannot evict objects that processes have mapped."""
    free = free_room()
    if needed > free:
        _warn_once(
            "room",
            f"The weights of {what} take {needed:,} bytes more, but the object store of this node has {free:,} free. Ray writes "
            "other objects to disk first, or these weights, which takes seconds for each GB. Release publications that "
            "are not needed, or raise `object_store_memory`.",
        )


def _warn_once(topic: str, text: str) -> None:
    if topic not in _warned:
        _warned.add(topic)
        warn_caller(text)


def assigned_gpu() -> bool:
    """Whether Ray assigned a GPU to the task or actor that runs here."""
    return is_running() and is_worker() and bool(ray.get_gpu_ids())


def session() -> object:
    """Return an object that identifies the connection of this process, or None. References of other connections are not valid."""
    return connection() if is_running() else None


def cluster() -> str:
    """Return the id of the cluster. References of another cluster may have equal ids, but refer to other objects."""
    return cluster_id()


_pins: dict[ray.ObjectRef[Any], int] = {}


def count_pin(ref: ray.ObjectRef[Any]) -> None:
    """Note that `ref` will be pickled now. If this is out of band, Ray pins its object until this process ends."""
    if not is_serializing():
        _pins[ref] = _pins.get(ref, 0) + 1


def unpin(ref: ray.ObjectRef[Any]) -> None:
    """Remove the pins that Ray has added in this process when `ref` was pickled out of band."""
    for _ in range(_pins.pop(ref, 0) if is_running() else 0):
        drop_reference(ref)
