"""What have actors and tasks in common: Ray's options, arguments that travel and arrive, results in order."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import ray
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat.ray import OPTIONS, check_values
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._load import devices
from zerocopy._load.publication import Publication
from zerocopy._publish.publish import publish_automatically
from zerocopy._split.paths import is_module
from zerocopy._store import object_store
from zerocopy.errors import ArgumentError, DeclarationError

T = TypeVar("T")
Kind = Literal["actor", "task"]


def check_options(options: Mapping[str, Any], kind: Kind, *, late: bool = False) -> None:
    """Refuse options that Ray does not know for a task or an actor. `late` ones are given by `.options()`.

    Raises:
        DeclarationError: an unknown name, or a value that Ray refuses.
    """
    known = OPTIONS[kind]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            public = ", ".join(sorted(option for option in known if not option.startswith("_")))
            raise DeclarationError(
                f"{name!r} is not an option of Ray for {'an actor' if kind == 'actor' else 'a task'}.",
                hint=f"did you mean {close[0]!r}?" if close else f"Ray knows {public}.",
                option=name,
            )
    try:
        check_values(options, kind, late=late)
    except (ValueError, TypeError) as error:
        raise DeclarationError(f"Ray refuses an option of this {kind}: {error}") from error


def is_shareable(value: object) -> bool:
    return is_module(value) or isinstance(value, ExportedProgram) or is_pipeline_class(type(value))


def travelling(value: Any) -> Any:
    """An argument as it is sent: a pipeline or a module as a publication."""
    if is_shareable(value):
        return publish_automatically(value)
    if isinstance(value, Publication) and value.closed:
        value.content()  # raises what pickling it would
    return value


Load: TypeAlias = Callable[[Publication, str | None], Any]


def arriving(value: Any, device: str | None, load: Load = Publication.load) -> Any:
    """An argument as the user's code gets it: a publication loaded, where the code's device is."""
    if isinstance(value, Publication):
        return load(value, device)
    if is_pipeline_class(type(value)) and device is not None and object_store.is_running() and object_store.is_worker():
        # Ray Data and Serve bring a pipeline loaded, on the CPU.
        return value if devices.resolve(device) == devices.CPU else publish_automatically(value).load(device)
    return value


def send(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    return [travelling(value) for value in args], {name: travelling(value) for name, value in kwargs.items()}


def receive(
    args: Sequence[Any], kwargs: Mapping[str, Any], device: str | None, load: Load = Publication.load
) -> tuple[list[Any], dict[str, Any]]:
    values = [arriving(value, device, load) for value in args]
    return values, {name: arriving(value, device, load) for name, value in kwargs.items()}


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
UNKNOWN: Any = object()  # stands for an argument that is not known yet


class Parameters:
    """The parameters of a function or an `__init__`, checked where it is called instead of where it runs."""

    def __init__(self, target: Callable[..., Any]) -> None:
        """`target` is a function, or a class whose `__init__` is meant."""
        self._target = target
        self._name = target.__name__
        self._signature = inspect.signature(target)
        self._expected: dict[str, tuple[type, ...]] | None = None
        parameters = self._signature.parameters.values()
        self._positional = [
            one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        required = [one for one in parameters if one.default is one.empty and one.kind not in VARIADIC]
        # A parameter that has to be named is one that no positional call gives.
        is_positional = all(one.name in self._positional for one in required)
        self._least = len(required) if is_positional else len(self._positional) + 1

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a call that cannot succeed.

        Raises:
            ArgumentError: an argument is missing, unknown, or not an instance of the pipeline class of its annotation.
        """
        if not kwargs and self._least <= len(args) <= len(self._positional):  # most calls
            given = dict(zip(self._positional, args, strict=False))
            if all(_fits(given[name], classes) for name, classes in self._expected_classes().items() if name in given):
                return
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise self._cannot_bind(args, kwargs, error) from None
        for name, classes in self._expected_classes().items():
            value = bound.arguments.get(name)
            is_default = value is self._signature.parameters[name].default or value is UNKNOWN
            if name in bound.arguments and not is_default and not _fits(value, classes):
                wanted = _class_names(classes)
                raise ArgumentError(
                    f"{self._name}() expects {wanted} for {name!r}, got {_what(value)}.",
                    hint=f"pass an instance of {wanted}, or a publication of one.",
                )

    def _cannot_bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], error: TypeError) -> ArgumentError:
        usage = f"its signature is {self._name}{self._signature}."
        try:
            given = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # too many, or unknown
            given = dict.fromkeys(self._signature.parameters)
        for name, classes in self._expected_classes().items():
            if name not in given and self._signature.parameters[name].default is inspect.Parameter.empty:
                wanted = _class_names(classes)
                return ArgumentError(
                    f"{self._name}() is missing its pipeline argument {name!r}.",
                    hint=f"pass an instance of {wanted}, or a publication of one; {usage}",
                )
        return ArgumentError(f"{self._name}() cannot be called so: {error}.", hint=usage)

    def _expected_classes(self) -> dict[str, tuple[type, ...]]:
        if self._expected is None:
            found = {name: self._classes_of(parameter) for name, parameter in self._signature.parameters.items()}
            self._expected = {name: classes for name, classes in found.items() if classes}
        return self._expected

    def _classes_of(self, parameter: inspect.Parameter) -> tuple[type, ...]:
        """The classes of a parameter annotated with a pipeline class or a module class; empty for any other."""
        if parameter.kind in VARIADIC:
            return ()
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = _evaluate(annotation, self._target)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            members = typing.get_args(annotation)
        else:
            members = (annotation,)
        if not all(isinstance(member, type) for member in members):
            return ()
        return (
            tuple(members)
            if any(issubclass(member, nn.Module) or is_pipeline_class(member) for member in members)
            else ()
        )


