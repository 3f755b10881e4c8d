"""What does `@pipeline` add to a class? An `__init__` if the class has none, and one attribute, which records the fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, dataclass_transform, get_origin, overload

import attr
import attrs
from torch import nn

from zerocopy._compat.cpython import is_init_of_protocol
from zerocopy._declare.fields import (
    Field,
    Marker,
    check_device_name,
    copied,
    declared_markers,
    own_annotations,
    resolve_annotation,
    shared,
)
from zerocopy._words import nearest
from zerocopy.errors import ArgumentError, DeclarationError

C = TypeVar("C", bound=type)

# Only `__init_subclass__` informs a class of its undecorated subclasses, in workers too. So the record of the declaration is
# stored under this name, and zerocopy adds no other attribute to a class.
FOOTPRINT = "__init_subclass__"

_register: Callable[[type], None]


def install(register: Callable[[type], None]) -> None:
    """Call `register` with every pipeline class that this process makes or rebuilds from now on, subclasses included."""
    global _register  # noqa: PLW0603 (set once, when zerocopy is imported)
    _register = register


class Footprint:
    """Records the fields that one class declares, and registers the classes derived from it."""

    def __init__(self, cls: type, fields: tuple[Field, ...], previous: Any) -> None:
        self.cls = cls
        self.fields = fields
        self.previous = previous

    def __get__(self, instance: object, owner: type) -> Callable[..., None]:
        return functools.partial(self._subclass_made, owner)

    def _subclass_made(self, owner: type, **options: Any) -> None:
        if self.previous is None:
            super(self.cls, owner).__init_subclass__(**options)  # type: ignore[arg-type]
        else:
            self.previous.__get__(None, owner)(**options)
        _register(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_footprint, (self.cls, self.fields, self.previous)


def _rebuild_footprint(cls: type, fields: tuple[Field, ...], previous: Any) -> Footprint:
    # A class pickled by value does not run its decorator again where it is rebuilt.
    _register(cls)
    return Footprint(cls, fields, previous)


def is_pipeline_class(cls: type) -> bool:
    return any(isinstance(vars(base).get(FOOTPRINT), Footprint) for base in cls.__mro__)


def is_same_class(one: type, other: type) -> bool:
    """Whether two classes come from the same source: one may be defined again (a notebook cell), or pickled by value."""
    return one is other or (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def fields(cls: type) -> Mapping[str, Field]:
    """Return the fields of a pipeline class by name, inherited fields first.

    Raises:
        DeclarationError: `cls` is not a pipeline class, or an undecorated subclass declares fields of its own.
    """
    if is_pipeline_class(type(cls)):
        name = type(cls).__name__
        raise DeclarationError(
            f"zerocopy.fields expects a class, got an instance of {name}.", hint=f"write zerocopy.fields({name})."
        )
    if not isinstance(cls, type) or not is_pipeline_class(cls):
        raise DeclarationError(
            f"{describe(cls)} is not marked with @zerocopy.pipeline.", hint="decorate the class itself."
        )
    known = _fields_of.get(cls)
    if known is None:
        known = _fields_of[cls] = _collect(cls)
    return known


_fields_of: weakref.WeakKeyDictionary[type, Mapping[str, Field]] = weakref.WeakKeyDictionary()


def _collect(cls: type) -> Mapping[str, Field]:
    found: dict[str, Field] = {}
    for base in reversed(cls.__mro__):
        footprint = vars(base).get(FOOTPRINT)
        if isinstance(footprint, Footprint):
            found.update({field.name: field for field in footprint.fields})
        elif stray := list(declared_markers(base)):
            raise DeclarationError(
                f"{base.__name__} declares field {stray[0]!r} but is not decorated itself.",
                hint=f"mark {base.__name__} with @zerocopy.pipeline too.",
                field=stray[0],
            )
    return found


@overload
def pipeline(cls: C) -> C: ...
@overload
def pipeline(*, kw_only: bool = ...) -> Callable[[C], C]: ...
@dataclass_transform(field_specifiers=(shared, copied), eq_default=False)
def pipeline(cls: type | None = None, *, kw_only: bool = False) -> Any:
    """Mark a class whose instances Ray passes without copying their models.

    Fields are declared with `shared()` and `copied()`, or with the annotations `Shared[...]` and `Copied[...]`. If the class
    has no `__init__` of its own, anywhere in its MRO, it gets one from attrs.

    Args:
        kw_only: whether every field of the generated `__init__` is keyword-only.

    Raises:
        DeclarationError: a declaration contradicts itself, or cannot be applied.
    """
    if cls is None:
        return functools.partial(_decorate, kw_only=kw_only)
    return _decorate(cls, kw_only=kw_only)


def _decorate(cls: Any, *, kw_only: bool) -> Any:
    _check_class(cls)
    markers = declared_markers(cls)
    for name, marker in markers.items():
        check_device_name(marker.device, f"Field {name!r} of {cls.__name__}")
    init_class = class_with_own_init(cls)
    if init_class is not None:
        _check_init_options(cls, markers, init_class, kw_only)
    values = {name: vars(cls)[name] for name in markers if name in vars(cls)}
    for name, value in values.items():
        if isinstance(value, Marker):
            delattr(cls, name)
    if init_class is None:
        _check_annotations(cls, markers)
        not_defaults = (Marker, types.MemberDescriptorType)
        defaults = {name: value for name, value in values.items() if not isinstance(value, not_defaults)}
        _generate_init(cls, markers, defaults, kw_only)
    declared = tuple(Field(name, marker.policy, marker.device) for name, marker in markers.items())
    setattr(cls, FOOTPRINT, Footprint(cls, declared, vars(cls).get(FOOTPRINT)))
    _register_with_subclasses(cls)
    return cls


def _check_class(cls: Any) -> None:
    if not isinstance(cls, type):
        raise DeclarationError(
            f"@zerocopy.pipeline expects a class, got {describe(cls)}.",
            hint="decorate the class; for a function use @zerocopy.task.",
        )
    if not cls.__weakrefoffset__:
        raise DeclarationError(
            f"{cls.__name__} has __slots__ without '__weakref__', so zerocopy cannot recognize its instances again.",
            hint="add '__weakref__' to __slots__, or leave __slots__ out.",
        )
    if isinstance(vars(cls).get(FOOTPRINT), Footprint):
        raise DeclarationError(f"{cls.__name__} is marked with @zerocopy.pipeline already.", hint="decorate it once.")
    if dataclasses.is_dataclass(cls) and (taken := [n for n, value in vars(cls).items() if isinstance(value, Marker)]):
        raise DeclarationError(
            f"Field {taken[0]!r} of {cls.__name__} was taken by @dataclass as a default value.",
            hint="use the annotations Shared[...] and Copied[...], or leave @dataclass out.",
            field=taken[0],
        )


def _register_with_subclasses(cls: type) -> None:
    """Register `cls` and the classes that were derived from it before it was decorated."""
    _register(cls)
    derived: type
    for derived in cls.__subclasses__():
        _register_with_subclasses(derived)


def class_with_own_init(cls: type) -> type | None:
    """The class whose hand-written `__init__` initializes instances of `cls`; None if attrs may generate an `__init__`."""
    inits = ((base, vars(base)["__init__"]) for base in cls.__mro__ if "__init__" in vars(base))
    owner = next(base for base, init in inits if not is_init_of_protocol(init))
    if owner in (object, nn.Module):
        return None
    props = vars(owner).get("__attrs_props__")
    return None if props is not None and props.added_init else owner


def _check_init_options(cls: type, markers: Mapping[str, Marker], init_class: type, kw_only: bool) -> None:
    refused = [f"{option!r} of field {name!r}" for name, marker in markers.items() for option in marker.init_options()]
    if kw_only:
        refused.append("'kw_only'")
    if refused:
        raise DeclarationError(
            f"{cls.__name__} uses the __init__ of {init_class.__name__}, so {refused[0]} would have no effect.",
            hint="set the attribute in that __init__, or leave the __init__ out.",
        )


def _check_annotations(cls: type, markers: Mapping[str, Marker]) -> None:
    """Refuse attributes that a dataclass would treat as fields, but the generated `__init__` would not."""
    for name, annotation in own_annotations(cls).items():
        found = resolve_annotation(annotation, cls)
        is_of_class = ClassVar in (found, get_origin(found)) or "ClassVar" in str(annotation)
        if name in markers or is_of_class:
            continue
        value = vars(cls).get(name, attrs.NOTHING)
        default = "" if value is attrs.NOTHING else f"default={value!r}"
        raise DeclarationError(
            f"{name!r} of {cls.__name__} has an annotation but no policy, so the generated __init__ would not take it.",
            hint=f"write copied({default}) or shared({default}), or annotate it ClassVar[...] if all instances have one.",
            field=name,
        )


def _initialize_module(self: nn.Module) -> None:
    nn.Module.__init__(self)


def _generate_init(cls: type, markers: Mapping[str, Marker], defaults: Mapping[str, Any], kw_only: bool) -> None:
    if issubclass(cls, nn.Module) and not hasattr(cls, "__attrs_pre_init__"):
        cls.__attrs_pre_init__ = _initialize_module  # type: ignore[attr-defined]
    these = {
        name: attr.ib(**{"default": defaults.get(name, attrs.NOTHING), **marker.init_options()})
        for name, marker in markers.items()
    }
    for name in defaults:
        delattr(cls, name)
    try:
        attr.s(these=these, slots=False, eq=False, repr=False, init=True, kw_only=kw_only)(cls)
    except ValueError as error:
        if "mandatory" not in str(error):
            raise
        late = _first_mandatory_after_default(cls, these)
        raise DeclarationError(
            f"Field {late!r} of {cls.__name__} is mandatory, but a field before it has a default.",
            hint=f"declare {late!r} with kw_only=True, or all of them with @zerocopy.pipeline(kw_only=True).",
            field=late,
        ) from None
    cls.__init__ = _with_fields_named(cls.__init__, cls)  # type: ignore[misc]


def _with_fields_named(init: Callable[..., None], cls: type) -> Callable[..., None]:
    """Wraps `init`, so that the error for a call with wrong arguments names the fields."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except TypeError:
            problem = _misfit(inspect.signature(init), cls, (self, *args), kwargs)
            if problem is None:  # the error comes from a converter, a validator, or a class of the user
                raise
            raise problem from None

    return __init__


