"""How is an object split from its tensors, and joined again?

`strip` is a pickler that writes a number instead of each tensor, and instead of each other object that must travel beside the
bytes. What remains is the skeleton. `graft` is the inverse. Because pickle does the walk, it meets all that pickle would meet, at
any depth; identity is kept, and no property is evaluated.

There are two ways to strip. The short one, in `ordinary.py`, is for what is shared as a whole and holds nothing special. The
long one is here. It asks for each object how its type travels (`roles.py`), and which policy rules there (`zones.py`).
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

from zerocopy._compat.ray import CloudPickler
from zerocopy._split import paths, programs, reducers
from zerocopy._split.modules import ModuleReducer
from zerocopy._split.ordinary import Stripped, external, strip_ordinary
from zerocopy._split.roles import MODULES, SCALARS, Role, Roles
from zerocopy._split.zones import PipelineReducer, Place, Zone, components_of
from zerocopy._store.tensors import is_meta, is_plain
from zerocopy.errors import CannotTravelError, ZeroCopyError


class Split(enum.Enum):
    """Where a strip stops. It always stops at tensors."""

    NOWHERE = "everything is in the payload"
    ROOTS = "at shared roots: at values of `shared()` fields, and at modules in the zone AUTO"
    MODULES = "at modules in the zone AUTO, also inside the values of `shared()` fields"


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
        zone: the policy that rules the objects.
        split: where to stop, beside at tensors.
        within: what holds the objects: the path in an error starts there. None if they are held by nothing else.
        copied: attributes to treat as `copied()` fields, by the id of the object that has them.
        replaced: objects to pickle in the place of others, by the id of these.
        number_code: write numbers for classes and functions too, so that a graft in this process makes no new ones.

    Raises:
        CannotTravelError: something inside cannot be pickled; the error names its path.
    """
    rules = _Rules(split, {key: names for key, names in (copied or {}).items() if names}, replaced or {}, number_code)
    if zone is Zone.SHARED and rules == _NO_RULES:
        # After an error the long way finds out where it is.
        with contextlib.suppress(Exception):
            return strip_ordinary(objects)
    file = io.BytesIO()
    stripper = _Stripper(file, Place(zone), rules)
    found = stripper.found
    try:
        for obj in objects:
            stripper.dump(obj)
            found.ends.append(len(found.externals))
            found.payload_ends.append(file.tell())
    except ZeroCopyError:
        raise
    except Exception as error:
        raise _cannot_travel(stripper.last, objects, within, error) from error
    found.payload = file.getvalue()
    return found


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


def _cannot_travel(culprit: object, objects: Sequence[Any], within: Any, error: Exception) -> CannotTravelError:
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
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    return CannotTravelError(
        f"{path!r} is {article} {kind!r}, which cannot leave its process: {error}.",
        hint="leave it out with __getstate__, or make it where it is used.",
        path=path,
        kind=kind,
    )


@attrs.frozen
class _Rules:
    """What `strip` was asked for; see there."""

    split: Split = Split.NOWHERE
    copied: Mapping[int, Collection[str]] = attrs.field(factory=dict)
    replaced: Mapping[int, Any] = attrs.field(factory=dict)
    number_code: bool = False


_NO_RULES = _Rules()
_REDUCERS: dict[Role, Callable[[Any], Any]] = {
    Role.PARAMETRIZED: reducers.reduce_parametrized,
    Role.WEAK_REFERENCE: reducers.reduce_weak_reference,
    Role.FILE: reducers.reduce_file,
}