def _evaluate(annotation: str, target: Callable[..., Any]) -> Any:
    function = inspect.unwrap(vars(target).get("__init__", target) if isinstance(target, type) else target)
    names = dict(vars(sys.modules[target.__module__])) if target.__module__ in sys.modules else {}
    if inspect.isfunction(function):
        names |= {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    try:
        return eval(annotation, names)
    except Exception:  # a name that only type checkers know: nothing to check by
        return None


def _fits(value: Any, classes: tuple[type, ...]) -> bool:
    if isinstance(value, ray.ObjectRef):
        return True
    if isinstance(value, Publication):
        return value.cls is None or issubclass(value.cls, classes)
    return isinstance(value, classes)


def _what(value: Any) -> str:
    if isinstance(value, Publication):
        return f"a publication of {value.kind if value.cls is None else _class_name(value.cls)}"
    return repr(_class_name(type(value)))


def _class_names(classes: Iterable[type]) -> str:
    return " or ".join(_class_name(cls) for cls in classes if cls is not types.NoneType)


def _class_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def default_in_flight() -> int:
    """Twice the CPUs of the cluster: enough that none waits for the driver."""
    cpus: float = ray.cluster_resources().get("CPU", 1)
    return max(4, 2 * math.ceil(cpus))


def check_in_flight(max_in_flight: int | None) -> None:
    if max_in_flight is not None and (not isinstance(max_in_flight, int) or max_in_flight < 1):
        raise ArgumentError(
            f"max_in_flight={max_in_flight!r} is not a positive number.", hint="leave it out, or give 1 or more."
        )


def in_order(
    submit: Callable[[T], ray.ObjectRef[Any]], items: Iterable[T], max_in_flight: int, description: str
) -> Iterator[Any]:
    """Results in the order of `items`, with at most `max_in_flight` calls under way.

    The first error cancels what is under way and is raised; so does abandoning the iterator, but for the raising.
    """
    pending: deque[ray.ObjectRef[Any]] = deque()
    advance, finish = _progress(items, description)
    try:
        for item in items:
            if len(pending) >= max_in_flight:
                yield _next_result(pending, advance)
            pending.append(submit(item))
        while pending:
            yield _next_result(pending, advance)
    finally:
        finish()
        for refs in pending:
            for ref in refs if isinstance(refs, list) else [refs]:  # a list with num_returns
                ray.cancel(ref)


def _next_result(pending: deque[ray.ObjectRef[Any]], advance: Callable[[], None]) -> Any:
    result = ray.get(pending.popleft())
    advance()
    return result


def _progress(items: Iterable[Any], description: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """What to call after each result and at the end: a progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal or object_store.is_worker():
        return (lambda: None), (lambda: None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console)
    task = progress.add_task(description, total=len(items) if isinstance(items, typing.Sized) else None)
    progress.start()
    return (lambda: progress.advance(task)), progress.stop
