"""The short way to split an object from its tensors, for what holds ordinary modules, plain tensors and data: most models.

Pickle asks a `persistent_id` about every string and number. Without one it calls back only for what is not built in, a tenth
of that. So tensors are written as calls, of what stands for `external` where they are read. Whatever needs more is left to
`_skeleton`: parts with policies of their own, tensors that have to be taken apart, programs, references, errors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from zerocopy._compat.cpython import written_objects
from zerocopy._compat.ray import CloudPickler
from zerocopy._split import reducers
from zerocopy._split.modules import ModuleReducer
from zerocopy._split.roles import SCALARS, Role, Roles
from zerocopy._store.tensors import is_meta, is_plain

_DATA = (Role.OTHER, Role.ATOM)
_IMMUTABLE = (Role.ATOM, Role.TENSOR)


class NotOrdinary(Exception):
    """There is something that only the long way knows how to split."""


class Ordinary(NamedTuple):
    """What was split: as `Stripped` in `_skeleton`."""

    payload: bytes
    externals: list[Any]
    ends: list[int]
    seen: dict[int, Any]
    memo_holder: Any


def external(number: int) -> Any:
    """Stands in a payload for what finds externals by their numbers."""
    raise pickle.UnpicklingError(f"external {number} was read without its skeleton")


def set_attributes(tensor: Any, attributes: dict[str, Any]) -> None:
    """Give a tensor the Python attributes that it had."""
    vars(tensor).update(attributes)


def strip_ordinary(objects: Sequence[Any]) -> Ordinary:
    """Split `objects`, all of whose tensors are shared.

    Raises:
        NotOrdinary: they need the long way.
        Exception: whatever pickle or the objects raise; the long way tells where.
    """
    file = io.BytesIO()
    stripper = _ShortStripper(file)
    ends = []
    for obj in objects:
        stripper.dump(obj)
        ends.append(len(stripper.externals))
    return Ordinary(file.getvalue(), stripper.externals, ends, _seen(stripper), stripper)


def _seen(stripper: Any) -> dict[int, Any]:
    """Mutable objects that were written, by id."""
    written = written_objects(stripper)
    mutable = {cls for cls in set(map(type, written)) if cls not in SCALARS and stripper.roles[cls] not in _IMMUTABLE}
    return {id(obj): obj for obj in written if type(obj) in mutable}


class _ShortStripper(CloudPickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5, buffer_callback=_not_ordinary)
        self.externals: list[Any] = [None]
        self.roles = Roles()
        self._reduce_module = ModuleReducer()

    def reducer_override(self, obj: Any) -> Any:
        role = self.roles[type(obj)]
        if role is Role.MODULE:
            reduced = self._reduce_module(obj)
            if reduced is not None:
                return reduced
            if reducers.why_copied(obj) is None:
                return super().reducer_override(obj)
        elif role is Role.TENSOR:
            if is_plain(obj) and not is_meta(obj):
                self.externals.append(obj)
                made = external, (len(self.externals) - 1,)
                attributes = getattr(obj, "__dict__", None)
                return (*made, attributes, None, None, set_attributes) if attributes else made
        elif role in _DATA:
            return super().reducer_override(obj)
        raise NotOrdinary


def _not_ordinary(_: pickle.PickleBuffer) -> Any:
    raise NotOrdinary