def _misfit(
    signature: inspect.Signature, cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ArgumentError | None:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        reason = str(error)
    else:
        return None
    _, *parameters = signature.parameters.values()
    shown = str(signature.replace(parameters=[one.replace(annotation=one.empty) for one in parameters]))
    usage = f"its fields are {cls.__name__}{shown.partition(' -> ')[0]}."
    names = [one.name for one in parameters]
    if unknown := [name for name in kwargs if name not in names]:
        hint = nearest(unknown[0], names, usage)
        return ArgumentError(f"{cls.__name__} has no field {unknown[0]!r}.", hint=hint, field=unknown[0])
    given = {*names[: len(args) - 1], *kwargs}
    lacking = [one.name for one in parameters if one.default is one.empty and one.name not in given]
    if lacking:
        listed = " and ".join(filter(None, [", ".join(map(repr, lacking[:-1])), repr(lacking[-1])]))
        plural = "fields" if len(lacking) > 1 else "field"
        return ArgumentError(f"{cls.__name__}() is missing the {plural} {listed}.", hint=usage, field=lacking[0])
    return ArgumentError(f"{cls.__name__}(): {reason}.", hint=usage)


def _first_mandatory_after_default(cls: type, these: Mapping[str, Any]) -> str:
    inherited = attrs.fields(cls) if attrs.has(cls) else ()
    seen_default = any(field.default is not attrs.NOTHING for field in inherited)
    for name, field in these.items():
        if field.kw_only:
            continue
        if field._default is attrs.NOTHING and seen_default:
            return name
        seen_default = seen_default or field._default is not attrs.NOTHING
    return next(iter(these))


def describe(obj: object) -> str:
    """Describes `obj` in errors: `function 'answer'`, `class 'Search'`."""
    if isinstance(obj, type):
        return f"class {obj.__name__!r}"
    kind = "function" if inspect.isfunction(obj) else type(obj).__name__
    return f"{kind} {getattr(obj, '__name__', repr(obj))!r}"
