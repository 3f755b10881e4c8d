"""What does a worker do with a call of a task? It finds the function, loads the arguments, and releases the loads afterwards."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from zerocopy._compat.ray import is_pickled_by_value
from zerocopy._run import short_calls
from zerocopy._run.arguments import handle_parameters, load_arguments, load_publication
from zerocopy._run.copies import warn_of_copies
from zerocopy._run.reuse import CallLoads, NotCached

Target: TypeAlias = Any  # a function, or the address of a task: its module and its qualified name


def run(target: Target, device: str | None, reuse: bool, *args: Any, **kwargs: Any) -> Any:
    """The function that Ray runs for a task."""
    function = _function_of(target)
    warn_of_copies(function, args, kwargs)
    return call(function, device, reuse, args, kwargs)


def call(function: Any, device: str | None, reuse: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call `function` with its arguments loaded. After an error, no load is kept for later calls."""
    if not reuse or inspect.isgeneratorfunction(function):
        values, named = load_arguments(args, kwargs, device, handles=handle_parameters(function))
        return function(*values, **named)
    loads = CallLoads()
    values, named = load_arguments(args, kwargs, device, loads.load, handle_parameters(function))
    result = function(*values, **named)
    del values, named  # a load is not reused if anything refers to it
    loads.release()
    return result


def run_generator(target: Target, device: str | None, reuse: bool, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Like `run`, for a generator function."""
    function = _function_of(target)
    warn_of_copies(function, args, kwargs)
    loads = CallLoads()
    load = loads.load if reuse else load_publication
    values, named = load_arguments(args, kwargs, device, load, handle_parameters(function))
    yield from function(*values, **named)
    del values, named
    loads.release()


def run_short(target: Target, device: str | None, _: bool, packed: bytes) -> Any:
    """Like `run`, for a short call, which always reuses loads. Returns the packed reply."""
    args, kwargs = short_calls.unpack_call(packed)
    loads = CallLoads()

    def load(value: Any) -> Any:
        return loads.load_named(value, device) if short_calls.is_name(value) else value

    try:
        values = [load(value) for value in args]
        named = {name: load(value) for name, value in kwargs.items()}
    except NotCached:
        loads.release()
        return short_calls.UNKNOWN
    result = _function_of(target)(*values, **named)
    del values, named
    loads.release()
    return short_calls.pack_reply(result)


@functools.lru_cache(256)
def _function_of(target: Target) -> Any:
    return object_at(*target).__wrapped__ if isinstance(target, tuple) else target


def address_of(obj: object, module: str, qualname: str) -> tuple[str, str] | None:
    """The module and the qualified name, if a worker that imports the module finds the same object there; else None."""
    if module == "__main__" or module not in sys.modules or is_pickled_by_value(module):
        return None
    try:
        return (module, qualname) if object_at(module, qualname) is obj else None
    except (ImportError, AttributeError):
        return None


def object_at(module: str, qualname: str) -> Any:
    """The object with this qualified name, not bound to the class that holds it."""
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = inspect.getattr_static(found, name)
    return found
