"""Why can the weights of a publication not be reached, and what can the user do?"""

from __future__ import annotations

from typing import Any, TypeAlias

import ray
import ray.exceptions

from zerocopy._compat.ray import node_of_owner, owner_node
from zerocopy.errors import LostReason, PublicationLostError

Located: TypeAlias = dict[ray.ObjectRef[Any], dict[str, Any]]  # the result of `ray.experimental.get_object_locations`


def raise_if_lost(error: Exception) -> None:
    """Raise an error that explains the loss, if `error` means that an object is lost.

    Raises:
        PublicationLostError: an object is lost.
    """
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, ray.exceptions.ObjectLostError):
        raise lost(reason_of(cause)) from error


_LOST: dict[LostReason, tuple[str, str]] = {
    "owner ended": (
        "the process that published them ended",
        "publish from a process that lives as long as they are used, such as the driver or a detached actor; or under a name, "
        "which needs no process: zerocopy.publish(pipeline, name=...).",
    ),
    "node lost": (
        "the node of the process that published them, or the last one that held them, is down",
        "publish the pipeline again from a node that is up. Publications with name= and source=, or from "
        "publish_checkpoint() with name=, are restored automatically.",
    ),
    "references dropped": (
        "all references that Ray had counted were closed or dropped",
        "keep the publication open as long as a plain pickle of it is used, or pass it as an argument, which Ray counts.",
    ),
    "not found in time": (
        "Ray found no copy of them within its time limit",
        "see whether the publication was closed, and whether the nodes that used it are up and can be reached.",
    ),
    "connection ended": (
        "they belong to an earlier connection of this process to Ray",
        "publish the pipeline again on this connection.",
    ),
}


def lost(reason: LostReason) -> PublicationLostError:
    """Create the error for a reason."""
    what, hint = _LOST[reason]
    return PublicationLostError(f"The weights of this publication are gone: {what}.", hint=hint, reason=reason)


def reason_of(error: ray.exceptions.ObjectLostError) -> LostReason:
    """Return the reason that an error of Ray means."""
    if isinstance(error, ray.exceptions.OwnerDiedError):
        node = node_of_owner(error)
        return "owner ended" if node is None or node in nodes_up() else "node lost"
    if isinstance(error, (ray.exceptions.ReferenceCountingAssertionError, ray.exceptions.ObjectFreedError)):
        return "references dropped"
    if isinstance(error, ray.exceptions.ObjectFetchTimedOutError):
        return "not found in time"
    return "node lost"  # also if Ray tried to create it again: it cannot, for an object that was put


def nodes_up() -> set[str]:
    """The ids of the nodes that Ray counts as alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def have_no_copy(located: Located | None, refs: list[ray.ObjectRef[Any]]) -> bool:
    """Whether one of these objects has no copy on a running node, and none on disk.

    Args:
        located: the answers of the owners; None if an owner does not answer.
    """
    up = nodes_up()
    if located is None:
        return any(owner_node(ref) not in up for ref in refs)
    return any(
        not told.get("did_spill") and up.isdisjoint(told.get("node_ids", ()))
        for told in map(located.get, refs)
        if told is not None
    )
