"""Which arguments contain a model that Ray pickled, so that every worker copies it, and how is the user warned?"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat.cpython import module_of_caller
from zerocopy._split.held_models import Steps, models_in
from zerocopy._store import object_store
from zerocopy._store.mapping import around, store_files
from zerocopy._store.storages import Storage, storage_of
from zerocopy._store.tensors import is_plain
from zerocopy._tables import format_bytes
from zerocopy.errors import CopyWarning

NOT_WORTH_A_WORD = 4096  # bytes

_checked: set[tuple[str, ...]] = set()  # names of classes: of the argument, and of the first model in it


def warn_if_called_by_ray(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Like `warn_of_copies`, but only if Ray's own code makes the call in a worker: a direct call of a user copies nothing."""
    if not object_store.is_running() or not object_store.is_worker():
        return
    # Ray derives its own classes from the user's classes, and calls them too.
    if hasattr(function, "__code__") and _is_of_ray(module_of_caller(2)) and not _is_of_ray(function.__module__):
        warn_of_copies(function, args, kwargs)


def _is_of_ray(module: str) -> bool:
    return module.partition(".")[0] == "ray"


def warn_of_copies(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Warn of each argument, as Ray passed it to `function`, that is or holds a model outside of the store.

    Warns once per process for each class of argument and model. Only the first few objects of an argument are examined.
    """
    for where, value in (*enumerate(args), *kwargs.items()):
        if text := _text_on(function, where, value):
            code = function.__code__  # the warning shows the line of the user's own code
            warnings.warn_explicit(text, CopyWarning, code.co_filename, code.co_firstlineno)


def _text_on(function: Any, where: Any, argument: Any) -> str | None:
    """The warning for an argument, or None."""
    try:
        models = list(models_in(argument))
        if not models or not _is_new(type(argument), type(models[0][1])):
            return None
        nbytes = _bytes_beside_store(model for _, model in models)
        return None if nbytes < NOT_WORTH_A_WORD else _text(function, where, argument, models, nbytes)
    except Exception:  # an error in the user's classes: the user's own code will get it, too
        return None


def _is_new(*classes: type) -> bool:
    names = tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in classes)
    is_new = names not in _checked
    _checked.add(names)
    return is_new


def _text(function: Any, where: Any, argument: Any, models: Sequence[tuple[Steps, Any]], nbytes: int) -> str:
    name = where if isinstance(where, str) else _parameter(function, where)
    steps, first = models[0]
    kind, path = type(first).__name__, name + "".join(form.format(key) for form, key in steps)
    more = f" and {len(models) - 1} more" if len(models) > 1 else ""
    held = f"is a bare {kind}" if first is argument else f"holds a bare {kind} at {path!r}{more}"
    return (
        f"Argument {name!r} of {function.__qualname__}() {held}, which Ray has pickled: each worker copies "
        f"{format_bytes(nbytes)}. Hint: pass zerocopy.publish({name}) in its place, or an instance of a class marked with "
        "@zerocopy.pipeline that holds the model."
    )


def _parameter(function: Any, position: int) -> str:
    parameters = list(inspect.signature(function).parameters.values())
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    variadic = [one.name for one in parameters if one.kind is one.VAR_POSITIONAL]
    return names[position] if position < len(names) else f"{variadic[0]}[{position - len(names)}]"


def _bytes_beside_store(models: Iterable[Any]) -> int:
    """Bytes of main memory of models, without views of the store. Memory of a GPU does not count: it always has copies."""
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
