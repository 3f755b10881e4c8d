"""How is an object split from its tensors, and joined again?

`strip` is a pickler that writes a number instead of each tensor, and instead of each other object that must travel beside the
bytes. The result is the skeleton. `graft` is the inverse. Because pickle walks the object, `strip` meets every object that pickle
would meet, at any depth; identity is kept, and no property is evaluated.

There are two ways to strip. The short way, in `ordinary.py`, is for objects that are shared as a whole and contain nothing
special. The long way is here. For each object, it finds out how its type travels (`roles.py`), and which policy applies there
(`zones.py`).
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
from torch.export import ExportedProgram

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
    """Pickle `objects` one after the other, with one memo, without the objects that must travel beside them.

    Args:
        zone: the policy that applies to the objects.
        split: where to stop, in addition to tensors.
        within: the object that holds `objects`: the path in an error starts there. None if no other object holds them.
        copied: attributes to treat as `copied()` fields, by the id of the object that has them.
        replaced: objects to pickle instead of others, by the id of the others.
        number_code: write numbers for classes and functions too, so that a graft in this process creates no new ones.

    Raises:
        CannotTravelError: an object inside cannot be pickled. The error names its path.
    """
    rules = _Rules(split, {key: names for key, names in (copied or {}).items() if names}, replaced or {}, number_code)
    if zone is Zone.SHARED and rules == _NO_RULES:
        # After an error, the long way finds out where it is.
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
        raise _cannot_travel(stripper, objects if within is None else [within, *objects], error) from error
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


def _cannot_travel(stripper: _Stripper, holders: Sequence[Any], error: Exception) -> CannotTravelError:
    """The error for the object at which a strip failed. Its path starts at one of the `holders`."""
    if isinstance(program := stripper.met[-1], ExportedProgram):
        parts = [program.state_dict, program.constants, program.example_inputs]
        stripper, error = stripper.failure_at(parts) or (stripper, error)
    culprit = stripper.met[-1]
    path, is_culprit = _where(stripper, culprit, holders)
    kind = type(culprit).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    if is_meta(culprit):
        problem, hint = "a meta tensor: it has no data to share", _hint_for_meta(culprit, stripper.met)
    else:
        problem = f"{article} {kind!r}, which cannot leave its process: {error}"
        hint = "leave it out with __getstate__, or make it where it is used."
    text = f"{path!r} is {problem}." if is_culprit else f"{path!r} brings along {problem}."
    return CannotTravelError(text, hint=hint, path=path, kind=kind)


def _where(stripper: _Stripper, culprit: object, holders: Sequence[Any]) -> tuple[str, bool]:
    """The path of the culprit, and True. If no path leads to it: the path of the object that led to it, and False.

    An object that another object pickles instead of itself has no path. That other object is the last one met that also fails
    when it is pickled alone.
    """
    known: dict[int, str] = {}
    for holder in holders:
        for path, obj in paths.walk(holder, paths.name_of(holder)):
            known.setdefault(id(obj), path)
    if id(culprit) in known:
        return known[id(culprit)], True
    reachable = (obj for obj in reversed(stripper.met) if id(obj) in known)
    holder = next((obj for obj in reachable if stripper.failure_at(obj)), holders[0])
    below = paths.walk(holder, known[id(holder)]) if is_meta(culprit) else ()
    twin = next((path for path, obj in below if is_meta(obj)), None)  # a program pickles other tensors than it holds
    return (twin, True) if twin else (known[id(holder)], False)


def _hint_for_meta(tensor: Any, met: Sequence[Any]) -> str:
    """Loading weights is the only way: after `to_empty()`, the tensors would have undefined values without any warning."""
    hooked = [module for module in paths.modules_among(met) if "_hf_hook" in vars(module)]
    if any(tensor is own for module in hooked for own in reducers.tensors_of(module)):
        return "accelerate has offloaded its weights: load the model without offloading, as with device_map='cpu'."
    return "load its weights first, as with load_state_dict(weights, assign=True)."


@attrs.frozen
class _Rules:
    """The options of `strip`; see there."""

    split: Split = Split.NOWHERE
    copied: Mapping[int, Collection[str]] = attrs.field(factory=dict)
    replaced: Mapping[int, Any] = attrs.field(factory=dict)
    number_code: bool = False


_NO_RULES = _Rules()
_REDUCERS: dict[Role, Callable[[Any], Any]] = {
    Role.PARAMETRIZED: reducers.reduce_parametrized,
    Role.WEAK_REFERENCE: reducers.reduce_weak_reference,
    Role.FILE: reducers.reduce_file,
    Role.PACKED: reducers.reduce_packed,
}


class _Stripper(CloudPickler):  # type: ignore[misc]
    """The long way.

    Attributes:
        found: the result.
        place: where the pickler is.
        met: the objects that it met, in order. After an error the last one is the culprit.
    """

    def __init__(self, file: io.BytesIO, place: Place, rules: _Rules) -> None:
        super().__init__(file, protocol=5)
        self.found = Stripped()
        self.place = place
        self.met: list[Any] = []
        self._rules = rules
        self._numbers: dict[int, int] = {}  # of externals, by id
        self._roles = Roles()
        self._pipelines = PipelineReducer(rules.copied, self._roles)
        self._modules = ModuleReducer()

    def persistent_id(self, obj: Any) -> int | None:
        """The number that is written instead of `obj`, or None if `obj` itself is written."""
        cls = type(obj)
        if cls in SCALARS:
            return None
        if cls is Place:
            self.place = obj
            return 0
        self.met.append(obj)
        role = self._roles[cls]
        if id(obj) in self._rules.replaced:
            return None  # `reducer_override` handles it
        if self._rules.split is not Split.NOWHERE and self._is_root(obj, role):
            return self._number(obj, is_root=True)
        if role is Role.TENSOR and cls not in self._roles.registered:
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

    def failure_at(self, obj: Any) -> tuple[_Stripper, Exception] | None:
        """Strip `obj` alone, in the present zone. If this fails, return that stripper and its error; else None."""
        alone = _Stripper(io.BytesIO(), Place(self.place.zone), self._rules)
        try:
            alone.dump(obj)
        except Exception as error:
            return alone, error
        return None

    def _is_root(self, obj: Any, role: Role) -> bool:
        if id(obj) in self._numbers or (self._rules.split is Split.ROOTS and id(obj) in self._pipelines.roots):
            return True
        if id(obj) in self.found.seen or id(obj) in self._rules.copied:
            return False  # it was already written in the zone COPIED, or will be taken apart
        return role in MODULES and self.place.zone is not Zone.COPIED

    def _is_code_to_number(self, obj: Any) -> bool:
        # `graft` recognizes `external` by its name.
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
        """None if `reducer_override` has to handle the tensor: a composite, or a plain tensor with Python attributes."""
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
        """The number of raw bytes that an object (of Arrow, say) passes to pickle. The zone SHARED shares an array over them.

        None in other zones, and for no bytes: pickle writes them.
        """
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
        """How to write an object that has no number, and that pickle does not write on its own."""
        role = self._roles[type(obj)]
        if self._rules.replaced and (reduced := self._replacement(obj)):
            return reduced
        if role is Role.PIPELINE or id(obj) in self._rules.copied:
            self.found.has_pipeline |= role is Role.PIPELINE
            return self._pipelines.reduce(obj, self.place)
        if type(obj) in self._roles.registered or role is Role.MODULE:
            return self._reduce_as_pickle(obj)
        if role in _REDUCERS:
            return _REDUCERS[role](obj)
        if role is Role.PROGRAM:
            return components_of(obj, programs.reduce_program(obj), self.place)
        if role is Role.TENSOR:
            return self._reduce_tensor(obj)
        return super().reducer_override(obj)

    def _reduce_as_pickle(self, obj: Any) -> Any:
        """Reduces a module, or an object for which a user has registered a reducer."""
        if type(obj) not in self._roles.registered and (lean := self._modules.reduce(obj)):
            return lean
        if self.place.zone is Zone.SHARED:
            self.found.composites += reducers.tensors_of(obj)
        return reducers.reduce_as_pickle(obj)

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
