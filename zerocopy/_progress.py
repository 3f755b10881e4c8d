"""How does a long call show its progress? With a bar on a terminal or in a notebook, and with nothing elsewhere."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Callable, Iterator
from typing import Any

from zerocopy._tables import format_bytes

Bar = Callable[[float], None]

REDRAW_SECONDS = 0.1  # between two drawings in a notebook


@contextlib.contextmanager
def progress_bar(
    description: str, total: float | None, *, shown: bool = True, is_bytes: bool = False
) -> Iterator[Bar | None]:
    """Yield a function to call with the amount done so far; None if nothing is drawn."""
    from rich.console import Console

    console = Console(stderr=True)
    if shown and console.is_jupyter:
        bar = _InNotebook(description, total, is_bytes=is_bytes)
        try:
            yield bar
        finally:
            bar.end()
    elif shown and console.is_terminal:
        with _on_terminal(console, description, total, is_bytes=is_bytes) as on_terminal:
            yield on_terminal
    else:
        yield None


@contextlib.contextmanager
def _on_terminal(console: object, description: str, total: float | None, *, is_bytes: bool) -> Iterator[Bar]:
    from rich import progress

    counts = progress.DownloadColumn() if is_bytes else progress.MofNCompleteColumn()
    text, seconds = progress.TextColumn("{task.description}"), progress.TimeElapsedColumn()
    with progress.Progress(text, progress.BarColumn(), counts, seconds, console=console) as shown:  # type: ignore[arg-type]
        bar = shown.add_task(description, total=total)
        yield lambda done: shown.update(bar, completed=done)


class _InNotebook:
    """A bar of HTML. Unlike a bar of Rich, it needs no widgets."""

    def __init__(self, description: str, total: float | None, *, is_bytes: bool) -> None:
        from IPython.display import display

        self._description = description
        self._total = total
        self._is_bytes = is_bytes
        self._done = 0.0
        self._start = self._drawn = time.monotonic()
        show: Any = display  # `display` has no types
        self._place = show(self._drawing(), raw=True, display_id=True)

    def __call__(self, done: float) -> None:
        self._done = done
        if time.monotonic() - self._drawn > REDRAW_SECONDS:  # each drawing is a message to the browser
            self._draw()

    def end(self) -> None:
        """Draw the last state. If the total is unknown, the bar is full."""
        self._total = self._done if self._total is None else self._total
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._place.update(self._drawing(), raw=True)

    def _drawing(self) -> dict[str, str]:
        """The bar as HTML and as text, by MIME type."""
        bounds = "" if self._total is None else f' value="{self._done:.0f}" max="{max(self._total, 1):.0f}"'
        counts = self._said(self._done) + ("" if self._total is None else f"/{self._said(self._total)}")
        counts += f", {time.monotonic() - self._start:.0f} s"
        page = f"{html.escape(self._description)} <progress{bounds}></progress> {counts}"
        return {"text/html": page, "text/plain": f"{self._description}: {counts}"}

    def _said(self, count: float) -> str:
        return format_bytes(int(count)) if self._is_bytes else f"{count:.0f}"
