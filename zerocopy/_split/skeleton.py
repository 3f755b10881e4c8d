"""How is an object split from its tensors, and joined again.

`strip` is a pickler that writes a number instead of each tensor (and of each other thing that must travel beside the
bytes); what remains is the skeleton. `graft` is its inverse. Because it is pickle that walks, everything that pickle would
meet is met, at any depth, identity is kept and no property is evaluated.
"""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat.ray import CloudPickler
from zerocopy._declare.fields import Field
from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import export, paths, programs, reducers
from zerocopy._split.modules import ModuleReducer
from zerocopy._split.ordinary import Ordinary, external, set_attributes, strip_ordinary
from zerocopy._split.roles import MODULES, SCALARS, Role, Roles, Slot, Switch, Zone
from zerocopy._store.tensors import is_meta, is_plain
from zerocopy.errors import CannotTravelError, ZeroCopyError

_CODE = (type, types.FunctionType)
_BESIDE = (Role.TENSOR, Role.PASSENGER, Role.BUFFER)


class Split(enum.Enum):
    """Where a strip stops, beside at tensors."""

    NOWHERE = "everything is in the payload"
    ROOTS = "at shared roots: at values of `shared()` fields, and at modules in the zone AUTO"
    MODULES = "at modules in the zone AUTO, also inside the values of `shared()` fields"


@attrs.frozen
class Stripped:
    """What a strip found. All objects are alive and in order of their first appearance.

    `externals[number]` is the object that the payload refers to by `number`; number 0 is None. `ends` are the lengths of
    `externals` after each of the stripped objects.
    """

    payload: bytes
    externals: list[Any]
    ends: list[int]
    shared: set[int]  # ids of tensors met in the zone SHARED
    roots: list[Any]  # where the strip stopped for them, in order of their first appearance
    private_reasons: dict[int, tuple[Any, str]]  # what is in the zone SHARED but cannot be shared, by id
    composites: list[Any]  # tensors of the zone SHARED that were taken apart
    components: list[Any]  # what they were taken apart into, where the pickler met it first: nobody else may hold it
    has_pipeline: bool
    seen: dict[int, Any]  # mutable objects inside the payload, by id
    memo_holder: Any  # keeps temporary objects alive: no id in `seen` is used twice


def strip(
    objects: Sequence[Any],
    *,
    zone: Zone,
    split: Split,
    within: Any = None,
    copied: Mapping[int, Collection[str]] | None = None,
    replaced: Mapping[int, Any] | None = None,
    number_code: bool = False,
) -> Stripped:
    """Pickle `objects` one after the other, with one memo, without what must travel beside them.

    Args:
        split: where to stop, beside at tensors.
        within: what holds the objects, for the path in an error. By default each of them is taken for itself.
        copied: attributes to treat as `copied()` fields, by the id of the object that has them.
        replaced: objects to pickle in the place of others, by the id of these.
        number_code: write numbers for classes and functions too: what is grafted in this process again must not make
            new ones of them.

    Raises:
        CannotTravelError: something inside cannot be pickled; the error names its path.
    """
    if zone is Zone.SHARED and split is Split.NOWHERE and not (copied or replaced or number_code):
        # An error is left to the long way, which knows where it is.
        with contextlib.suppress(Exception):
            return _as_stripped(strip_ordinary(objects))
    file = io.BytesIO()
    stripper = _Stripper(file, zone, split, copied or {}, replaced or {}, number_code)
    ends = []
    try:
        for obj in objects:
            stripper.dump(obj)
            ends.append(len(stripper.externals))
    except ZeroCopyError:
        raise
    except Exception as error:
        raise _cannot_travel(stripper.last, objects, within, error) from error
    if stripper.refused is not None:
        raise _cannot_travel(stripper.refused, objects, within, None)
    return Stripped(
        file.getvalue(), stripper.externals, ends, stripper.shared, stripper.roots, stripper.private_reasons,
        stripper.composites, stripper.components, stripper.has_pipeline, stripper.seen, stripper,
    )  # fmt: skip


def _as_stripped(found: Ordinary) -> Stripped:
    shared = set(map(id, found.externals[1:]))
    return Stripped(
        found.payload, found.externals, found.ends, shared, [], {}, [], [], False, found.seen, found.memo_holder
    )


def graft(payload: bytes, externals: Sequence[Any], count: int = 1) -> list[Any]:
    """Rebuild the `count` objects of a stripped payload around `externals`. The inverse of `strip`."""
    grafter = _Grafter(io.BytesIO(payload))
    grafter.external = grafter.persistent_load = externals.__getitem__  # type: ignore[method-assign]
    return [grafter.load() for _ in range(count)]


class _Grafter(pickle.Unpickler):
    external: Callable[[int], Any]

    def find_class(self, module: str, name: str) -> Any:
        return (
            self.external
            if module == external.__module__ and name == external.__name__
            else super().find_class(module, name)
        )


