"""What is an object to the pickler? That depends on its type alone."""

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

    ATOM = enum.auto()  # immutable: nobody can tell copies of it apart
    TENSOR = enum.auto()  # or a NumPy array
    PIPELINE = enum.auto()
    MODULE = enum.auto()
    PASSENGER = enum.auto()  # travels beside the skeleton, so that Ray counts its references
    BUFFER = enum.auto()  # bytes that an object gives to pickle as they are
    PARAMETRIZED = enum.auto()  # a module with parametrizations
    PROGRAM = enum.auto()  # TorchScript, or an exported program
    WEAK_REFERENCE = enum.auto()
    FILE = enum.auto()
    PACKED = enum.auto()  # an object of TorchScript, such as a quantized module packs its weights into
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

# Shared by the automatic rule.
MODULES = frozenset({Role.MODULE, Role.PARAMETRIZED, Role.PROGRAM})

# The same in every zone, and never the culprit.
SCALARS = frozenset({str, int, float, bool, type(None), bytes, complex})

_ROLES_BY_BASE: tuple[tuple[Any, Role], ...] = (
    ((torch.Tensor, np.ndarray), Role.TENSOR),
    ((ray.ObjectRef, ray.actor.ActorHandle, Handle), Role.PASSENGER),
    (pickle.PickleBuffer, Role.BUFFER),
    (reducers.FILES, Role.FILE),
    (programs.PROGRAMS, Role.PROGRAM),
    (torch.ScriptObject, Role.PACKED),
)


# What of these types is shared needs no reducer, and Ray itself may register one for its own ways to send tensors.
_ALWAYS_SHARED = frozenset({torch.Tensor, nn.Parameter, np.ndarray})

# What travels beside the skeleton, or what pickle writes before it asks for reducers.
_NEVER_REDUCED = frozenset({Role.PASSENGER, Role.BUFFER})


class Roles(dict[type, Role]):
    """The roles of instances by type, each found once.

    Made anew for each pickling, for it keeps the types alive, and users may register and deregister reducers.

    Attributes:
        registered: the types, of those found so far, for which a user has registered a reducer. That wins.
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
    if is_parametrized_class(cls):
        return Role.PARAMETRIZED
    if is_pipeline_class(cls):
        return Role.PIPELINE
    if issubclass(cls, nn.Module):
        return Role.MODULE
    if issubclass(cls, _VALUES) and cls.__dictoffset__ and not issubclass(cls, enum.Enum):
        return Role.OTHER  # it has attributes, by which copies of it can be told apart
    return Role.ATOM if issubclass(cls, _ATOMS) else Role.OTHER
