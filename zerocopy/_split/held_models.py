"""Which models does an object without declarations hold?

This check runs for each argument of each call, so it examines only a few objects.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from zerocopy._compat.cpython import slot_names
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split.programs import PROGRAMS
from zerocopy._store.manifest import Handle

LOOKED_AT = 64  # objects that are examined per argument, in a few microseconds

_PLAIN = frozenset({str, int, float, bool, type(None), bytes, complex, bytearray, type, np.ndarray, torch.Tensor})
_MODELS = (nn.Module, *PROGRAMS)
_WITHOUT_ATTRIBUTES = frozenset({dict, list, tuple, set, frozenset, deque, types.MethodType})
_DATA = frozenset({"numpy", "pandas", "pyarrow", "ray"})  # packages whose objects hold no models

Steps: TypeAlias = tuple[tuple[str, Any], ...]  # each step has a format, and a value to insert into it


def holds_models(argument: Any) -> bool:
    """Whether an argument is or holds a model. Only a few of its objects are examined."""
    if type(argument) in _PLAIN:
        return False
    try:
        return next(models_in(argument), None) is not None
    except Exception:  # an error in the user's classes, which pickle will get too
        return False


def models_in(argument: Any) -> Iterator[tuple[Steps, Any]]:
    """Yields the models in an argument, with the steps to them. Models in pipelines are left out, because they arrive loaded."""
    queue: deque[tuple[Steps, Any]] = deque([((), argument)])
    looked_at = 0
    while queue and looked_at < LOOKED_AT:
        steps, obj = queue.popleft()
        cls = type(obj)
        if issubclass(cls, _MODELS) and not is_pipeline_class(cls):
            yield steps, obj
        elif (
            not issubclass(cls, Handle) and not is_pipeline_class(cls) and cls.__module__.partition(".")[0] not in _DATA
        ):
            for form, key, value in itertools.islice(_children(obj), LOOKED_AT - looked_at):
                looked_at += 1
                if type(value) not in _PLAIN:
                    queue.append(((*steps, (form, key)), value))


def _children(obj: Any) -> Iterator[tuple[str, Any, Any]]:
    """For each child of an object: the format of the step to it, the value to insert into the format, and the child."""
    cls = type(obj)
    if issubclass(cls, dict):
        yield from (("[{!r}]", key, value) for key, value in dict.items(obj))
    elif issubclass(cls, (list, tuple, deque)):
        yield from (("[{}]", position, value) for position, value in enumerate(obj))
    elif issubclass(cls, (set, frozenset)):
        yield from (("{{...}}", None, value) for value in obj)
    elif issubclass(cls, functools.partial):
        yield from ((".{}", name, getattr(obj, name)) for name in ("func", "args", "keywords"))
    elif issubclass(cls, types.MethodType):
        yield ".{}", "__self__", obj.__self__
    elif issubclass(cls, types.FunctionType):
        cells = zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True)
        yield from ((".<closure {!r}>", name, value) for name, cell in cells for value in _content(cell))
    if cls in _WITHOUT_ATTRIBUTES or issubclass(cls, (type, types.ModuleType)):
        return
    members = getattr(obj, "__dict__", None)
    if isinstance(members, dict):
        yield from ((".{}", name, value) for name, value in members.items())
    yield from ((".{}", name, getattr(obj, name)) for name in slot_names(cls) if hasattr(obj, name))


def _content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []
