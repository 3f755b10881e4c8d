"""What is the short way to split an object from its tensors, and what is the result of any split?

The short way is for ordinary modules, plain tensors and data, so for most models. Pickle calls the `persistent_id` of a pickler
for every string and number. Without it, pickle calls back only for objects that are not of built-in types, a tenth as often. So
the short way has no `persistent_id`: it writes a tensor as a call of `external`, and `graft` replaces `external` with a function
that finds tensors by their numbers.

Everything else takes the long way, in `skeleton.py`: policies, composite tensors, programs, references, errors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import attrs

from zerocopy._compat.cpython import written_objects
from zerocopy._compat.ray import CloudPickler
from zerocopy._split import reducers
from zerocopy._split.modules import ModuleReducer
from zerocopy._split.roles import SCALARS, Role, Roles
from zerocopy._store.tensors import is_meta, is_plain

_DATA = (Role.OTHER, Role.ATOM)
_IMMUTABLE = (Role.ATOM, Role.TENSOR)


class NotOrdinary(Exception):
    """An object needs the long way."""


@attrs.define(eq=False)
class Stripped:
    """The result of a strip. All objects are alive, in the order in which the pickler met them.

    Attributes:
        payload: the pickled bytes.
        externals: the objects that the payload refers to by number; number 0 is None.
        ends: length of `externals` after each of the stripped objects.
        payload_ends: length of `payload` after each of them.
        shared: ids of the tensors that were met in the zone SHARED.
        roots: the shared roots at which the strip stopped.
        private_reasons: objects in the zone SHARED that cannot be shared, and why, by id.
        composites: tensors of the zone SHARED that were taken apart, and tensors of modules that have their own way to pickle and
            may not pickle the tensors unchanged.
        components: the parts of tensors that were taken apart. Perhaps nothing else holds them.
        has_pipeline: whether a pipeline was met.
        seen: mutable objects inside the payload, by id.
    """

    payload: bytes = b""
    externals: list[Any] = attrs.field(factory=lambda: [None])
    ends: list[int] = attrs.field(factory=list)
    payload_ends: list[int] = attrs.field(factory=list)
    shared: set[int] = attrs.field(factory=set)
    roots: list[Any] = attrs.field(factory=list)
    private_reasons: dict[int, tuple[Any, str]] = attrs.field(factory=dict)
    composites: list[Any] = attrs.field(factory=list)
    components: list[Any] = attrs.field(factory=list)
    has_pipeline: bool = False
    seen: dict[int, Any] = attrs.field(factory=dict)


def external(number: int) -> Any:
    """Stands in a payload for the function that finds an external by its number."""
    raise pickle.UnpicklingError(f"external {number} was read without its skeleton")


def strip_ordinary(objects: Sequence[Any]) -> Stripped:
    """Split `objects`, all of whose tensors are shared.

    Raises:
        NotOrdinary: they need the long way.
        Exception: any error of pickle or of the objects. The long way finds out where it is.
    """
    file = io.BytesIO()
    stripper = _ShortStripper(file)
    found = Stripped(externals=stripper.externals, composites=stripper.composites)
    for obj in objects:
        stripper.dump(obj)
        found.ends.append(len(found.externals))
        found.payload_ends.append(file.tell())
    found.payload = file.getvalue()
    found.shared.update(map(id, found.externals[1:]))
    written = written_objects(stripper)
    mutable = {cls for cls in set(map(type, written)) if cls not in SCALARS and stripper.roles[cls] not in _IMMUTABLE}
    found.seen = {id(obj): obj for obj in written if type(obj) in mutable}
    return found


class _ShortStripper(CloudPickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5, buffer_callback=_not_ordinary)
        self.externals: list[Any] = [None]
        self.composites: list[Any] = []
        self.roles = Roles()
        self._modules = ModuleReducer()

    def reducer_override(self, obj: Any) -> Any:
        role = self.roles[type(obj)]
        if role is Role.MODULE:
            reduced = self._modules.reduce(obj)
            if reduced is not None:
                return reduced
            if reducers.why_copied(obj) is None:
                self.composites += reducers.tensors_of(obj)
                return reducers.reduce_as_pickle(obj)
        elif role is Role.TENSOR:
            if is_plain(obj) and not is_meta(obj):
                self.externals.append(obj)
                made = external, (len(self.externals) - 1,)
                attributes = getattr(obj, "__dict__", None)
                return (*made, attributes, None, None, reducers.set_attributes) if attributes else made
        elif role in _DATA:
            return super().reducer_override(obj)
        raise NotOrdinary


def _not_ordinary(_: pickle.PickleBuffer) -> Any:
    raise NotOrdinary
