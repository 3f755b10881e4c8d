"""Which object does `module:object` name, and what does it return when it is called?"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from zerocopy._cli.failures import code_of

FORM = "give module:object, such as my_models:build for `build` in my_models.py of this folder."


class Target:
    """An object that the user has named.

    Attributes:
        name: the name as the user gave it.
        value: the object.
    """

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value

    @property
    def is_maker(self) -> bool:
        """Whether the object must be called to get the result: a function, a method, a class or a partial of one."""
        return inspect.isroutine(self.value) or inspect.isclass(self.value) or isinstance(self.value, functools.partial)

    def made(self) -> Any:
        """The result of a call without arguments; the object itself if it is an instance.

        Raises:
            click.BadParameter: the object needs arguments.
            Failed: the call raised an error.
        """
        return self.build()() if self.is_maker else self.value

    def build(self) -> Callable[[], Any]:
        """The object as a function without arguments, which does not print to stdout.

        Raises:
            click.BadParameter: the object cannot be called in this way.
        """
        if not self.is_maker:
            raise click.BadParameter(
                f"{self.name!r} is {_kind(self.value)}, which cannot be called. Hint: give a function."
            )
        with contextlib.suppress(ValueError):  # a class written in C may have no signature
            try:
                inspect.signature(self.value).bind()
            except TypeError as error:
                raise click.BadParameter(
                    f"{self.name!r} needs arguments: {error}. Hint: give a function that needs none."
                ) from error
        return self._call

    def _call(self) -> Any:
        with code_of(self.name), quiet():
            return self.value()


def named(_: click.Context, __: click.Parameter, name: str | None) -> Target | None:
    """The callback of a parameter that names an object."""
    return None if name is None else found(name)


def found(name: str) -> Target:
    """The object with a name.

    Raises:
        click.BadParameter: there is no such object.
        Failed: its module raised an error.
    """
    module, _, path = name.partition(":")
    if not module or not path:
        raise click.BadParameter(f"{name!r} does not name an object. Hint: {FORM}")
    if "/" in module or module.endswith(".py"):
        file = Path(module)
        raise click.BadParameter(
            f"{module!r} is a file, not a module. Hint: go to the folder {str(file.parent)!r}, and write {file.stem}:{path}."
        )
    here = str(Path.cwd())
    if here not in sys.path:  # Ray lets workers import from there, too
        sys.path.insert(0, here)
    try:
        with code_of(f"importing {module!r}"), quiet():
            value = importlib.import_module(module)
            for part in path.split("."):
                value = getattr(value, part)
    except click.ClickException as failed:
        if isinstance(failed.__cause__, (ImportError, AttributeError)) and _is_about(failed.__cause__, module, path):
            raise click.BadParameter(f"there is no {name!r}: {failed.__cause__}. Hint: {FORM}") from failed
        raise
    return Target(name, value)


def _is_about(error: BaseException, module: str, path: str) -> bool:
    """Whether the error says that the named object is missing, and not that the module itself has an error."""
    if isinstance(error, ImportError):
        return error.name is not None and f"{module}.".startswith(f"{error.name}.")
    return getattr(error, "name", None) in path.split(".")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Redirect the output of the user's code to stderr: stdout is for the command's result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _kind(value: object) -> str:
    return f"an instance of {type(value).__name__}"
