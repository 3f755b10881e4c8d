"""What is an object to the pickler: how it travels depends on its type alone, and is looked up once for each."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import pickle
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.actor
import torch
from torch import nn

from zerocopy._compat.torch import is_parametrized_class
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split import programs, reducers
from zerocopy._store.manifest import Handle


class Role(enum.Enum):
    """How instances of a type travel."""

    ATOM = enum.auto()  # immutable: copies of it cannot be told apart
    TENSOR = enum.auto()
    PIPELINE = enum.auto()
    MODULE = enum.auto()
    PASSENGER = enum.auto()  # travels beside the skeleton, so that Ray counts its references
    BUFFER = enum.auto()
    PARAMETRIZED = enum.auto()
    PROGRAM = enum.auto()
    WEAK_REFERENCE = enum.auto()
    FILE = enum.auto()
    OTHER = enum.auto()


_ATOMS = (
    str, bytes, int, float, complex, bool, type(None), type(...), type(NotImplemented), tuple, frozenset, range, slice, type,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, types.CodeType, types.CellType,
    types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType, property,
    torch.dtype, torch.layout, torch.memory_format, torch.device, torch.Size, np.dtype, np.generic, enum.Enum,
    pathlib.PurePath, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, decimal.Decimal,
    fractions.Fraction,
)  # fmt: skip

# Found by the automatic rule.
MODULES = frozenset({Role.MODULE, Role.PARAMETRIZED, Role.PROGRAM})

# Not worth a memo, a zone or a path.
SCALARS = frozenset({str, int, float, bool, type(None), bytes, complex})


class Roles(dict[type, Role]):
    """The roles of instances by type, each looked up once. Made anew for each pickling: it would keep users' classes alive."""

    def __missing__(self, cls: type) -> Role:
        role = self[cls] = _classify(cls)
        return role


def _classify(cls: type) -> Role:
    if issubclass(cls, (torch.Tensor, np.ndarray)):
        return Role.TENSOR
    if issubclass(cls, (ray.ObjectRef, ray.actor.ActorHandle, Handle)):
        return Role.PASSENGER
    for bases, role in _roles_by_base():
        if issubclass(cls, bases):
            return role
    if cls is weakref.ref:
        return Role.WEAK_REFERENCE
    if is_parametrized_class(cls):
        return Role.PARAMETRIZED
    if is_pipeline_class(cls):
        return Role.PIPELINE
    if issubclass(cls, nn.Module):
        return Role.MODULE
    return Role.ATOM if issubclass(cls, _ATOMS) else Role.OTHER


def _roles_by_base() -> Iterator[tuple[Any, Role]]:
    yield pickle.PickleBuffer, Role.BUFFER
    yield reducers.FILES, Role.FILE
    yield programs.PROGRAMS, Role.PROGRAM
