"""How are the tensors of a module taken out of it as arrays, and put back?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from zerocopy._split.paths import is_module
from zerocopy._split.skeleton import Split, graft, strip
from zerocopy._split.zones import Zone
from zerocopy._store.mapping import map_if_in_store
from zerocopy._store.tensors import is_plain, is_tensor_or_array, like
from zerocopy.errors import ArgumentError

Tensors: TypeAlias = list[dict[str, dict[str, Any]]]

_MEMBERS = {"params": "_parameters", "buffers": "_buffers"}


def extract_tensors(module: nn.Module) -> tuple[nn.Module, Tensors]:
    """Take the parameters and buffers out of a module, without copying them. The module itself does not change.

    Returns:
        Two results. The first is a copy of `module` with its parameters and buffers on the meta device. The second has one dict
        per module, in the order of `named_modules()`: `{"params": {name: array}, "buffers": {name: array}}`. Each array has the
        shape of its tensor and is a view of it. If NumPy lacks the dtype (bfloat16, float8), or if the tensor is not a plain
        strided tensor, the dict has a tensor instead of an array. Tied tensors are one array.

    Raises:
        ArgumentError: `module` is not an `nn.Module`, or it is TorchScript, whose weights belong to its code.
        CannotTravelError: an object inside cannot be pickled. The error names its path.
    """
    if not is_module(module) or isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError(
            f"extract_tensors expects an nn.Module, got {type(module).__name__!r}.",
            hint="use ModelWrapper, or JITModelWrapper for TorchScript.",
        )
    # In the zone SHARED composites are taken apart: their components stay in the skeleton.
    stripped = strip([module], zone=Zone.SHARED, split=Split.NOWHERE, number_code=True)
    contents: dict[int, Any] = {}
    tensors: Tensors = []
    for members in _members(module):
        held = {kind: {name: t for name, t in group.items() if t is not None} for kind, group in members.items()}
        for tensor in (tensor for group in held.values() for tensor in group.values()):
            contents.setdefault(id(tensor), _content(tensor))
        tensors.append({kind: {name: contents[id(t)] for name, t in group.items()} for kind, group in held.items()})
    blanks = [_blank(obj) if id(obj) in contents else _private(obj) for obj in stripped.externals]
    (skeleton,) = graft(stripped.payload, blanks)
    return skeleton, tensors


def replace_tensors(skeleton: nn.Module, tensors: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Put tensors back into the skeleton of `extract_tensors`, in place and without copying.

    Arrays in the object store are mapped privately, so that writes stay in this process. Ties, parameter classes,
    `requires_grad` and attributes are those of the original module.

    Raises:
        ArgumentError: `tensors` do not belong to this skeleton: they have another number of modules, or an unknown name.
    """
    if not is_module(skeleton):
        raise ArgumentError(
            f"replace_tensors expects an nn.Module first, got {type(skeleton).__name__!r}.", hint=_AS_EXTRACTED
        )
    if not _are_tensors(tensors):
        raise ArgumentError(
            "replace_tensors expects a list of {'params': {name: array}, 'buffers': {name: array}}, one for each module.",
            hint=_AS_EXTRACTED,
        )
    modules = list(_members(skeleton))
    if len(modules) != len(tensors):
        raise ArgumentError(
            f"{type(skeleton).__name__} has {len(modules)} modules, but there are tensors for {len(tensors)}.",
            hint=_AS_EXTRACTED,
        )
    if misfits := [text for pair in zip(modules, tensors, strict=True) for text in _misfits(*pair)]:
        raise ArgumentError(
            f"{type(skeleton).__name__} cannot take these tensors: {'; '.join(misfits)}.", hint=_AS_EXTRACTED
        )
    arrays = {id(value): value for entry in tensors for contents in entry.values() for value in contents.values()}
    live = _live_tensors([value for value in arrays.values() if isinstance(value, np.ndarray)])
    filled: dict[int, tuple[Any, Any]] = {}
    for members, entry in zip(modules, tensors, strict=True):
        for kind, contents in entry.items():
            for name, value in contents.items():
                blank, content = members[kind][name], live.get(id(value), value)
                if id(blank) not in filled:  # `blank` stays alive, so that its id stays unique
                    filled[id(blank)] = like(blank, content) if is_plain(blank) else content, blank
                members[kind][name] = filled[id(blank)][0]


_AS_EXTRACTED = "pass both results of one call of extract_tensors: replace_tensors(skeleton, tensors)."


def _are_tensors(tensors: Any) -> bool:
    """Whether an object has the form of a result of `extract_tensors`, with any names."""
    if not isinstance(tensors, Sequence) or not all(isinstance(entry, Mapping) for entry in tensors):
        return False
    groups = [group for entry in tensors for group in entry.values()]
    return all(isinstance(group, Mapping) and all(map(is_tensor_or_array, group.values())) for group in groups)


def _misfits(members: Mapping[str, Mapping[str, Any]], entry: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Reasons why `entry` cannot be the tensors of the module with these members."""
    for kind in entry.keys() - members.keys():
        yield f"{kind!r} is neither 'params' nor 'buffers'"
    for kind, group in members.items():
        given = entry.get(kind, {})
        present = {name for name, tensor in group.items() if tensor is not None}
        yield from (f"no {kind}[{name!r}] there" for name in sorted(given.keys() - group.keys()))
        yield from (f"{kind}[{name!r}] is missing" for name in sorted(present - given.keys()))
        for name in sorted(present & given.keys()):
            here, new = _form(group[name]), _form(given[name])
            if here != new:
                yield f"{kind}[{name!r}] is {new[0]} of shape {new[1]}, not {here[0]} of {here[1]}"


def _form(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _members(module: nn.Module) -> Iterator[dict[str, MutableMapping[str, Any]]]:
    """The dicts of parameters and buffers per module. Those of TorchScript count as empty: it keeps its tensors itself."""
    for _, part in module.named_modules():
        compiled = isinstance(part, torch.jit.ScriptModule)
        yield {kind: {} if compiled else vars(part)[attribute] for kind, attribute in _MEMBERS.items()}


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device with everything of `tensor` except its contents."""
    return like(tensor, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))


def _private(obj: Any) -> Any:
    """A copy for the skeleton of a tensor or an array that is no parameter or buffer. Other objects are returned unchanged."""
    if isinstance(obj, np.ndarray):
        return obj.copy(order="K")
    if not isinstance(obj, torch.Tensor):
        return obj
    return like(obj, obj.detach().clone())


def _content(tensor: Any) -> Any:
    if not is_plain(tensor):
        return tensor
    plain = tensor.detach().resolve_conj().resolve_neg()
    try:
        return plain.numpy() if plain.device.type == "cpu" else plain.cpu().numpy()
    except TypeError:  # NumPy lacks the dtype
        return plain


def _live_tensors(arrays: Sequence[np.ndarray[Any, Any]]) -> dict[int, torch.Tensor]:
    """Tensors over arrays, by id of the array. Read-only arrays are mapped privately if they are in the store, else copied."""
    read_only = [array for array in arrays if not array.flags.writeable]
    private = {id(array): mapped for array, mapped in zip(read_only, map_if_in_store(read_only), strict=True)}
    return {id(array): torch.from_numpy(private.get(id(array), array)) for array in arrays}
