"""How does one see how far a long call is? By a bar on a terminal or in a notebook, and by nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(
    description: str, total: float | None, *, shown: bool = True, is_bytes: bool = False
) -> Iterator[Callable[[float], None] | None]:
    """Give the function to call with what is done so far; None where nothing is drawn."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    if not shown or not (console.is_terminal or console.is_jupyter):
        yield None
        return
    counts = DownloadColumn() if is_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda done: progress.update(bar, completed=done)
