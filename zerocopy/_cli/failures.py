"""How does what went wrong end a command: in a sentence on stderr, with which exit status?

0 is fine. 1 is what failed, or a finding. 2 is a command that was not given as it must be; click itself says so.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import click
import ray.exceptions

from zerocopy._words import first_line
from zerocopy.errors import ZeroCopyError


class Failed(click.ClickException):
    """Ends the command with its text and status 1."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Let errors of zerocopy and of Ray end the command with their own words, without a traceback."""
    try:
        yield
    except ZeroCopyError as error:
        raise Failed(str(error)) from error
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise Failed(f"Ray says: {first_line(error)} Hint: see whether the cluster is up: `ray status`.") from error


@contextlib.contextmanager
def code_of(what: str) -> Iterator[None]:
    """Run the user's code: an error of it ends the command with what it says, and where it was raised."""
    try:
        yield
    except (ZeroCopyError, click.ClickException):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = [frame for frame in frames if not frame.filename.startswith("<")][-1]  # importlib is frozen
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise Failed(f"{what} raised {type(error).__name__} ({where}): {first_line(error)}") from error
