"""Which parts of Ray do the registry and the holders use that Ray does not promise?

They were read in the source of Ray 2.60.0; links show where. This file is pickled by value for the processes of the registry and
the holders, and so imports nothing large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
from ray._private import state, worker
from ray.experimental import internal_kv, locations

_RECORDS = b"zerocopy"


def write_to_control_plane(name: str, record: bytes) -> None:
    """Write to the key-value store of Ray's control plane. It lasts as long as the cluster.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/experimental/internal_kv.py
    """
    internal_kv._internal_kv_put(name, record, namespace=_RECORDS)


def records_in_control_plane() -> dict[str, bytes]:
    """Return all records of this store, by name. In the same file."""
    names = internal_kv._internal_kv_list("", namespace=_RECORDS)
    return {name.decode(): internal_kv._internal_kv_get(name, namespace=_RECORDS) for name in names}


def buffers_of_objects(refs: list[ray.ObjectRef[Any]]) -> list[Any]:
    """Return the bytes of objects in this node's store, not unpickled. The store keeps an object as long as its buffer lives.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py: `Worker.get_objects`

    Raises:
        As `ray.get`.
    """
    connected: Any = worker.global_worker  # not `_worker`: this function travels by value
    found = connected.core_worker.get_objects(refs, -1)
    if any(each.data is None for each in found):  # Ray has stored an error instead
        ray.get(refs)
    return [each.data for each in found]


def ended_jobs() -> set[str]:
    """Ids of the jobs whose driver has ended.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/state.py: `GlobalState.job_table`
    """
    return {job["JobID"] for job in state.state.job_table() if job["IsDead"]}


def have_copies(refs: list[ray.ObjectRef[Any]]) -> list[bool]:
    """Whether each of these objects is in a store, or was written to disk. This process must own all of them.

    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/experimental/locations.py
    """
    found = locations.get_local_object_locations(refs) if refs else {}
    told = [found.get(ref, {}) for ref in refs]
    return [
        bool(location.get("node_ids") or location.get("did_spill")) and not _is_error(ref, location)
        for ref, location in zip(refs, told, strict=True)
    ]


def _is_error(ref: ray.ObjectRef[Any], location: Mapping[str, Any]) -> bool:
    """Whether Ray has replaced an object by an error. It stores one on the owner's node, a second after the last copy was lost.

    Seen with Ray 2.60. An object is read only if this node has the only copy, so that nothing is fetched.
    https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/_private/worker.py: `Worker.get_objects`
    """
    connected: Any = worker.global_worker  # the connection of the registry's process
    if list(location.get("node_ids", ())) != [connected.current_node_id.hex()]:
        return False
    try:
        (value,) = connected.get_objects([ref], timeout=1)[0]
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return isinstance(value, ray.exceptions.RayError)


def nodes_with(refs: list[ray.ObjectRef[Any]]) -> list[set[str]]:
    """Return for each of these objects the ids of the nodes whose stores have it. This process must own all of them.

    It asks Ray as `have_copies` does.
    """
    found = locations.get_local_object_locations(refs) if refs else {}
    return [set(found.get(ref, {}).get("node_ids", ())) for ref in refs]
