"""What did the user declare in the body of a class, with `shared()`, `copied()` and their annotations?"""

from __future__ import annotations

import builtins
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar, Union, get_args, get_origin, overload

import attrs
import torch

from zerocopy.errors import DeclarationError, DeviceError

T = TypeVar("T")
Policy: TypeAlias = Literal["shared", "copied"]

_NOTHING = attrs.NOTHING


@attrs.frozen
class Marker:
    """The result of `shared()` or `copied()` in a class body. `@pipeline` interprets it."""

    policy: Policy
    device: str | None = None
    default: Any = attrs.field(factory=lambda: attrs.NOTHING)
    factory: Callable[[], Any] | None = None
    validator: Any = None
    converter: Any = None
    kw_only: bool | None = None

    def init_options(self) -> dict[str, Any]:
        """The options that only a generated `__init__` can apply."""
        unset = {"default": _NOTHING}
        names = ("default", "factory", "validator", "converter", "kw_only")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not unset.get(name)}


@attrs.frozen
class Field:
    """One declared attribute of a pipeline class.

    Attributes:
        name: the name of the attribute.
        policy: `"shared"` or `"copied"`.
        device: the device that the field declares; None if the caller of `load` chooses it.
    """

    name: str
    policy: Policy
    device: str | None = None


@overload
def shared(*, device: str | None = ..., validator: Any = ..., kw_only: bool | None = ...) -> Any: ...
@overload
def shared(
    *, default: T, device: str | None = ..., validator: Any = ..., converter: Any = ..., kw_only: bool | None = ...
) -> T: ...
@overload
def shared(
    *,
    factory: Callable[[], T],
    device: str | None = ...,
    validator: Any = ...,
    converter: Any = ...,
    kw_only: bool | None = ...,
) -> T: ...
@overload
def shared(*, converter: Any, device: str | None = ..., validator: Any = ..., kw_only: bool | None = ...) -> Any: ...
def shared(
    *,
    device: str | None = None,
    default: Any = _NOTHING,
    factory: Callable[[], Any] | None = None,
    validator: Any = None,
    converter: Any = None,
    kw_only: bool | None = None,
) -> Any:
    """Declare a field whose tensors and arrays exist once per node.

    The other options are those of `attrs.field` and need a class without an `__init__` of its own.

    Args:
        device: the device that the field is loaded onto (`"cpu"`, `"cuda:0"`, `"auto"`). It has priority over the device of
            `load`, of an actor or of a task.
    """
    _check_default("shared", default, factory)
    return Marker("shared", device, default, factory, validator, converter, kw_only)


@overload
def copied(*, validator: Any = ..., kw_only: bool | None = ...) -> Any: ...
@overload
def copied(*, default: T, validator: Any = ..., converter: Any = ..., kw_only: bool | None = ...) -> T: ...
@overload
def copied(
    *, factory: Callable[[], T], validator: Any = ..., converter: Any = ..., kw_only: bool | None = ...
) -> T: ...
@overload
def copied(*, converter: Any, validator: Any = ..., kw_only: bool | None = ...) -> Any: ...
def copied(
    *,
    default: Any = _NOTHING,
    factory: Callable[[], Any] | None = None,
    validator: Any = None,
    converter: Any = None,
    kw_only: bool | None = None,
) -> Any:
    """Declare a field that each load copies: every loaded pipeline has its own.

    The options are those of `attrs.field` and need a class without an `__init__` of its own.
    """
    _check_default("copied", default, factory)
    return Marker("copied", None, default, factory, validator, converter, kw_only)


def _check_default(policy: Policy, default: object, factory: object) -> None:
    if factory is None:
        return
    if default is not _NOTHING:
        raise DeclarationError(f"{policy}() takes default= or factory=, got both.", hint="leave one out.")
    if not callable(factory):
        raise DeclarationError(
            f"factory={factory!r} of {policy}() cannot be called.", hint="write factory=list, or use default=."
        )


Shared: TypeAlias = Annotated[T, Marker("shared")]
Copied: TypeAlias = Annotated[T, Marker("copied")]


