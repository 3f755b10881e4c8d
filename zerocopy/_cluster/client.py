"""How does a process call the registry? The registry is created when it is first needed, and again after it was killed."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zerocopy._cluster import claims, names, shards, stored
from zerocopy._cluster import registry as registry_module
from zerocopy._compat import owners
from zerocopy._compat.ray import head_node, is_serializing, pickled_by_value
from zerocopy._nodes import holder
from zerocopy._store import object_store
from zerocopy._words import first_line, nearest
from zerocopy.errors import (
    NotPublishedError,
    PublicationLostError,
    VersionConflictError,
    VersionInUseError,
    ZeroCopyError,
)

# The version of the calls between clients and the registry. Clients with another version use another registry.
PROTOCOL = 1
NAME, NAMESPACE = f"registry-{PROTOCOL}", "zerocopy"
SECONDS = 60.0  # how long a call tries to reach a registry

_lock = threading.Lock()
_known: tuple[object, Any] | None = None  # a session, and the registry's handle in it
# These modules are pickled by value for the registry's process, so that it need not import torch.
_BY_VALUE = (registry_module, claims, names, shards, stored, holder, owners, object_store)


class RegistryLost(Exception):
    """The registry that this process called has ended, or cannot be reached. After its end, its objects are gone."""


class RegistryUnreachable(ZeroCopyError):
    """No registry could be reached within the time limit of a call."""


def ask(method: str, *args: Any, may_be_gone: bool = False) -> Any:
    """Call a method of the registry, and return its result. If the registry has ended, create a new one and call that.

    Args:
        may_be_gone: whether NotPublishedError is accepted after a lost answer: the lost call may have removed the name.

    Raises:
        NotPublishedError, VersionConflictError, VersionInUseError, PublicationLostError: the registry refuses the call.
        ZeroCopyError: no registry can be reached.
    """
    end, pause, lost = time.monotonic() + SECONDS, 0.05, False
    while True:
        actor = registry()
        try:
            return ask_one(actor, method, *args)
        except NotPublishedError:
            if not (lost and may_be_gone):
                raise
            return None
        except RegistryLost as error:
            if time.monotonic() > end:
                raise unreachable(error) from error
            lost = True
            time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 (many processes shall not ask at one moment)
            pause = min(2 * pause, 2.0)


def unreachable(error: RegistryLost) -> RegistryUnreachable:
    """Create the error for the user if no registry can be reached."""
    return RegistryUnreachable(
        f"The registry, the Ray actor that knows all publications with a name, cannot be reached: {first_line(error)}",
        hint="see with `ray status` whether the head node of the cluster is up.",
    )


def ask_one(actor: Any, method: str, *args: Any) -> Any:
    """Call a method of one registry, and return its result.

    Raises:
        RegistryLost: the registry has ended, or cannot be reached.
        As `ask`, except ZeroCopyError.
    """
    if is_serializing():  # Ray's pickler counts references per thread
        return object_store.in_background(lambda: await_reply(actor, submit(actor, method, *args)))()
    return await_reply(actor, submit(actor, method, *args))


def submit(actor: Any, method: str, *args: Any) -> ray.ObjectRef[Any]:
    """Call a method of the registry, without waiting for its result."""
    ref: ray.ObjectRef[Any] = actor.answer.remote(method, *args)
    return ref


def await_reply(actor: Any, ref: ray.ObjectRef[Any]) -> Any:
    """Wait for the result of a call of `submit`; see `ask_one`."""
    return answer(actor, lambda: object_store.await_reply(ref))


def reply_within(actor: Any, timeout: float, method: str, *args: Any) -> Any:
    """Call a method of one registry, and return its result if it comes in time.

    Args:
        timeout: seconds.

    Raises:
        TimeoutError: the registry did not answer in time.
        As `ask_one`.
    """
    reply = submit(actor, method, *args).future()
    return answer(actor, lambda: reply.result(timeout))


def answer(actor: Any, get: Callable[[], tuple[str, Any]]) -> Any:
    """Return the result in a reply, which `get` returns; see `ask_one`."""
    try:
        word, result = get()
    except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError) as error:
        _forget(actor)
        raise RegistryLost(str(error)) from error
    if word != "done":
        raise _REFUSALS[word](**result)
    return result


def registry() -> Any:
    """Return the registry actor of this session. Joins a running cluster, but starts none: publishers connect earlier."""
    object_store.require(may_start=False)
    return _registry()


def existing_registry() -> Any:
    """Return the registry actor of this session, or None if it does not exist."""
    if _known is not None and _known[0] is object_store.session():
        return _known[1]
    try:
        return ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        return None


def _registry() -> Any:
    global _known  # noqa: PLW0603
    session = object_store.session()
    with _lock:
        if _known is None or _known[0] is not session:
            _known = session, _found_or_made()
        return _known[1]


def _forget(actor: Any) -> None:
    global _known  # noqa: PLW0603
    with _lock:
        if _known is not None and _known[1] is actor:
            _known = None


def _found_or_made() -> Any:
    with contextlib.suppress(ValueError):  # it does not exist
        return ray.get_actor(NAME, NAMESPACE)
    with pickled_by_value(_BY_VALUE):
        head = head_node()
        return (
            ray.remote(registry_module.Registry)
            .options(
                name=NAME,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=0,  # when memory is short, Ray kills restartable actors first
                max_concurrency=100_000,  # so many processes can wait for changes at the same time
                enable_task_events=False,
                scheduling_strategy=None if head is None else NodeAffinitySchedulingStrategy(head, soft=True),
            )
            .remote()
        )


def _unknown_name(name: str = "", names: list[str] | None = None) -> Exception:
    listed = ", ".join(map(repr, names or []))
    there = f"The names here are {listed}." if listed else "There is no name here yet: is this the right cluster?"
    return NotPublishedError(
        f"No publication has the name {name!r} in this cluster.",
        hint=nearest(name, names or [], f"publish it with zerocopy.publish(..., name={name!r}). {there}"),
        name=name,
        versions=[],
    )


def _unknown_version(name: str, which: int | str, versions: list[int], aliases: dict[str, int]) -> Exception:
    what = f"alias {which!r}" if isinstance(which, str) else f"version {which}"
    there = ", ".join(f"{number}{_aliases_of(number, aliases)}" for number in versions)
    return NotPublishedError(
        f"{name!r} has no {what}.", hint=f"its versions are {there}.", name=name, versions=versions
    )


def _aliases_of(number: int, aliases: dict[str, int]) -> str:
    names = ", ".join(sorted(alias for alias, pointed_at in aliases.items() if pointed_at == number))
    return f" ({names})" if names else ""


def _other_version(name: str, expected: int, found: int) -> Exception:
    wanted, there = (f"version {number}" if number else "no version" for number in (expected, found))
    return VersionConflictError(
        f"{name!r} has {there} as 'latest', but expect={expected} asks for {wanted}. Nothing was published.",
        hint=f"look at what others have published or removed, and publish again with expect={found}.",
        name=name,
        expected=expected,
        found=found,
    )


def _aliased(name: str, number: int, aliases: list[str], versions: list[int]) -> Exception:
    pointing = " and ".join(map(repr, aliases))
    return VersionInUseError(
        f"Version {number} of {name!r} cannot be removed: {pointing} {'points' if len(aliases) == 1 else 'point'} at it.",
        hint=f"first point at another version with zerocopy.set_alias({name!r}, {aliases[0]!r}, version=...), or remove the "
        f"whole name. Its versions are {', '.join(map(str, versions))}.",
        name=name,
        aliases=aliases,
    )


def _lost(name: str, number: int, reason: str) -> Exception:
    return PublicationLostError(
        f"The weights of version {number} of {name!r} are gone: {reason}.",
        hint="publish it again. Versions with a source=, or from publish_checkpoint(), are restored automatically.",
        reason="no source",
    )


_REFUSALS: dict[str, Any] = {
    "unknown name": _unknown_name,
    "unknown version": _unknown_version,
    "other version": _other_version,
    "aliased": _aliased,
    "lost": _lost,
}
