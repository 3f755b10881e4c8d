"""How are records printed? As a table on a terminal, as HTML in a notebook, and with units for bytes."""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

_unit: ContextVar[str | None] = ContextVar("unit", default=None)


@contextlib.contextmanager
def bytes_in(unit: str | None) -> Iterator[None]:
    """Show all bytes in one of `UNITS` as long as the context lasts; with None, in the unit that fits each number."""
    token = _unit.set(unit)
    try:
        yield
    finally:
        _unit.reset(token)


def format_bytes(count: int) -> str:
    """`count` bytes in the largest decimal unit that leaves a number of at least one, unless `bytes_in` names a unit."""
    if count < 0:
        return f"-{format_bytes(-count)}"
    if (unit := _unit.get()) is not None:
        return f"{count:,} B" if unit == "B" else f"{count / UNITS[unit]:,.3f} {unit}"
    # Rich is imported where it is used: it would double the time that importing zerocopy takes.
    from rich.filesize import decimal

    return decimal(count)


def as_text(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str], title: str = "", caption: str = ""
) -> str:
    """A table for a terminal; the columns named in `right` hold numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title or None, caption=caption or None)
    table.title_justify = table.caption_justify = "left"
    numbers = set(right)
    for header in headers:
        table.add_column(header, justify="right" if header in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    target = io.StringIO()
    Console(
        file=target, width=130, force_jupyter=False, force_terminal=False, highlight=False, markup=False, emoji=False
    ).print(table)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()).strip("\n")


def as_html(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    caption: str = "",
    row_class: str = "",
) -> str:
    """The same table for a notebook. Rows may have a class, which a style sheet can use.

    Each cell sets its alignment, because notebooks have different defaults.
    """
    start = f'<tr class="{html.escape(row_class)}">' if row_class else "<tr>"
    numbers = set(right)
    styles = [_NUMBER if header in numbers else _TEXT for header in headers]
    head = "".join(f"<th{style}>{html.escape(header)}</th>" for header, style in zip(headers, styles, strict=True))
    body = "".join(start + "".join(map(_cell, row, styles)) + "</tr>" for row in rows)
    top = f'<caption style="text-align: left; caption-side: top">{html.escape(caption)}</caption>' if caption else ""
    table = f"<table>{top}<thead>{start}{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div style="overflow-x: auto">{table}</div>'


_TEXT = ' style="text-align: left"'
_NUMBER = ' style="text-align: right; white-space: nowrap"'


def _cell(text: str, style: str) -> str:
    return f"<td{style}>{html.escape(text)}</td>"
