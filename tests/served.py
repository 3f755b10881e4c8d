"""Apps that Serve builds from a config. The tests name them in configs; only Serve imports this."""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from versions import Numbered, numbered

import zerocopy
from zerocopy.testing import assert_zero_copy

WIDTH = 1024
OPTIONS: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 1}


class Answers:
    """Asks what a deployment was given, which must be over shared memory. Names with "live" are of handles to follow."""

    def __init__(self, stamp: str, **searches: Any) -> None:
        self.stamp = stamp
        self.searches = searches

    def __call__(self, _: Any) -> dict[str, Any]:
        found = {name: given.current() if "live" in name else given for name, given in self.searches.items()}
        for search in found.values():
            assert_zero_copy(search)
        return {
            "answers": {name: search() for name, search in found.items()},
            "versions": {name: version_of(search) for name, search in found.items()},
            "stamp": self.stamp,
            "pid": os.getpid(),
        }


def version_of(search: Numbered) -> int | None:
    version = zerocopy.version_of(search)
    return None if version is None else version.number


@serve.deployment(**OPTIONS, num_replicas=2)
@zerocopy.actor
class Acting(Answers):
    """What a `@zerocopy.actor` is given arrives loaded, or as a handle where it asks for one."""

    def __init__(
        self,
        stamp: str,
        handle: Numbered,
        instance: Numbered,
        found: Numbered,
        live: zerocopy.Live[Numbered],
        live_handle: zerocopy.Live[Numbered],
    ) -> None:
        super().__init__(stamp, handle=handle, instance=instance, found=found, live=live, live_handle=live_handle)


@serve.deployment(**OPTIONS)
class Plain(Answers):
    """What a plain class is given arrives as it is: an instance loaded, a handle as a handle."""

    def __init__(
        self,
        stamp: str,
        handle: zerocopy.Publication,
        instance: Numbered,
        found: zerocopy.Publication,
        live: zerocopy.Live[Numbered],
        live_handle: zerocopy.Live[Numbered],
    ) -> None:
        super().__init__(
            stamp, handle=handle.load(), instance=instance, found=found.load(), live=live, live_handle=live_handle
        )


def build(args: dict[str, str]) -> Any:
    """An app whose pipeline has a name: it is given in every way."""
    name, search = args["name"], numbered(int(args["number"]), width=WIDTH)
    handle = zerocopy.publish(search, name=name)
    deployment = {"acting": Acting, "plain": Plain}[name]
    return deployment.bind(args["stamp"], handle, search, zerocopy.lookup(name), zerocopy.lookup(name), handle)


def build_unnamed(args: dict[str, str]) -> Any:
    """An app whose pipeline has no name."""
    search = numbered(int(args["number"]))
    return Plain.bind(args["stamp"], search, search, search, search, search)