class _Unknown:
    """Stands for a name that only type checkers know. It supports every operation that an annotation may use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ours(name) or self

    def __getitem__(self, item: object) -> _Unknown:
        return self

    def __or__(self, other: object) -> _Unknown:
        return self

    __ror__ = __or__

    def __call__(self, *_: object, **__: object) -> _Unknown:
        return self


class _LenientNames(dict[str, Any]):
    """The names that an annotation can use. A missing name gives `_Unknown`."""

    @classmethod
    def of(cls, owner: type) -> Self:
        """The names that an annotation in the body of a class can use."""
        module = sys.modules.get(owner.__module__)
        return cls({**vars(builtins), **(vars(module) if module else {}), **vars(owner)})

    def __missing__(self, name: str) -> Any:
        return _ours(name) or _Unknown()


def _ours(name: str) -> Any:
    """The policies by name. If they were imported inside a function, the text of an annotation cannot reach them."""
    return {"Shared": Shared, "Copied": Copied, "shared": shared, "copied": copied, "Annotated": Annotated}.get(name)


def own_annotations(cls: type) -> Mapping[str, Any]:
    """The annotations in the body of `cls`. Annotations that are text stay text."""
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF)
    return inspect.get_annotations(cls)


def resolve_annotation(annotation: object, cls: type) -> Any:
    """The object that an annotation stands for. A name that cannot be found does not affect the other names."""
    return resolve_names(annotation, _LenientNames.of(cls)) if isinstance(annotation, str) else annotation


def resolve_names(annotation: str, names: Mapping[str, Any]) -> Any:
    """The object that the text of an annotation stands for, given the known names."""
    try:
        return eval(annotation, {}, _LenientNames(names))
    except Exception:  # an annotation may be any text; text that is not Python declares no policy
        return _Unknown()


def is_unknown(found: object) -> bool:
    """Whether an annotation could not be resolved."""
    return isinstance(found, _Unknown)


def _annotated_marker(annotation: object) -> Marker | None:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(filter(None, map(_annotated_marker, get_args(annotation))), None)
    if get_origin(annotation) is not Annotated:
        return None
    return next((item for item in get_args(annotation)[1:] if isinstance(item, Marker)), None)


def declared_markers(cls: type) -> dict[str, Marker]:
    """The markers in the body of `cls` itself, by attribute name, in the order of the body.

    Raises:
        DeclarationError: a field has two policies, a property or a method has a policy, or a policy was not called.
    """
    names = list(dict.fromkeys([*own_annotations(cls), *vars(cls)]))
    return {name: marker for name in names if (marker := _marker_of(cls, name)) is not None}


def _marker_of(cls: type, name: str) -> Marker | None:
    annotation = resolve_annotation(own_annotations(cls).get(name), cls)
    annotated = _annotated_marker(annotation)
    value = vars(cls).get(name)
    for policy in (shared, copied):
        if value is policy or policy in get_args(annotation)[1:]:
            raise DeclarationError(
                f"Field {name!r} of {cls.__name__} has {policy.__name__} without parentheses.",
                hint=f"write {policy.__name__}().",
                field=name,
            )
    assigned = value if isinstance(value, Marker) else None
    if annotated is None:
        return assigned
    where = f"Field {name!r} of {cls.__name__}"
    if isinstance(value, property) or inspect.isroutine(value):
        kind = "property" if isinstance(value, property) else "method"
        raise DeclarationError(
            f"{where} has a policy, but it is a {kind}, which holds no data of its own.",
            hint=f"annotate the attribute that the {kind} reads instead.",
            field=name,
        )
    if assigned is not None and assigned.policy != annotated.policy:
        raise DeclarationError(
            f"{where} has two policies: its annotation says {annotated.policy}, its value {assigned.policy}().",
            hint="keep one of them.",
            field=name,
        )
    if assigned is None:
        return annotated
    return attrs.evolve(assigned, device=assigned.device or annotated.device)


def check_device_name(device: str | None, where: str) -> None:
    """Check that torch knows a device of this name, which may exist on another machine. No worker is asked.

    Raises:
        DeviceError: torch knows no such kind of device.
    """
    if device in (None, "auto"):
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(
            f"{where} has device={device!r}, which torch does not know.",
            hint="use 'auto', 'cpu', or a name such as 'cuda:0'.",
            device=str(device),
        ) from None
