"""How does a user manage the names of a cluster from a terminal? With the commands list, publish, remove and alias."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from zerocopy._cli.adopted import publish_adopted
from zerocopy._cli.cluster import address_option, joined
from zerocopy._cli.failures import Failed
from zerocopy._cli.objects import Target, named
from zerocopy._cli.show import format_option, show, sort_option, units_option
from zerocopy._cluster.listing import Publications, Published, publications
from zerocopy._cluster.publish import remove as remove_name
from zerocopy._cluster.publish import set_alias
from zerocopy._tables import format_bytes

_ORDERS: dict[str, Any] = {
    "NAME": lambda one: (one.version.name, one.version.number),
    "BYTES": lambda one: -one.shared_bytes,
    "AGE": lambda one: one.age,
}


@click.command("list")
@address_option
@format_option
@sort_option(*_ORDERS)
@units_option
def list_names(address: str, shown_as: str, sort_by: str) -> None:
    """List the publications that have names.

    The table shows versions, aliases, bytes, nodes, age and source. BYTES puts the largest first, AGE the newest. The
    column `source` says whether a version comes back by itself after a loss.

    \b
    Examples:
      zerocopy list
      zerocopy list --sort-by BYTES --units GB
      zerocopy list --address 10.0.0.1:6379 --format json
    """
    with joined(address):
        found = publications()
    found = Publications(tuple(sorted(found, key=_ORDERS[sort_by])))
    show(shown_as, [_told(one) for one in found], lambda: str(found))


def _told(one: Published) -> dict[str, Any]:
    return {
        "name": one.version.name,
        "version": one.version.number,
        "digest": one.version.digest,
        "aliases": list(one.aliases),
        "class": one.kind,
        "bytes": one.shared_bytes,
        "nodes": list(one.nodes),
        "age_seconds": round(one.age, 3),
        "source": one.source,
    }


@click.command()
@click.argument("target", metavar="MODULE:OBJECT", callback=named)
@click.option("--name", required=True, help="The name that `zerocopy.lookup` finds it by.")
@click.option("--alias", help="An alias that points at this version from now on, as 'latest' does.")
@click.option("--source", is_flag=True, help="Keep the function: it restores the version if its weights are lost.")
@click.option(
    "--keep", type=click.IntRange(0), help="Versions that stay in addition to those with an alias. Default: 2."
)
@click.option("--expect", type=click.IntRange(0), help="Fail unless 'latest' points at this version; 0 for none yet.")
@address_option
@format_option
@units_option
def publish(
    target: Target,
    name: str,
    alias: str | None,
    source: bool,
    keep: int | None,
    expect: int | None,
    address: str,
    shown_as: str,
) -> None:
    """Publish what MODULE:OBJECT makes, under a name.

    The publication outlives this command.

    OBJECT is a function or a class that is called without arguments, or a pipeline or module itself. Workers must be able to
    import its classes. If the name already has this content, its version is used.

    \b
    Examples:
      zerocopy publish my_models:build --name search
      zerocopy publish my_models:build --name search --alias canary --source
    """
    if source and not target.is_maker:
        raise click.UsageError(
            f"--source needs a function that makes the pipeline again, but {target.name!r} is an instance of "
            f"{type(target.value).__name__}."
        )
    pipeline = target.made()
    options = {"name": name, "alias": alias, "keep": keep, "expect": expect, "source": target.value if source else None}
    # Another job starts the process that runs a source later. This process must find the module, too.
    with joined(address, **({"runtime_env": _here()} if source else {})):
        version = publish_adopted(pipeline, **options).version
        found = [one for one in publications() if one.version == version]
    if not found:
        raise Failed(f"Version {version.number} of {name!r} was removed by somebody else right after it was published.")
    (one,) = found
    pointing = f", {', '.join(one.aliases)}" if one.aliases else ""
    text = f"Published {name!r} version {one.version.number} ({one.kind}): {format_bytes(one.shared_bytes)}{pointing}"
    show(shown_as, _told(one), lambda: text)


def _here() -> dict[str, Any]:
    """The environment in which modules of this folder can be imported."""
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": path}}


@click.command()
@click.argument("name")
@click.option("--version", type=int, help="Remove only this version.")
@address_option
@format_option
def remove(name: str, version: int | None, address: str, shown_as: str) -> None:
    """Remove a name, or one of its versions.

    Pipelines that were loaded keep what they use.

    \b
    Examples:
      zerocopy remove search
      zerocopy remove search --version 3
    """
    with joined(address):
        remove_name(name, version=version)
    what = f"{name!r}" if version is None else f"version {version} of {name!r}"
    show(shown_as, {"name": name, "version": version}, lambda: f"Removed {what}.")


@click.command()
@click.argument("name")
@click.argument("alias")
@click.argument("version", type=int)
@address_option
@format_option
def alias(name: str, alias: str, version: int, address: str, shown_as: str) -> None:
    """Let an alias of a name point at a version.

    Use it to roll back, or forward. Everything that follows the alias changes.

    \b
    Examples:
      zerocopy alias search canary 4
      zerocopy alias search latest 3
    """
    with joined(address):
        told = set_alias(name, alias, version=version)
    data = {"name": name, "alias": alias, "version": version, "digest": told.digest}
    show(shown_as, data, lambda: f"{alias!r} of {name!r} points at version {version}.")
