"""Which models does an object hold, and where?"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from zerocopy._split import paths
from zerocopy._split.ordinary import Stripped
from zerocopy._split.programs import PROGRAMS
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone


def is_model(obj: object) -> bool:
    return paths.is_module(obj) or isinstance(obj, PROGRAMS)


def models_of(obj: Any, copied: Collection[str] = ()) -> dict[str, Any]:
    """The models anywhere in `obj`, by path, such as `encoder` or `stages['first'][0]`. The path of a bare model is `model`.

    Args:
        copied: attributes whose models do not count. Those of `copied()` fields do not count either.

    Raises:
        CannotTravelError: an object around the models cannot leave the process. The error names its path.
    """
    if is_model(obj):
        return {"model": obj}
    roots = _found(obj, copied).roots
    found = paths.paths_to(obj, roots, "")
    return {found.get(id(root), f"<{type(root).__name__} {id(root):#x}>").removeprefix("."): root for root in roots}


def callable_models(models: dict[str, Any]) -> dict[str, Any]:
    """`models`, but a model that cannot be called, such as a `ModuleList`, is replaced by its parts."""
    return {below: part for path, model in models.items() for below, part in _callable_parts(path, model)}


def _callable_parts(path: str, model: Any) -> Iterator[tuple[str, Any]]:
    forward = getattr(type(model), "forward", None)
    if forward is not nn.Module.forward:
        yield path, model
        return
    for name, part in model.named_children():
        step = f"[{name!r}]" if isinstance(model, nn.ModuleDict) else paths.step(name)
        yield from _callable_parts(path + step, part)


def models_in_train_mode(obj: Any) -> list[nn.Module]:
    """The outermost modules anywhere in `obj`, also in copied fields, if any module in them is in train mode; else none."""
    found = _found(obj, ())
    modules = [module for module in (*found.roots, *found.seen.values(), obj) if paths.is_module(module)]
    inner = {id(below) for module in modules for below in module.modules() if below is not module}
    outermost = list({id(module): module for module in modules if id(module) not in inner}.values())
    parts = (part for module in outermost for part in module.modules())
    return outermost if any(getattr(part, "training", False) for part in parts) else []


def _found(obj: Any, copied: Collection[str]) -> Stripped:
    return strip([obj], zone=Zone.AUTO, split=Split.MODULES, copied={id(obj): copied})
