"""How is a memory report drawn as a bar chart?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zerocopy._tables import format_bytes
from zerocopy.errors import MissingPackageError

SHARED, PRIVATE, PLAIN = "#0b5fa5", "#edae49", "#d1495b"


def draw(rows: Sequence[tuple[str, int, int, int]]) -> Any:
    """Draw two bars per row: the memory with zerocopy, and the memory that plain copies would take.

    Args:
        rows: for each row a title, and three numbers of bytes: shared, private, plain copies.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "A plot needs matplotlib.", hint="pip install 'zerocopy-ray[plot]'.", package="matplotlib"
        ) from error
    figure = Figure(figsize=(9, 1.2 + 0.8 * max(1, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    for position, (_, shared, private, plain) in enumerate(rows):
        axes.barh(position - 0.19, shared, 0.36, color=SHARED, label="shared, once" if not position else None)
        axes.barh(position - 0.19, private, 0.36, shared, color=PRIVATE, label="private" if not position else None)
        axes.barh(position + 0.19, plain, 0.36, color=PLAIN, label="plain copies would take" if not position else None)
        for offset, nbytes in ((-0.19, shared + private), (0.19, plain)):
            axes.text(nbytes, position + offset, f" {format_bytes(nbytes)}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [title for title, *_ in rows])
    axes.set_title("Memory with zerocopy, beside plain copies")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda nbytes, _: format_bytes(int(nbytes)))
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
