"""What does an object hold, and at which path? The answer comes from dicts and slots, so that no property is evaluated."""

from __future__ import annotations

import functools
import types
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

_LEAVES = (
    str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType, np.generic,
    torch.dtype, torch.device, types.BuiltinFunctionType, types.CodeType,
)  # fmt: skip
_WITHOUT_ATTRIBUTES = (dict, list, tuple, deque, set, frozenset, np.ndarray)

Way = TypeVar("Way")  # to an object: a path, or a route

# Internal attributes of every `nn.Module`: `training`, the hooks, the three dicts of its members.
_MODULE_INTERNALS = frozenset(vars(nn.Module()))


def is_module(obj: object) -> bool:
    """Whether `obj` really is an `nn.Module`, and does not only claim it by `__class__`."""
    return issubclass(type(obj), nn.Module)


def modules_among(objects: Iterable[Any]) -> list[nn.Module]:
    """The objects that really are modules. Each class is checked once, because thousands of objects have few classes."""
    every = list(objects)
    classes = {cls for cls in set(map(type, every)) if issubclass(cls, nn.Module)}
    return [obj for obj in every if type(obj) in classes]


def registered_below(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Some modules and all modules registered in them, by id: like `modules()`, but without a generator per module."""
    found = {id(module): module for module in modules}
    pending = list(found.values())
    for module in pending:  # the list grows during the loop
        for child in vars(module).get("_modules", {}).values():  # missing if `nn.Module.__init__` was not called
            if child is not None and id(child) not in found:
                found[id(child)] = child
                pending.append(child)
    return found


def member_dicts(obj: object) -> Iterator[dict[str, Any]]:
    """The dicts in which `obj` holds its attributes; more than one for an `nn.Module`."""
    own = getattr(obj, "__dict__", None)
    if not isinstance(own, dict):
        return
    yield own
    if is_module(obj):
        yield from (own[name] for name in ("_modules", "_parameters", "_buffers") if name in own)


def attributes_of(obj: object) -> dict[str, Any]:
    """The data attributes of `obj` by name, from its dicts and slots. No property is evaluated."""
    hidden = _MODULE_INTERNALS if is_module(obj) else frozenset[str]()
    found = {name: value for members in member_dicts(obj) for name, value in members.items() if name not in hidden}
    for base in type(obj).__mro__:
        for name, value in vars(base).items():
            if isinstance(value, types.MemberDescriptorType) and name not in found and hasattr(obj, name):
                found[name] = getattr(obj, name)
    return found


def step(name: str) -> str:
    """The part of a path for an attribute, or for a numbered member, with this name."""
    return f"[{name}]" if name.isdigit() else f".{name}"


def _children(obj: object) -> Iterable[tuple[str, object]]:
    if isinstance(obj, types.FunctionType):
        return _children_of_function(obj)
    if issubclass(type(obj), torch.jit.ScriptModule):  # not `isinstance`: an object may only claim this by `__class__`
        script: Any = obj
        tensors = (*script.named_parameters(recurse=False), *script.named_buffers(recurse=False))
        return [(step(name), value) for name, value in (*tensors, *script.named_children())]
    items = list(_items(obj))
    if type(obj) in _WITHOUT_ATTRIBUTES:
        return items
    if type(obj) in (torch.Tensor, nn.Parameter):
        return [(step(name), value) for name, value in getattr(obj, "__dict__", {}).items()]
    held = attributes_of(obj)
    if isinstance(obj, ExportedProgram):  # it has properties with these names
        held = {name.removeprefix("_"): value for name, value in held.items()}
    attributes = [(step(name), value) for name, value in held.items()]
    if is_module(obj):
        hooks = ((name, value) for name, value in vars(obj).items() if name.endswith("hooks") and value)
        attributes += [(step(name), value) for name, value in hooks]
    return [*items, *attributes]


def _items(obj: Any) -> Iterator[tuple[str, object]]:
    """What an object holds in addition to its attributes. Calls no methods that a user's class may override."""
    if isinstance(obj, (dict, types.MappingProxyType)):
        mapping = dict.items(obj) if isinstance(obj, dict) else obj.items()
        pairs = [(f"[{key!r}]", key, value) for key, value in mapping]
        yield from ((place, value) for place, _, value in pairs)
        yield from ((place, key) for place, key, _ in pairs if not isinstance(key, _LEAVES))
        if isinstance(obj, defaultdict):
            yield ".default_factory", obj.default_factory
    elif isinstance(obj, (list, tuple, deque)):
        base: Any = next(base for base in (list, tuple, deque) if isinstance(obj, base))
        yield from ((f"[{position}]", value) for position, value in enumerate(base.__iter__(obj)))
    elif isinstance(obj, np.ndarray) and obj.dtype.hasobject:
        yield from ((f".flat[{position}]", value) for position, value in enumerate(obj.flat))
    elif isinstance(obj, (set, frozenset)):
        yield from ((f"{{{value!r}}}", value) for value in obj)
    elif isinstance(obj, functools.partial):
        yield from ((".func", obj.func), (".args", obj.args), (".keywords", obj.keywords))
    elif isinstance(obj, types.MethodType):
        yield from ((".__self__", obj.__self__), (".__func__", obj.__func__))
    elif isinstance(obj, BaseException):
        yield ".args", obj.args


def _children_of_function(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((f".<closure {name!r}>", cell.cell_contents) for name, cell in cells if not _is_empty(cell))
    names, known = function.__code__.co_names, function.__globals__
    yield from ((f".<global {name!r}>", known[name]) for name in names if name in known)
    yield from ((".__defaults__", function.__defaults__), (".__kwdefaults__", function.__kwdefaults__))
    yield from ((step(name), value) for name, value in vars(function).items())


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def walk(root: object, name: str) -> Iterator[tuple[str, object]]:
    """Yields every path and object from `root`, nearest first. Containers are entered once; leaves are yielded at each path."""
    return _walk([(name, root)], lambda path, _, step: path + step)


def _walk(starts: Iterable[tuple[Way, object]], onward: Callable[[Way, int, str], Way]) -> Iterator[tuple[Way, object]]:
    """Like `walk`. `onward` returns the way to a child, given the way to its holder, its number, and its step."""
    queue = deque(starts)
    entered = set()
    while queue:
        way, obj = queue.popleft()
        yield way, obj
        if isinstance(obj, _LEAVES) or id(obj) in entered:
            continue
        entered.add(id(obj))
        queue.extend((onward(way, number, step), child) for number, (step, child) in enumerate(_children(obj)))


def path_to(root: object, target: object, name: str) -> str | None:
    """The shortest path from `root`, called `name`, to `target`."""
    return paths_to(root, [target], name).get(id(target))


def paths_to(root: object, targets: Iterable[object], name: str) -> dict[int, str]:
    """The shortest path from `root`, called `name`, to each target that can be reached, by id. One walk finds all."""
    missing = set(map(id, targets))
    found: dict[int, str] = {}
    for path, obj in walk(root, name):
        if id(obj) in missing:
            found[id(obj)] = path
            missing.remove(id(obj))
            if not missing:
                break
    return found


def name_of(pipeline: object) -> str:
    """The first part of the paths in `pipeline`."""
    return type(pipeline).__name__.lower()


Route: TypeAlias = tuple[int, ...]


def routes_to(roots: Sequence[object], targets: Collection[int]) -> dict[int, Route]:
    """The routes to the objects with the ids `targets`: the number of the root, then that of each child on the way."""
    starts: list[tuple[Route, object]] = [((number,), root) for number, root in enumerate(roots)]
    found: dict[int, Route] = {}
    for route, obj in _walk(starts, lambda route, number, _: (*route, number)):
        if id(obj) in targets:
            found.setdefault(id(obj), route)
            if len(found) == len(targets):
                break
    return found


def follow(roots: Sequence[object], route: Route) -> object:
    """The object at the end of a route now; None if the route leads to no object."""
    children: Sequence[object] = roots
    obj: object = None
    for number in route:
        if number >= len(children):
            return None
        obj = children[number]
        children = [child for _, child in _children(obj)]
    return obj