def _cannot_travel(culprit: object, objects: Sequence[Any], within: Any, error: Exception | None) -> CannotTravelError:
    holders = objects if within is None else [within, *objects]
    found = (paths.path_to(holder, culprit, paths.name_of(holder)) for holder in holders)
    path = next(filter(None, found), f"{paths.name_of(holders[0])}, below one of its attributes")
    kind = type(culprit).__name__
    if is_meta(culprit):
        return CannotTravelError(
            f"{path!r} is a meta tensor: it has no data to share.",
            hint="materialize it with to_empty() or load its weights first.",
            path=path,
            kind=kind,
        )
    return CannotTravelError(
        f"{path!r} is {_article(kind)} {kind!r}, which cannot leave its process: {error}.",
        hint="leave it out with __getstate__, or make it where it is used.",
        path=path,
        kind=kind,
    )


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


class _Stripper(CloudPickler):  # type: ignore[misc]
    def __init__(
        self,
        file: io.BytesIO,
        zone: Zone,
        split: Split,
        copied: Mapping[int, Collection[str]],
        replaced: Mapping[int, Any],
        number_code: bool,
    ) -> None:
        super().__init__(file, protocol=5)
        self.zone = zone
        self.split = split
        self.copied = {key: names for key, names in copied.items() if names}
        self.replaced = replaced
        self.number_code = number_code
        self.externals: list[Any] = [None]
        self.shared: set[int] = set()
        self.roots: list[Any] = []
        self.private_reasons: dict[int, tuple[Any, str]] = {}
        self.composites: list[Any] = []
        self.components: list[Any] = []
        self.has_pipeline = False
        self.seen: dict[int, Any] = {}
        self.last: object = None
        self.refused: object = None
        self._numbers: dict[int, int] = {}
        self._declared_roots: set[int] = set()
        self._roles = Roles()
        self._visits: dict[int, int] = {}
        self._whole: Any = None
        self._reduce_module = ModuleReducer()

    def persistent_id(self, obj: Any) -> int | None:
        cls = type(obj)
        if cls in SCALARS:
            return None
        role = self._roles[cls]
        if role is Role.SWITCH:
            self.zone = obj.zone or self.zone
            self._whole = obj.whole
            return 0
        if role is Role.SLOT:
            return self._numbers[id(obj.tensor)]
        self.last = obj
        if id(obj) in self.replaced:
            return None  # on to `reducer_override`
        if self.split is not Split.NOWHERE and self._is_root(obj, role):
            return self._number(obj, self.roots)
        if role is Role.ATOM:
            return self._number(obj) if self.number_code and isinstance(obj, _CODE) else None
        if role in _BESIDE:
            return self._number_beside(obj, role)
        if role in (Role.MODULE, Role.PARAMETRIZED) and self.zone is Zone.SHARED:
            self._note_reason(obj)
        self.seen[id(obj)] = obj
        return None

    def _number_beside(self, obj: Any, role: Role) -> int | None:
        if role is Role.TENSOR:
            return self._tensor_id(obj)
        return self._number(obj) if role is Role.PASSENGER else self._buffer_id(obj)

    def _is_root(self, obj: Any, role: Role) -> bool:
        if id(obj) in self._declared_roots or id(obj) in self._numbers:
            return True
        if id(obj) in self.seen or id(obj) in self.copied:  # written already in the zone COPIED; to be taken apart
            return False
        return role in MODULES and self.zone is not Zone.COPIED

    def _number(self, obj: Any, register: list[Any] | None = None) -> int:
        number = self._numbers.get(id(obj))
        if number is None:
            number = self._numbers[id(obj)] = len(self.externals)
            self.externals.append(obj)
            if register is not None:
                register.append(obj)
        return number

    def _tensor_id(self, obj: Any) -> int | None:
        if is_meta(obj):
            self.refused = self.refused if self.refused is not None else obj
            return 0
        if self.zone is Zone.SHARED:
            self._note_reason(obj)
        if not is_plain(obj):
            return None  # on to `reducer_override`, which takes it apart
        if self.zone is Zone.SHARED:
            self.shared.add(id(obj))
            if self._whole is not None and id(obj) not in self._numbers:
                self.components.append(obj)
        if id(obj) not in self._numbers and getattr(obj, "__dict__", None):
            self._number(obj)
            return None  # on to `reducer_override`, for its attributes
        if getattr(obj, "__dict__", None):
            return None  # the pickler's memo knows it
        return self._number(obj)

    def _note_reason(self, obj: Any) -> None:
        reason = reducers.why_copied(obj)
        if reason is not None:
            self.private_reasons[id(obj)] = obj, reason

    def _buffer_id(self, buffer: pickle.PickleBuffer) -> int | None:
        """Bytes that an object hands out as they lie, as Arrow does: an array over them, in the zone SHARED."""
        content = np.frombuffer(buffer.raw(), np.uint8)
        if self.zone is not Zone.SHARED or not content.nbytes:
            return None
        self.shared.add(id(content))
        self.components.append(content)
        return self._number(content)

    def reducer_override(self, obj: Any) -> Any:
        role = self._roles[type(obj)]
        if self.replaced and (reduced := self._replacement(obj)):
            return reduced
        if id(obj) in self.copied:
            return self._reduce_pipeline(obj)
        if role is Role.PARAMETRIZED:
            return reducers.reduce_parametrized(obj)
        if role is Role.PROGRAM:
            is_exported = isinstance(obj, ExportedProgram)
            reduced = export.reduce_exported(obj) if is_exported else programs.reduce_program(obj)
            return self._between(reduced, obj)
        if role is Role.WEAK_REFERENCE:
            return reducers.reduce_weak_reference(obj)
        if role is Role.FILE:
            return reducers.reduce_file(obj)
        if role is Role.PIPELINE:
            self.has_pipeline = True
            return self._reduce_pipeline(obj)
        if role is Role.TENSOR and id(obj) in self._numbers:
            return _identity, (Slot(obj),), vars(obj), None, None, set_attributes
        if role is Role.TENSOR:
            return self._take_apart(obj)
        lean = self._reduce_module(obj) if role is Role.MODULE else None
        return super().reducer_override(obj) if lean is None else lean

    def _replacement(self, obj: Any) -> Any:
        if id(obj) in self.replaced:
            return self.replaced[id(obj)].__reduce_ex__(5)
        if isinstance(obj, types.MethodType) and id(obj.__self__) in self.replaced:
            return getattr, (obj.__self__, obj.__func__.__name__)
        return None

    def _take_apart(self, whole: Any) -> Any:
        reduced = reducers.reduce_array(whole) if isinstance(whole, np.ndarray) else reducers.reduce_tensor(whole)
        if self.zone is Zone.SHARED:
            self.composites.append(whole)
        return self._between(reduced, whole)

    def _between(self, reduced: Any, whole: Any) -> Any:
        """A reduction during which whatever is met for the first time is a component of `whole`."""
        function, arguments, *rest = reduced
        before, after = Switch(None, whole), Switch(None, self._whole)
        return (_between, (before, function, arguments, after), *rest)

    def _reduce_pipeline(self, obj: Any) -> Any:
        # Not through the registered reducer, which would publish the pipeline while it is being published.
        reduced = obj.__reduce_ex__(5)
        if isinstance(reduced, str):
            return reduced
        prelude = self._prelude(obj, reduced[2] if len(reduced) > 2 else None)
        if not prelude:
            return reduced
        function, arguments, *rest = reduced
        return (_after_prelude, (prelude, function, arguments), *rest)

    def _prelude(self, obj: Any, state: Any) -> list[Any]:
        """The values of the pipeline's state, each written in the zone that rules it, ahead of the pipeline itself.

        When its state follows, the pickler's memo knows them all; so whatever way the class has to pickle itself, its
        policies hold. A pipeline that one of its attributes refers back to is met again before that.
        """
        visit = self._visits[id(obj)] = self._visits.get(id(obj), 0) + 1
        declared = self._fields_of(obj)
        held = paths.attributes_of(obj)
        if self.split is not Split.MODULES:
            self._declared_roots.update(id(value) for value in self._roots_among(obj, held, declared))
        copied_ids = {id(held[name]) for name, field in declared.items() if field.policy == "copied" and name in held}
        values = [value for value in _values_of(state) if type(value) not in SCALARS]
        copied = [value for value in values if id(value) in copied_ids]
        others = [value for value in values if id(value) not in copied_ids]
        inner = Zone.SHARED if self.zone is Zone.SHARED else Zone.AUTO
        prelude: list[Any] = []
        if visit == 1 and (copied or self.zone is Zone.COPIED):
            prelude += [Switch(inner), *others]
        if visit <= 2 and copied:
            prelude += [Switch(Zone.COPIED), *copied]
        return [*prelude, Switch(self.zone)] if prelude else []

    def _fields_of(self, obj: Any) -> Mapping[str, Field]:
        declared = fields(type(obj)) if is_pipeline_class(type(obj)) else {}
        return {**declared, **{name: Field(name, "copied") for name in self.copied.get(id(obj), ())}}

    def _roots_among(self, obj: Any, values: dict[str, Any], declared: Any) -> list[Any]:
        roots = [value for name, value in values.items() if name in declared and declared[name].policy == "shared"]
        roots = [value for value in roots if type(value) not in SCALARS]
        if isinstance(
            obj, nn.Module
        ):  # its own parameters and buffers belong to a module, as those of any module below it
            own = {**obj._parameters, **obj._buffers}
            roots += [value for name, value in own.items() if value is not None and name not in declared]
        return [value for value in roots if self._roles[type(value)] is not Role.PIPELINE]


def _values_of(state: Any) -> list[Any]:
    """The values of a pickled state: of its dict, of its slots, and of the members of a module."""
    parts = state if isinstance(state, tuple) else (state,)
    values = [value for part in parts if isinstance(part, dict) for value in part.values()]
    members = [
        part.get(name) for part in parts if isinstance(part, dict) for name in ("_modules", "_parameters", "_buffers")
    ]
    return values + [value for group in members if isinstance(group, dict) for value in group.values()]


def _after_prelude(_: object, function: Any, arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def _between(_: object, function: Any, arguments: tuple[Any, ...], __: object) -> Any:
    return function(*arguments)


def _identity(tensor: Any) -> Any:
    return tensor
