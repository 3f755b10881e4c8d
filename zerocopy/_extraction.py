"""How are the tensors of a module taken out of it as arrays, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from zerocopy._mapping import map_if_in_store
from zerocopy._paths import is_module
from zerocopy._tensors import is_plain
from zerocopy._twins import twin_of
from zerocopy.errors import ArgumentError

Tensors: TypeAlias = list[dict[str, dict[str, Any]]]

_MEMBERS = {"params": "_parameters", "buffers": "_buffers"}


def extract_tensors(module: nn.Module) -> tuple[nn.Module, Tensors]:
    """Take the parameters and buffers out of a module. It stays as it is; nothing is copied.

    Returns:
        A twin of `module` whose parameters and buffers are on the meta device, and their contents: for each module, in the
        order of `named_modules()`, `{"params": {name: array}, "buffers": {name: array}}`. Arrays have the shape of their
        tensor and are views of it; where NumPy lacks the dtype (bfloat16, float8), or the tensor is not a plain strided one, a
        tensor stands there. Tied tensors are one array.

    Raises:
        ArgumentError: not an `nn.Module`, or TorchScript, whose weights belong to its code.
        CannotTravelError: something inside cannot be pickled; the error names its path.
    """
    if not is_module(module) or isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError(
            f"extract_tensors expects an nn.Module, got {type(module).__name__!r}.",
            hint="use ModelWrapper, or JITModelWrapper for TorchScript.",
        )
    skeleton = twin_of(module)
    taken: dict[int, tuple[Any, Any, Any]] = {}
    tensors: Tensors = []
    for members in _members(skeleton):
        entry: dict[str, dict[str, Any]] = {}
        for kind, slots in members.items():
            entry[kind] = {}
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in taken:
                    taken[id(tensor)] = _blank(tensor), _content(tensor), tensor  # alive: no id is used twice
                slots[name], entry[kind][name], _ = taken[id(tensor)]
        tensors.append(entry)
    return skeleton, tensors


def replace_tensors(skeleton: nn.Module, tensors: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Put tensors back into the skeleton of `extract_tensors`, in place and without copying.

    Arrays that lie in the object store are mapped once more, private to this process: writes stay here. Ties, parameter
    classes, `requires_grad` and attributes are those of the module that was taken apart.

    Raises:
        ArgumentError: `tensors` are not those of this skeleton: another number of modules, or an unknown name.
    """
    modules = list(_members(skeleton))
    if len(modules) != len(tensors):
        raise ArgumentError(
            f"{type(skeleton).__name__} has {len(modules)} modules, but there are tensors for {len(tensors)}.",
            hint="pass both results of one call of extract_tensors.",
        )
    unknown = [
        f"{kind}[{name!r}]"
        for members, entry in zip(modules, tensors, strict=True)
        for kind, contents in entry.items()
        for name in contents
        if name not in members[kind]
    ]
    if unknown:
        raise ArgumentError(f"{type(skeleton).__name__} has no {', '.join(unknown)}.")
    arrays = {id(value): value for entry in tensors for contents in entry.values() for value in contents.values()}
    live = _live_tensors([value for value in arrays.values() if isinstance(value, np.ndarray)])
    filled: dict[int, tuple[Any, Any]] = {}
    for members, entry in zip(modules, tensors, strict=True):
        for kind, contents in entry.items():
            for name, value in contents.items():
                blank = members[kind][name]
                if blank is None or id(blank) not in filled:
                    filled[id(blank)] = _filled(blank, live.get(id(value), value)), blank
                members[kind][name] = filled[id(blank)][0]


def _members(module: nn.Module) -> Iterator[dict[str, MutableMapping[str, Any]]]:
    """The dicts of parameters and buffers of each module; none of TorchScript, which keeps its own."""
    for _, part in module.named_modules():
        compiled = isinstance(part, torch.jit.ScriptModule)
        yield {kind: {} if compiled else vars(part)[attribute] for kind, attribute in _MEMBERS.items()}


def _blank(tensor: Any) -> Any:
    """A tensor on the meta device that remembers all but the contents; None for a tensor that has to stay as it is."""
    if not is_plain(tensor):
        return None
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    blank = torch.Tensor._make_subclass(type(tensor), empty, tensor.requires_grad)
    vars(blank).update(vars(tensor))
    return blank


def _content(tensor: Any) -> Any:
    if not is_plain(tensor):
        return tensor
    plain = tensor.detach().resolve_conj().resolve_neg()
    try:
        return plain.numpy() if plain.device.type == "cpu" else plain.cpu().numpy()
    except TypeError:  # NumPy lacks the dtype
        return plain


def _filled(blank: Any, content: Any) -> Any:
    if blank is None:
        return content
    tensor = torch.Tensor._make_subclass(type(blank), content, blank.requires_grad)
    vars(tensor).update(vars(blank))
    return tensor


def _live_tensors(arrays: Sequence[np.ndarray[Any, Any]]) -> dict[int, torch.Tensor]:
    """Tensors over arrays, by id of the array: those in the object store over a private mapping of it."""
    read_only = [array for array in arrays if not array.flags.writeable]
    private = {id(array): mapped for array, mapped in zip(read_only, map_if_in_store(read_only), strict=True)}
    return {id(array): torch.from_numpy(private.get(id(array), array)) for array in arrays}
