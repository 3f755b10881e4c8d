"""Which arguments has Ray brought with a model that every worker copies, and how is the user told?"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat.cpython import module_of_caller, slot_names
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._load.publication import Publication
from zerocopy._split.programs import PROGRAMS
from zerocopy._store import object_store
from zerocopy._store.mapping import around, store_files
from zerocopy._store.storages import Storage, storage_of
from zerocopy._store.tensors import is_plain
from zerocopy._tables import format_bytes
from zerocopy.errors import CopyWarning

LOOKED_AT = 64  # objects of an argument: a few microseconds
NOT_WORTH_A_WORD = 4096  # bytes

_PLAIN = frozenset(
    {str, int, float, bool, type(None), bytes, complex, bytearray, type, np.ndarray, torch.Tensor, Publication}
)
_MODELS = (nn.Module, *PROGRAMS)
_WITHOUT_ATTRIBUTES = frozenset({dict, list, tuple, set, frozenset, deque, types.MethodType})
_DATA = frozenset({"numpy", "pandas", "pyarrow", "ray"})  # whose objects hold none

_Steps: TypeAlias = tuple[tuple[str, Any], ...]  # each the form of a step, and what to fill in there

_checked: set[tuple[str, ...]] = set()  # names of classes: of the argument, and of the first model in it


def warn_if_called_by_ray(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """As `warn_of_copies`, if in a worker Ray's own code makes the call that asks this: what users pass in place is no copy."""
    if not object_store.is_running() or not object_store.is_worker():
        return
    # Ray derives classes of its own from the user's, and calls them too.
    if hasattr(function, "__code__") and _is_of_ray(module_of_caller(2)) and not _is_of_ray(function.__module__):
        warn_of_copies(function, args, kwargs)


def _is_of_ray(module: str) -> bool:
    return module.partition(".")[0] == "ray"


def warn_of_copies(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Warn of each argument, as Ray has brought it to `function`, that is or holds a model outside of the store.

    Once per process and class of argument and model. Only the first few objects of an argument are looked at.
    """
    for where, value in (*enumerate(args), *kwargs.items()):
        if type(value) not in _PLAIN and (text := _text_on(function, where, value)):
            code = function.__code__  # the line of the user's own code is shown
            warnings.warn_explicit(text, CopyWarning, code.co_filename, code.co_firstlineno)


def _text_on(function: Any, where: Any, argument: Any) -> str | None:
    """What to say of an argument, if there is anything."""
    try:
        models = list(_models_in(argument))
        if not models or not _is_new(type(argument), type(models[0][1])):
            return None
        nbytes = _bytes_beside_store(model for _, model in models)
        return None if nbytes < NOT_WORTH_A_WORD else _text(function, where, argument, models, nbytes)
    except Exception:  # of the user's classes, when they are looked at: the user's own code will meet it
        return None


def _is_new(*classes: type) -> bool:
    names = tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
    is_new = names not in _checked
    _checked.add(names)
    return is_new


def _text(function: Any, where: Any, argument: Any, models: Sequence[tuple[_Steps, Any]], nbytes: int) -> str:
    name = where if isinstance(where, str) else _parameter(function, where)
    steps, first = models[0]
    kind, path = type(first).__name__, name + "".join(form.format(key) for form, key in steps)
    more = f" and {len(models) - 1} more" if len(models) > 1 else ""
    held = f"is a bare {kind}" if first is argument else f"holds a bare {kind} at {path!r}{more}"
    return (
        f"Argument {name!r} of {function.__qualname__}() {held}, which Ray has pickled: each worker copies "
        f"{format_bytes(nbytes)}. Hint: pass zerocopy.publish(model) as an argument of its own, or an instance of a class "
        "marked with @zerocopy.pipeline that holds it."
    )


def _parameter(function: Any, position: int) -> str:
    parameters = list(inspect.signature(function).parameters.values())
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    variadic = [one.name for one in parameters if one.kind is one.VAR_POSITIONAL]
    return names[position] if position < len(names) else f"{variadic[0]}[{position - len(names)}]"


def _models_in(argument: Any) -> Iterator[tuple[_Steps, Any]]:
    """The models in an argument, with the steps to them, but not those in pipelines, which arrive loaded."""
    queue: deque[tuple[_Steps, Any]] = deque([((), argument)])
    looked_at = 0
    while queue and looked_at < LOOKED_AT:
        steps, obj = queue.popleft()
        cls = type(obj)
        if issubclass(cls, _MODELS) and not is_pipeline_class(cls):
            yield steps, obj
        elif not is_pipeline_class(cls) and cls.__module__.partition(".")[0] not in _DATA:
            for form, key, value in itertools.islice(_children(obj), LOOKED_AT - looked_at):
                looked_at += 1
                if type(value) not in _PLAIN:
                    queue.append(((*steps, (form, key)), value))


def _children(obj: Any) -> Iterator[tuple[str, Any, Any]]:
    """What an object holds: the form of the step to it, what to fill in there, and the value."""
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


def _bytes_beside_store(models: Iterable[Any]) -> int:
    """Bytes of main memory that models take, but not those that are views of the store. A GPU has copies anyway."""
    storages = {storage.key: storage for model in models for storage in _storages_of(model)}
    files = store_files()
    return sum(
        storage.nbytes
        for storage in storages.values()
        if storage.address is not None and around(*storage.extent, files) is None
    )


def _storages_of(model: Any) -> Iterator[Storage]:
    if isinstance(model, ExportedProgram):
        tensors = [*model.state_dict.values(), *model.constants.values()]
    else:
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return (storage_of(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor) and is_plain(tensor))
