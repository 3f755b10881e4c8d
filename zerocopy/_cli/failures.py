"""How does a failure end a command, and with which exit status? With a sentence on stderr.

The status is 0 for success, 1 for a failure or a finding, and 2 for wrong usage, which click itself reports.
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
    """Let errors of zerocopy and of Ray end the command with their own text, without a traceback."""
    try:
        yield
    except ZeroCopyError as error:
        raise Failed(str(error)) from error
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise Failed(f"Ray says: {first_line(error)} Hint: see whether the cluster is up: `ray status`.") from error


@contextlib.contextmanager
def code_of(what: str) -> Iterator[None]:
    """Run the user's code. An error in it ends the command with the text of the error, and the place where it was raised."""
    try:
        yield
    except (ZeroCopyError, click.ClickException):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = [frame for frame in frames if not frame.filename.startswith("<")][-1]  # the code of importlib is frozen
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise Failed(f"{what} raised {type(error).__name__} ({where}): {first_line(error)}") from error
