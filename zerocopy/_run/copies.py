"""Which arguments has Ray brought with a model that every worker copies, and how is the user told?"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat import linux
from zerocopy._compat.cpython import module_of_caller, slot_names
from zerocopy._compat.ray import is_store_file
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.programs import PROGRAMS
from zerocopy._store import object_store
from zerocopy._store.manifest import Handle
from zerocopy._store.tensors import Storage, is_plain, storage_of
from zerocopy._tables import format_bytes
from zerocopy.errors import CopyWarning

LOOKED_AT = 200  # objects of an argument: more would cost more than microseconds
NOT_WORTH_A_WORD = 4096  # bytes

_PLAIN = frozenset({str, int, float, bool, type(None), bytes, complex, bytearray, np.ndarray, torch.Tensor, type})
_STOPS = (Handle, torch.Tensor, np.ndarray, type, types.ModuleType)
_warned: set[tuple[type, type]] = set()  # of arguments and models


def warn_if_called_by_ray(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """As `warn_of_copies`, where Ray's own code calls what asks this, in a worker: what users pass in place is no copy.

    Where classes of Ray's derive from the user's, `function` is of the user's.
    """
    if not object_store.is_running() or not object_store.is_worker():
        return
    if _is_of_ray(module_of_caller(2)) and not _is_of_ray(function.__module__):
        warn_of_copies(function, args, kwargs)


def _is_of_ray(module: str) -> bool:
    return module.partition(".")[0] == "ray"


def warn_of_copies(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Warn of each argument, as Ray brought it to `function`, that is or holds a model beside the store.

    Once per process and class of argument and model. Of what is no model the first few objects are looked at.
    """
    for position, value in enumerate(args):
        if type(value) not in _PLAIN:
            _warn_of_copy(function, position, value)
    for name, value in kwargs.items():
        if type(value) not in _PLAIN:
            _warn_of_copy(function, name, value)


def _warn_of_copy(function: Callable[..., Any], where: int | str, argument: Any) -> None:
    models = list(_models_in(argument))
    if not models or (type(argument), type(models[0][1])) in _warned:
        return
    _warned.add((type(argument), type(models[0][1])))
    nbytes = _bytes_beside_store(model for _, model in models)
    if nbytes < NOT_WORTH_A_WORD:
        return
    name = where if isinstance(where, str) else _name_of(function, where)
    path, model = models[0]
    kind = type(model).__name__
    held = f"is a bare {kind}" if model is argument else f"holds a bare {kind} at {name}{path}"
    more = f" and {len(models) - 1} more" if len(models) > 1 else ""
    warnings.warn(
        f"Argument {name!r} of {function.__qualname__}() {held}{more}, which Ray pickled: each worker copies "
        f"{format_bytes(nbytes)}. Hint: pass zerocopy.publish(model) as an argument of its own, or hold it in a field of "
        "a class marked with @zerocopy.pipeline, and pass an instance.",
        CopyWarning,
        stacklevel=4,
    )


def _name_of(function: Callable[..., Any], position: int) -> str:
    parameters = list(inspect.signature(function).parameters.values())
    variadic = next((one.name for one in parameters if one.kind is one.VAR_POSITIONAL), None)
    positional = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if position < len(positional):
        return positional[position]
    return f"{variadic}[{position - len(positional)}]"


def _models_in(argument: Any) -> Iterator[tuple[str, Any]]:
    """Models in an argument, with their paths from it, but not those in pipelines, which arrive loaded. Looks at a few objects."""
    queue = deque([("", argument)])
    for _ in range(LOOKED_AT):
        if not queue:
            return
        path, obj = queue.popleft()
        cls = type(obj)
        if is_pipeline_class(cls) or issubclass(cls, _STOPS):
            continue
        if issubclass(cls, (nn.Module, *PROGRAMS)):
            yield path, obj
            continue
        children = itertools.islice(_children(obj), LOOKED_AT)
        queue.extend((path + step, child) for step, child in children if type(child) not in _PLAIN)


def _children(obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds. Nothing is made of what is not asked for."""
    if isinstance(obj, dict):
        yield from ((f"[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, (list, tuple, deque)):
        yield from ((f"[{position}]", value) for position, value in enumerate(obj))
    elif isinstance(obj, (set, frozenset)):
        yield from (("{...}", value) for value in obj)
    elif isinstance(obj, functools.partial):
        yield from ((".func", obj.func), (".args", obj.args), (".keywords", obj.keywords))
    elif isinstance(obj, types.MethodType):
        yield ".__self__", obj.__self__
    elif isinstance(obj, types.FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True):
            yield from ((f".<closure {name!r}>", value) for value in _content(cell))
    members = getattr(obj, "__dict__", None)
    if isinstance(members, dict):
        yield from ((paths.step(name), value) for name, value in members.items() if isinstance(name, str))
    yield from ((paths.step(name), getattr(obj, name)) for name in slot_names(type(obj)) if hasattr(obj, name))


def _content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # empty
        return []


def _bytes_beside_store(models: Iterable[Any]) -> int:
    """Bytes of main memory that these models take and that are no views of the store."""
    storages = {storage.key: storage for model in models for storage in _storages_of(model)}
    files = [file for file in linux.mappings() if is_store_file(file.path)] if linux.why_no_mappings() is None else []
    return sum(
        storage.nbytes
        for storage in storages.values()
        if storage.address is not None and not any(file.start <= storage.address < file.end for file in files)
    )


def _storages_of(model: Any) -> Iterator[Storage]:
    if isinstance(model, ExportedProgram):
        tensors = [*model.state_dict.values(), *model.constants.values()]
    else:
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return (storage_of(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor) and is_plain(tensor))
