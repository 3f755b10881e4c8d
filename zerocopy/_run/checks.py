"""Which calls are refused before Ray sees them? Calls with unknown options, or with arguments that do not fit the signature."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from torch import nn

from zerocopy._compat.ray import OPTIONS, Kind, check_values
from zerocopy._declare.pipeline import is_pipeline_class, is_same_class
from zerocopy._load.publication import Publication
from zerocopy._words import nearest
from zerocopy.errors import ArgumentError, DeclarationError

PLACEHOLDER: Any = object()  # stands for an argument whose value is not known yet
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_options(options: Mapping[str, Any], kind: Kind, *, late: bool = False) -> None:
    """Refuse options that Ray does not know for a task or an actor. `late`: the options come from `.options()`.

    Raises:
        DeclarationError: an unknown name, or a value that Ray refuses.
    """
    known = OPTIONS[kind]
    for name in options:
        if name not in known:
            public = sorted(option for option in known if not option.startswith("_"))
            raise DeclarationError(
                f"{name!r} is not an option of Ray for {'an actor' if kind == 'actor' else 'a task'}.",
                hint=nearest(name, public),
                option=name,
            )
    try:
        check_values(options, kind, late=late)
    except (ValueError, TypeError) as error:
        raise DeclarationError(f"Ray refuses an option of this {kind}: {error}") from error


def say_options(options: Mapping[str, Any]) -> str:
    """Options at the end of a repr, empty if there are none."""
    return "".join(f", {name}={value!r}" for name, value in options.items())


def check_in_flight(max_in_flight: int | None) -> None:
    """Refuse a limit that lets no call run.

    Raises:
        ArgumentError: a limit is given, and is not a positive int.
    """
    if max_in_flight is not None and (not isinstance(max_in_flight, int) or max_in_flight < 1):
        raise ArgumentError(
            f"max_in_flight={max_in_flight!r} is not a positive number.", hint="leave it out, or give 1 or more."
        )


def check_items(items: object, what: str, hint: str) -> None:
    """Refuse items that a `map` should not iterate.

    Raises:
        ArgumentError: they cannot be iterated, or they are a string, whose items would be its letters.
    """
    can_be_iterated = isinstance(items, Iterable) or hasattr(type(items), "__getitem__")  # like a dataset of torch
    if isinstance(items, (str, bytes)) or not can_be_iterated:
        raise ArgumentError(f"{what}, which is {type(items).__name__!r}.", hint=hint)


class Parameters:
    """The parameters of a function or an `__init__`. They are checked where it is called, not where it runs."""

    def __init__(self, target: Callable[..., Any]) -> None:
        """`target` is a function, or a class, which stands for its `__init__`."""
        self._target = target
        self._name = target.__name__
        self._signature = inspect.signature(target)
        self._expected: dict[str, tuple[type, ...]] | None = None
        parameters = self._signature.parameters.values()
        self._positional = [
            one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        required = [one.name for one in parameters if one.default is one.empty and one.kind not in _VARIADIC]
        # If a required parameter is keyword-only, no call with only positional arguments is enough.
        self._least = len(required) if set(required) <= set(self._positional) else len(self._positional) + 1

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
            is_default = value is self._signature.parameters[name].default or value is PLACEHOLDER
            if name in bound.arguments and not is_default and not _fits(value, classes):
                wanted = _names_of(classes)
                raise ArgumentError(
                    f"{self._name}() expects {wanted} for {name!r}, got {_kind_of(value)}.",
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
                return ArgumentError(
                    f"{self._name}() is missing its argument {name!r}.",
                    hint=f"pass an instance of {_names_of(classes)}, or a publication of one; {usage}",
                )
        return ArgumentError(f"{self._name}() was called with arguments that do not fit: {error}.", hint=usage)

    def _expected_classes(self) -> dict[str, tuple[type, ...]]:
        """The classes in the annotation of each parameter that is annotated with a pipeline class or a module class."""
        if self._expected is None:  # at the first call, because annotations may name classes that are defined later
            found = {name: self._classes_of(parameter) for name, parameter in self._signature.parameters.items()}
            self._expected = {name: classes for name, classes in found.items() if classes}
        return self._expected

    def _classes_of(self, parameter: inspect.Parameter) -> tuple[type, ...]:
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = _evaluate(annotation, self._target)
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        classes = typing.get_args(annotation) if is_union else (annotation,)
        if parameter.kind in _VARIADIC or not all(isinstance(cls, type) for cls in classes):
            return ()
        return classes if any(issubclass(cls, nn.Module) or is_pipeline_class(cls) for cls in classes) else ()


def _evaluate(annotation: str, target: Callable[..., Any]) -> Any:
    """The meaning of an annotation where `target` was defined; None if it is unknown there, like names for type checkers only."""
    function = inspect.unwrap(vars(target).get("__init__", target) if isinstance(target, type) else target)
    names = dict(vars(sys.modules[target.__module__])) if target.__module__ in sys.modules else {}
    if inspect.isfunction(function):
        names |= {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    try:
        return eval(annotation, names)
    except Exception:
        return None


def _fits(value: Any, classes: tuple[type, ...]) -> bool:
    if isinstance(value, ray.ObjectRef):
        return True
    if not isinstance(value, Publication) and isinstance(value, classes):
        return True
    given = value.cls if isinstance(value, Publication) else type(value)
    return given is None or issubclass(given, classes) or _was_defined_again(given, classes)


def _was_defined_again(given: type, classes: Iterable[type]) -> bool:
    """Whether `given`, or a class that it inherits from, is an older or newer definition of one of `classes`."""
    return any(is_same_class(base, cls) for base in given.__mro__ for cls in classes)


def _kind_of(value: Any) -> str:
    if isinstance(value, Publication):
        return f"a publication of {value.kind if value.cls is None else _name_of(value.cls)}"
    return repr(_name_of(type(value)))


def _names_of(classes: Iterable[type]) -> str:
    return " or ".join(_name_of(cls) for cls in classes if cls is not types.NoneType)


def _name_of(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"