class _Stripper(CloudPickler):  # type: ignore[misc]
    """The long way.

    Attributes:
        found: the result.
        place: where the pickler is.
        last: the object that it met last: after an error the culprit.
    """

    def __init__(self, file: io.BytesIO, place: Place, rules: _Rules) -> None:
        super().__init__(file, protocol=5)
        self.found = Stripped()
        self.place = place
        self.last: object = None
        self._rules = rules
        self._numbers: dict[int, int] = {}  # of externals, by id
        self._roles = Roles()
        self._pipelines = PipelineReducer(rules.copied, self._roles)
        self._modules = ModuleReducer()

    def persistent_id(self, obj: Any) -> int | None:
        """The number that is written instead of `obj`, or None where it is written itself."""
        cls = type(obj)
        if cls in SCALARS:
            return None
        if cls is Place:
            self.place = obj
            return 0
        self.last = obj
        role = self._roles[cls]
        if id(obj) in self._rules.replaced:
            return None  # on to `reducer_override`
        if self._rules.split is not Split.NOWHERE and self._is_root(obj, role):
            return self._number(obj, is_root=True)
        if role is Role.TENSOR:
            return self._tensor_number(obj)
        if role is Role.BUFFER:
            return self._buffer_number(obj)
        if role is Role.PASSENGER or (role is Role.ATOM and self._is_code_to_number(obj)):
            return self._number(obj)
        if role is not Role.ATOM:
            self.found.seen[id(obj)] = obj
            if self.place.zone is Zone.SHARED and paths.is_module(obj):
                self._note_reason(obj)
        return None

    def _is_root(self, obj: Any, role: Role) -> bool:
        if id(obj) in self._numbers or (self._rules.split is Split.ROOTS and id(obj) in self._pipelines.roots):
            return True
        if id(obj) in self.found.seen or id(obj) in self._rules.copied:
            return False  # it was written in the zone COPIED already, or is to be taken apart
        return role in MODULES and self.place.zone is not Zone.COPIED

    def _is_code_to_number(self, obj: Any) -> bool:
        # `graft` knows `external` by its name.
        return self._rules.number_code and isinstance(obj, (type, types.FunctionType)) and obj is not external

    def _number(self, obj: Any, *, is_root: bool = False) -> int:
        number = self._numbers.get(id(obj))
        if number is None:
            number = self._numbers[id(obj)] = len(self.found.externals)
            self.found.externals.append(obj)
            if is_root:
                self.found.roots.append(obj)
        return number

    def _tensor_number(self, tensor: Any) -> int | None:
        """None where `reducer_override` has to go on: for a composite, and for a plain tensor with Python attributes."""
        if is_meta(tensor):
            raise TypeError("a meta tensor has no data")
        is_shared = self.place.zone is Zone.SHARED
        if is_shared:
            self._note_reason(tensor)
        if not is_plain(tensor):
            return None
        if is_shared:
            self.found.shared.add(id(tensor))
            if self.place.composite is not None and id(tensor) not in self._numbers:
                self.found.components.append(tensor)
        number = self._number(tensor)
        return None if getattr(tensor, "__dict__", None) else number

    def _buffer_number(self, buffer: pickle.PickleBuffer) -> int | None:
        """Bytes that an object gives to pickle as they are, as Arrow does. In the zone SHARED an array over them is shared."""
        content = np.frombuffer(buffer.raw(), np.uint8)
        if self.place.zone is not Zone.SHARED or not content.nbytes:
            return None
        self.found.shared.add(id(content))
        self.found.components.append(content)
        return self._number(content)

    def _note_reason(self, obj: Any) -> None:
        reason = reducers.why_copied(obj)
        if reason is not None:
            self.found.private_reasons[id(obj)] = obj, reason

    def reducer_override(self, obj: Any) -> Any:
        """How to write an object that got no number, and that pickle itself cannot write."""
        role = self._roles[type(obj)]
        if self._rules.replaced and (reduced := self._replacement(obj)):
            return reduced
        if role is Role.PIPELINE or id(obj) in self._rules.copied:
            self.found.has_pipeline |= role is Role.PIPELINE
            return self._pipelines.reduce(obj, self.place)
        if role is Role.MODULE and (lean := self._modules.reduce(obj)):
            return lean
        if role in _REDUCERS:
            return _REDUCERS[role](obj)
        if role is Role.PROGRAM:
            return components_of(obj, programs.reduce_program(obj), self.place)
        if role is Role.TENSOR:
            return self._reduce_tensor(obj)
        return super().reducer_override(obj)

    def _replacement(self, obj: Any) -> Any:
        if id(obj) in self._rules.replaced:
            return self._rules.replaced[id(obj)].__reduce_ex__(5)
        if isinstance(obj, types.MethodType) and id(obj.__self__) in self._rules.replaced:
            return getattr, (obj.__self__, obj.__func__.__name__)
        return None

    def _reduce_tensor(self, tensor: Any) -> Any:
        if id(tensor) in self._numbers:  # it is plain, and has attributes
            return external, (self._numbers[id(tensor)],), vars(tensor), None, None, reducers.set_attributes
        if self.place.zone is Zone.SHARED:
            self.found.composites.append(tensor)
        return components_of(tensor, reducers.reduce_composite(tensor), self.place)
