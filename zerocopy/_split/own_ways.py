"""Which objects may copy the tensors of their state when they are loaded, because their class has its own way to pickle?

Pickle gives an object its state unchanged. But the class decides what to do with the state: its `__setstate__` may convert an
array, and a constructor that its `__reduce__` names may copy an array. Only a load shows whether it does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import attrs

from zerocopy._compat.cpython import slot_names
from zerocopy._compat.ray import registered_reducer
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.storages import COPIED
from zerocopy._store.tensors import is_plain, is_tensor_or_array
from zerocopy.errors import CannotTravelError

_RESTORING = ("__setstate__", "__reduce_ex__", "__reduce__", "__getnewargs_ex__", "__getnewargs__")
# The methods that pickle calls to fill an object of a class that is derived from one of these.
_FILLING = {dict: ("__setitem__",), list: ("extend", "append"), tuple: ("__new__",)}
# Classes of these packages keep their data unchanged. Python's generated code for named tuples is in modules `namedtuple_...`.
_FAITHFUL = {"attr", "numpy", "pandas", "pyarrow", "ray", "torch", "zerocopy", *sys.stdlib_module_names}


@attrs.frozen
class OwnWay:
    """An object whose class has its own way to pickle.

    Attributes:
        path: where it is.
        method: the method of the class that does this, such as `Index.__setstate__`.
        nbytes: bytes of the tensors and arrays that the class receives when the object is loaded.
        pickled: bytes of everything else that the class receives.
    """

    path: str
    method: str
    nbytes: int
    pickled: int


def own_ways(objects: Iterable[tuple[str, Any]]) -> Iterator[OwnWay]:
    """Those of these objects, given with their paths, whose class has its own way to pickle."""
    found: dict[type, tuple[str, bool] | None] = {}  # by class, because thousands of modules have few classes
    for path, obj in objects:
        cls = type(obj)
        if cls not in found:
            found[cls] = _way_of(cls)
        way = found[cls]
        if way is not None:
            yield from _measured(path, obj, *way)


def _way_of(cls: type) -> tuple[str, bool] | None:
    """The method by which `cls` pickles its instances in its own way, and whether it restores them; None if there is none."""
    if registered_reducer(cls) is not None and not _is_faithful(cls.__module__):
        return f"the serializer that is registered for {cls.__name__}", True
    filling = [name for base, names in _FILLING.items() if issubclass(cls, base) for name in names]
    filling += ["__setattr__"] if slot_names(cls) and not hasattr(cls, "__setstate__") else []
    if restoring := _method_of(cls, (*_RESTORING, *filling)):
        return restoring, True
    # The result of `__getstate__` is restored unchanged, but it may be bytes.
    giving = _method_of(cls, ("__getstate__",))
    return None if giving is None else (giving, False)


def _method_of(cls: type, names: Iterable[str]) -> str | None:
    """The first of these methods that is not from a module known to keep data unchanged; None if there is none."""
    for name in names:
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        method = vars(owner).get(name)
        method = method.__func__ if isinstance(method, staticmethod) else method
        # Functions that attrs generates name the user's module as theirs, but their globals are those of attrs.
        module = method.__globals__["__name__"] if inspect.isfunction(method) else owner.__module__
        if method is not None and not _is_faithful(module):
            return f"{owner.__name__}.{name}"
    return None


def _is_faithful(module: str) -> bool:
    return module.partition(".")[0] in _FAITHFUL or module.startswith("namedtuple_")


def _measured(path: str, obj: Any, method: str, restores: bool) -> Iterator[OwnWay]:
    try:
        stripped = strip([obj], zone=Zone.SHARED, split=Split.NOWHERE)
    except CannotTravelError:  # the object that holds it does not pickle it
        return
    tensors = [held for held in stripped.externals if is_tensor_or_array(held) and is_plain(held)]
    nbytes = sum(held.nbytes for held in tensors if held.nbytes > COPIED) if restores else 0
    yield OwnWay(path, method, nbytes, len(stripped.payload))
