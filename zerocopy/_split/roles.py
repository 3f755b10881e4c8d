"""How does the pickler treat an object? This depends only on the type of the object."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import pickle
import types
import weakref
from typing import Any

import numpy as np
import ray
import ray.actor
import torch
from torch import nn

from zerocopy._compat.ray import registered_reducer
from zerocopy._compat.torch import is_parametrized_class
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split import programs, reducers
from zerocopy._store.manifest import Handle


class Role(enum.Enum):
    """How instances of a type travel."""

    ATOM = enum.auto()  # immutable: copies of it cannot be distinguished
    TENSOR = enum.auto()  # or a NumPy array
    PIPELINE = enum.auto()
    MODULE = enum.auto()
    PASSENGER = enum.auto()  # travels beside the skeleton, so that Ray counts its references
    BUFFER = enum.auto()  # raw bytes that an object passes to pickle
    PARAMETRIZED = enum.auto()  # a module with parametrizations
    PROGRAM = enum.auto()  # TorchScript, or an exported program
    WEAK_REFERENCE = enum.auto()
    FILE = enum.auto()
    PACKED = enum.auto()  # a TorchScript object, for example with the packed weights of a quantized module
    OTHER = enum.auto()


_VALUES = (str, bytes, int, float, complex, tuple, frozenset)

_ATOMS = (
    str, bytes, int, float, complex, bool, type(None), type(...), type(NotImplemented), tuple, frozenset, range, slice, type,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, types.CodeType, types.CellType,
    types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType, property,
    torch.dtype, torch.layout, torch.memory_format, torch.device, torch.Size, np.dtype, np.generic, enum.Enum,
    pathlib.PurePath, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, decimal.Decimal,
    fractions.Fraction,
)  # fmt: skip

# The roles that the zone AUTO shares.
MODULES = frozenset({Role.MODULE, Role.PARAMETRIZED, Role.PROGRAM})

# Objects of these types are the same in every zone, and never cause an error.
SCALARS = frozenset({str, int, float, bool, type(None), bytes, complex})

_ROLES_BY_BASE: tuple[tuple[Any, Role], ...] = (
    ((torch.Tensor, np.ndarray), Role.TENSOR),
    ((ray.ObjectRef, ray.actor.ActorHandle, Handle), Role.PASSENGER),
    (pickle.PickleBuffer, Role.BUFFER),
    (reducers.FILES, Role.FILE),
    (programs.PROGRAMS, Role.PROGRAM),
    (torch.ScriptObject, Role.PACKED),
)


# Shared objects of these types need no reducer, and Ray itself may register one for its own ways to send tensors.
_ALWAYS_SHARED = frozenset({torch.Tensor, nn.Parameter, np.ndarray})

# Objects that travel beside the skeleton, or that pickle writes before it looks for reducers.
_NEVER_REDUCED = frozenset({Role.PASSENGER, Role.BUFFER})


class Roles(dict[type, Role]):
    """The roles of instances by type, each computed once.

    It is created for each pickling, because it keeps the types alive, and users may register and deregister reducers.

    Attributes:
        registered: the types, of those found so far, for which a user has registered a reducer. This reducer has priority.
    """

    def __init__(self) -> None:
        super().__init__()
        self.registered: set[type] = set()

    def __missing__(self, cls: type) -> Role:
        role = self[cls] = _classify(cls)
        if role not in _NEVER_REDUCED and cls not in _ALWAYS_SHARED and registered_reducer(cls) is not None:
            self.registered.add(cls)
        return role


def _classify(cls: type) -> Role:
    for bases, role in _ROLES_BY_BASE:
        if issubclass(cls, bases):
            return role
    if cls is weakref.ref:
        return Role.WEAK_REFERENCE
    if is_pipeline_class(cls):
        return Role.PIPELINE
    if is_parametrized_class(cls):
        return Role.PARAMETRIZED
    if issubclass(cls, nn.Module):
        return Role.MODULE
    if issubclass(cls, _VALUES) and cls.__dictoffset__ and not issubclass(cls, enum.Enum):
        return Role.OTHER  # it has attributes, which distinguish copies of it
    return Role.ATOM if issubclass(cls, _ATOMS) else Role.OTHER
