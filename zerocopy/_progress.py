"""How does one see how far a long call is? By a bar on a terminal or in a notebook, and by nothing elsewhere."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterator

Bar = Callable[[float], None]


@contextlib.contextmanager
def progress_bar(
    description: str, total: float | None, *, shown: bool = True, is_bytes: bool = False
) -> Iterator[Bar | None]:
    """Give the function to call with what is done so far; None where nothing is drawn."""
    from rich.console import Console

    console = Console(stderr=True)
    if shown and console.is_jupyter:
        yield _in_notebook(description, total)
    elif shown and console.is_terminal:
        with _on_terminal(console, description, total, is_bytes=is_bytes) as bar:
            yield bar
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


def _in_notebook(description: str, total: float | None) -> Bar:
    """An element of HTML, which needs no widgets: Rich would."""
    from IPython.display import HTML, display

    def element(done: float) -> HTML:
        most = "" if total is None else f' max="{total}"'
        return HTML(f'{html.escape(description)} <progress value="{done}"{most}></progress>')

    place = display(element(0), display_id=True)
    return lambda done: place.update(element(done))
