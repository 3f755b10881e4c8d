"""How does a command show its result: as a table or as JSON, and with bytes in which unit?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from zerocopy._tables import UNITS, bytes_in

F = TypeVar("F", bound=Callable[..., Any])

JSON = "json"


def _use_units(context: click.Context, _: click.Parameter, unit: str | None) -> None:
    context.with_resource(bytes_in(unit))


format_option = click.option(
    "--format",
    "shown_as",
    type=click.Choice(["table", JSON], case_sensitive=False),
    default="table",
    show_default=True,
    help="How to print. JSON is the only output on stdout, and counts plain bytes.",
)
units_option = click.option(
    "--units",
    type=click.Choice(list(UNITS), case_sensitive=False),
    callback=_use_units,
    expose_value=False,
    help="Unit of bytes in tables, decimal (1 KB is 1000 B). Default: the one that fits each number.",
)


def sort_option(*keys: str) -> Callable[[F], F]:
    """The option for the order of the rows of a table."""
    return click.option(
        "--sort-by", type=click.Choice(keys, case_sensitive=False), default=keys[0], show_default=True, help="Order."
    )


def show(shown_as: str, data: Any, text: Callable[[], str]) -> None:
    """Print `data` as JSON, or the text."""
    click.echo(json.dumps(data, indent=2) if shown_as == JSON else text())
