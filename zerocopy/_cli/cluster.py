"""How does a command join a running cluster, or start its own cluster?"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
import ray

from zerocopy._cli.failures import Failed
from zerocopy._compat.ray import check_reachable
from zerocopy._store import object_store
from zerocopy._words import first_line
from zerocopy.errors import RayClientError

F = TypeVar("F", bound=Callable[..., Any])

START = "start one with `ray start --head`, or name one with --address HOST:PORT."
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}

address_option = click.option(
    "--address",
    metavar="HOST:PORT",
    default="auto",
    show_default=True,
    envvar="RAY_ADDRESS",
    show_envvar=True,
    help="The cluster to join: by default the one that runs here.",
)


def own_address_option(what: str) -> Callable[[F], F]:
    """The option of commands that start a small cluster of their own if no cluster is named."""
    text = f"The cluster {what}; 'auto' is the one that runs here. Default: a small one is started for it."
    return click.option("--address", metavar="HOST:PORT", envvar="RAY_ADDRESS", show_envvar=True, help=text)


@contextlib.contextmanager
def joined(address: str, **options: Any) -> Iterator[None]:
    """Connect to a cluster as long as the context lasts. An existing connection, made by a module of the user, is kept.

    Raises:
        Failed: no cluster runs there, or it cannot be joined.
        RayClientError: the address is Ray Client's.
    """
    if object_store.is_running():
        object_store.require()
        yield
        return
    if address.startswith("ray://"):
        raise RayClientError(
            "zerocopy cannot work through Ray Client (ray://).", hint="run the command on a node of the cluster."
        )
    _check_reachable(address)
    try:
        _init(address, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise Failed(
            f"The Ray cluster at {address!r} cannot be joined: {first_line(error)} Hint: see whether it runs the same Ray and "
            "Python, and whether it asks for a token (RAY_AUTH_MODE)."
        ) from error
    try:
        object_store.require()
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing listens. Ray would try it for minutes."""
    try:
        check_reachable(address)
    except ValueError as error:
        raise click.BadParameter(
            f"{address!r} is not an address. Hint: write HOST:PORT.", param_hint="--address"
        ) from error
    except OSError as error:  # including ConnectionError
        where = "on this machine" if address == "auto" else f"at {address!r}"
        raise Failed(f"No Ray cluster can be reached {where}. Hint: {START}") from error


@contextlib.contextmanager
def started(nbytes: int, cpus: float | None = None) -> Iterator[None]:
    """Run a cluster on this machine as long as the context lasts, with a store of `nbytes`; or use an existing connection.

    Raises:
        Failed: Ray cannot start one.
    """
    if object_store.is_running():
        yield
        return
    try:
        _init("local", object_store_memory=nbytes, num_cpus=cpus, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise Failed(f"Ray cannot start a cluster here: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined_or_started(address: str | None, nbytes: int, cpus: float | None = None) -> Iterator[None]:
    """Join the cluster at an address, or start a cluster if there is no address."""
    with started(nbytes, cpus) if address is None else joined(address):
        yield


def _init(address: str, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray, about itself
        ray.init(address, **_QUIET, **options)
