"""What happens to a call of a task where it runs: the function is found, arguments are loaded, and what was loaded is kept."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.cloudpickle

from zerocopy._load.publication import Publication
from zerocopy._run import short_calls
from zerocopy._run.arguments import load_arguments
from zerocopy._run.reuse import CallLoads, NotCached


def run(target: Any, device: str | None, reuse: bool, *args: Any, **kwargs: Any) -> Any:
    return call(_function_of(target), device, reuse, args, kwargs)


def call(function: Any, device: str | None, reuse: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call `function` with its arguments as they arrive; after an error nothing is kept for the next call."""
    if not reuse or inspect.isgeneratorfunction(function):
        values, named = load_arguments(args, kwargs, device)
        return function(*values, **named)
    loads = CallLoads()
    values, named = load_arguments(args, kwargs, device, loads.load)
    result = function(*values, **named)
    del values, named
    loads.release()
    return result


def run_short(target: Any, device: str | None, _: bool, call: bytes) -> Any:
    """The same for a call that gives publications by name. Returns the packed reply."""
    args, kwargs = short_calls.unpack_call(call)
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


def run_generator(target: Any, device: str | None, reuse: bool, *args: Any, **kwargs: Any) -> Iterator[Any]:
    loads = CallLoads()
    values, named = load_arguments(args, kwargs, device, loads.load if reuse else Publication.load)
    yield from _function_of(target)(*values, **named)
    del values, named
    loads.release()


@functools.lru_cache(256)
def _function_of(target: Any) -> Any:
    return find(*target).__wrapped__ if isinstance(target, tuple) else target


def address_of(obj: object, module: str, qualname: str) -> tuple[str, str] | None:
    """The module and qualified name under which importing finds this very object in a worker too, if it does."""
    if module == "__main__" or module not in sys.modules or module in ray.cloudpickle.list_registry_pickle_by_value():
        return None
    try:
        return (module, qualname) if find(module, qualname) is obj else None
    except (ImportError, AttributeError):
        return None


def find(module: str, qualname: str) -> Any:
    """The object with this qualified name, not bound to the class that holds it."""
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = inspect.getattr_static(found, name)
    return found
