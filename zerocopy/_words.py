"""Which words do errors of many places need: short lists, the name that was probably meant, the first line of another error?"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from zerocopy.errors import ArgumentError


def first_line(error: BaseException) -> str:
    """The first line of the text of an error; its class if the text is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def counted(names: Sequence[str], noun: str, plural: str = "") -> str:
    """How many names there are, and the first three: `203 names (a, b, c, ...)`."""
    told = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
    return f"{len(names)} {noun if len(names) == 1 else plural or noun + 's'} ({told})"


def nearest(name: str, known: Sequence[str], otherwise: str | None = None) -> str | None:
    """A hint for a user who wrote `name` instead of one of `known`. `otherwise` is the hint if none of them is similar."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or (f"there are {', '.join(known)}." if known else None)


def check_seconds(timeout: object) -> None:
    """Refuse a timeout that is not a number of seconds.

    Raises:
        ArgumentError: it is not a number.
    """
    if not isinstance(timeout, (int, float)):
        raise ArgumentError(f"timeout={timeout!r} is not a number of seconds.", hint="write timeout=30, say.")
