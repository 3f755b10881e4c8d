"""Are the arguments of calls that publish, find or change a name valid? They are checked before the registry is called."""

from __future__ import annotations

import inspect
from typing import Any

import ray
from torch import nn

from zerocopy._cluster.writing import Commit
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._store import object_store
from zerocopy.errors import ArgumentError


def commit_of(
    name: str, source: bytes | None, *, alias: str | None, expect: int | None, keep: int | None, lifetime: str
) -> Commit:
    """Check the arguments of a publish call, and return them as a Commit."""
    check_name(name, "name")
    if alias is not None:
        check_name(alias, "alias")
    if keep is not None and (not isinstance(keep, int) or keep < 0):
        raise ArgumentError(f"keep={keep!r} is not a number of versions.", hint="give 0 or more.")
    if expect is not None and (not isinstance(expect, int) or expect < 0):
        raise ArgumentError(f"expect={expect!r} is not the number of a version.", hint="give 0 for no version yet.")
    if lifetime not in ("cluster", "job"):
        raise ArgumentError(f"lifetime={lifetime!r} is unknown.", hint="use 'cluster' or 'job'.")
    object_store.require()
    job = ray.get_runtime_context().get_job_id() if lifetime == "job" else None
    aliases = [alias] if alias else []
    return Commit(name=name, aliases=aliases, expect=expect, keep=keep, job=job, source=source)


def check_source(source: Any) -> None:
    """Refuse a source that cannot be called without arguments. Else its error would only come after the weights are lost."""
    hint = "give a function without arguments that makes it again."
    if isinstance(source, nn.Module) or is_pipeline_class(type(source)):
        raise ArgumentError(f"source= got a {type(source).__name__}, not a function that makes it.", hint=hint)
    if not callable(source):
        raise ArgumentError(f"source={source!r} cannot be called.", hint=hint)
    try:
        inspect.signature(source).bind()
    except ValueError:  # a function of C may have no signature
        return
    except TypeError as error:
        raise ArgumentError(f"source={source!r} needs arguments: {error}.", hint=hint) from None


def check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not name:
        article = "an" if what == "alias" else "a"
        raise ArgumentError(f"{what}={name!r} is not {article} {what}.", hint="give a string that is not empty.")


def check_number(version: object) -> None:
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise ArgumentError(f"version={version!r} is not the number of a version.", hint="write version=1, say.")


def check_unnamed(alias: object, source: object, expect: object, keep: object, lifetime: str) -> None:
    given = {"alias": alias, "source": source, "expect": expect, "keep": keep}
    used = [argument for argument, value in given.items() if value is not None]
    used += ["lifetime"] if lifetime != "cluster" else []
    if used:
        raise ArgumentError(
            f"{used[0]}= is for publications with a name.", hint="add name=, or leave it out.", argument=used[0]
        )
