"""Which apps does Serve build from a config? The tests name them in configs, and only Serve imports this module."""

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
    """Calls all pipelines of a deployment, which must be in shared memory. Names with "live" are handles with `current()`."""

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
    """Arguments of a `@zerocopy.actor` arrive loaded, or as a handle if the parameter is annotated as `Live`."""

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
    """Arguments of a plain class arrive unchanged: an instance loaded, a handle as a handle."""

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
    """An app with a named pipeline, passed in every way."""
    name, search = args["name"], numbered(int(args["number"]), width=WIDTH)
    handle = zerocopy.publish(search, name=name)
    deployment = {"acting": Acting, "plain": Plain}[name]
    return deployment.bind(args["stamp"], handle, search, zerocopy.lookup(name), zerocopy.lookup(name), handle)


def build_unnamed(args: dict[str, str]) -> Any:
    """An app with an unnamed pipeline."""
    search = numbered(int(args["number"]))
    return Plain.bind(args["stamp"], search, search, search, search, search)
