"""How is an object copied around its tensors: its structure is made anew, over the very same tensors.

A twin costs as little memory as a skeleton. It is what the imperative face publishes in the place of an object that it must
not change: with its models in eval mode, or with something else where they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from zerocopy import _paths
from zerocopy._roles import Zone
from zerocopy._skeleton import Split, Stripped, graft, strip


def models_of(obj: Any, copied: Collection[str] = ()) -> dict[str, Any]:
    """The models anywhere in `obj`, by path from it, as `encoder` or `stages['first'][0]`; of a bare one the path is `model`.

    Args:
        copied: attributes in which models do not count, beside those in `copied()` fields.

    Raises:
        CannotTravelError: something around the models cannot leave the process; the error names its path.
    """
    return {_path(obj, root): root for root in _models(obj, copied).roots}


def twin_of(obj: Any) -> Any:
    """A twin of `obj` as it is.

    Raises:
        CannotTravelError: something inside cannot be pickled; the error names its path.
    """
    (twin,) = _twins_of([obj], _paths.name_of(obj))
    return twin


def in_eval_mode(obj: Any) -> Any:
    """A twin of `obj` with every model in eval mode.

    Raises:
        CannotTravelError: something inside cannot be pickled; the error names its path.
    """
    around = _models(obj, ())
    others = [found for found in around.seen.values() if _paths.is_module(found)]  # in copied fields
    inner = {id(below) for module in others for below in module.modules() if below is not module}
    models = [*around.roots, *(module for module in others if id(module) not in inner)]
    twin, modules = _twins_of([obj, models], _paths.name_of(obj))
    for module in modules:
        if isinstance(module, nn.Module):
            module.eval()
    return twin


def with_models_replaced(obj: Any, replacements: Sequence[Any], copied: Collection[str] = ()) -> Any:
    """A twin of `obj` with `replacements` where its models were, in the order of `models_of`."""
    around = _models(obj, copied)
    replaced = {id(root): new for root, new in zip(around.roots, replacements, strict=True)}
    externals = [replaced.get(id(external), external) for external in around.externals]
    (twin,) = _graft_around(around, externals, 1)
    return twin


def _twins_of(objects: Sequence[Any], name: str) -> list[Any]:
    stripped = strip(objects, zone=Zone.AUTO, split=Split.NOWHERE, names=[name] * len(objects))
    return _graft_around(stripped, stripped.externals, len(objects))


def _models(obj: Any, copied: Collection[str]) -> Stripped:
    by_hand = {id(obj): copied} if copied else None
    return strip([obj], zone=Zone.AUTO, split=Split.MODULES, names=[_paths.name_of(obj)], copied=by_hand)


def _path(obj: Any, model: Any) -> str:
    if model is obj:
        return "model"
    return (_paths.find(obj, model, "") or f"<{type(model).__name__} {id(model):#x}>").removeprefix(".")


def _graft_around(stripped: Stripped, externals: Sequence[Any], count: int) -> list[Any]:
    """Join around live tensors, which keep the very attributes they have."""
    held = [(tensor, dict(attributes)) for tensor, attributes in _attributes(externals)]
    try:
        return graft(stripped.payload, externals, count)
    finally:
        for tensor, attributes in held:
            vars(tensor).update(attributes)


def _attributes(externals: Sequence[Any]) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for obj in externals:
        if isinstance(obj, torch.Tensor) and getattr(obj, "__dict__", None):
            yield obj, vars(obj)
