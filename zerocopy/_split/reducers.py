"""How do objects travel that pickle cannot write, or can write only by copying their bytes?

Each reduction takes an object apart into plain tensors or arrays over the same memory, and a function that builds the object from
them again. The plain tensors and arrays are shared like any others.
"""

from __future__ import annotations

import io
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from zerocopy._compat.ray import registered_reducer
from zerocopy._compat.torch import MKLDNN, parametrize_again, rebuild_nested, rebuild_quantized, torch_rebuilds_nested
from zerocopy._split import paths
from zerocopy._store.tensors import leaf

FILES = (io.FileIO, io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom)


def reduce_as_pickle(obj: Any) -> Any:
    """Reduces an object as Ray's pickle does: by the reducer that a user registered, else by its own."""
    registered = registered_reducer(type(obj))
    if registered is not None:
        return registered(obj)
    return reduce_packed(obj) if hasattr(type(obj), "set_weight_bias") else obj.__reduce_ex__(5)


def reduce_packed(obj: Any) -> tuple[Any, ...]:
    """Reduces an object that packs its weights when it receives its state: quantized modules, and TorchScript objects in them.

    They stay in main memory. torch can pack only there, and ends the process if it is given tensors of a GPU.
    """
    function, arguments, state, *_ = obj.__reduce_ex__(5)
    return function, arguments, state, None, None, _set_packed


def _set_packed(obj: Any, state: Any) -> None:
    obj.__setstate__(_in_main_memory(state))


def _in_main_memory(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state if state.is_cpu else state.detach().cpu()
    return type(state)(map(_in_main_memory, state)) if type(state) in (tuple, list) else state


def reduce_parametrized(module: nn.Module) -> tuple[Any, ...]:
    """Reduces a module with parametrizations. Its class cannot be pickled, and is created again when the module is rebuilt."""
    original: Any = type(module).__bases__[0]
    items = iter(module) if isinstance(module, list) else None
    pairs = iter(module.items()) if isinstance(module, dict) else None
    return _uninitialized, (original,), original.__getstate__(module), items, pairs, _set_parametrized


def _uninitialized(cls: Any) -> Any:
    return cls.__new__(cls)


def _set_parametrized(module: nn.Module, state: Any) -> None:
    module.__setstate__(state)
    names: Any = module._modules["parametrizations"]
    parametrize_again(module, names)


def reduce_weak_reference(reference: weakref.ref[Any]) -> tuple[Any, ...]:
    """Reduces a weak reference. It arrives alive if something else in the pickle refers to its target, else it arrives dead."""
    return _weak_reference, (reference(),)


class _Gone:
    """The referent of a weak reference that arrives dead."""


def _weak_reference(target: Any) -> weakref.ref[Any]:
    return weakref.ref(_Gone() if target is None else target)


def reduce_file(_: object) -> Any:
    """Refuse an open file: cloudpickle would send its content."""
    raise TypeError("an open file belongs to its process")


def reduce_composite(obj: Any) -> Any:
    """Reduces a tensor or an array that is not a plain view of a storage."""
    return _reduce_array(obj) if isinstance(obj, np.ndarray) else _reduce_tensor(obj)


def _reduce_array(array: np.ndarray[Any, Any]) -> Any:
    """Reduces an array of a subclass that pickles as arrays do (`numpy.memmap`, `numpy.matrix`, `numpy.recarray`)."""
    own = ("__reduce_ex__", "__reduce__", "__setstate__")
    if array.dtype.hasobject or any(getattr(type(array), name) is not getattr(np.ndarray, name) for name in own):
        return array.__reduce_ex__(5)
    return np.ndarray.view, (array.view(np.ndarray), type(array))


def _reduce_tensor(tensor: torch.Tensor) -> Any:
    if tensor.layout is MKLDNN:
        return _rebuild_mkldnn, (tensor.to_dense(),)
    if tensor.is_quantized and type(tensor) is torch.Tensor:
        return _reduce_quantized(tensor)
    if tensor.is_nested and tensor.layout is torch.strided:
        return _reduce_nested(tensor)
    if _is_view_of_storage(tensor) and type(tensor).__reduce_ex__ in (
        torch.Tensor.__reduce_ex__,
        nn.Parameter.__reduce_ex__,
    ):
        plain = tensor.detach().as_subclass(torch.Tensor)
        state = tensor.__getstate__()  # attributes and slots, or what the class returns instead
        made = leaf, (plain, type(tensor), tensor.requires_grad)
        return (*made, (state,), None, None, _set_state_of_tensor) if state is not None or _sets_state(tensor) else made
    return tensor.__reduce_ex__(5)


def _is_view_of_storage(tensor: torch.Tensor) -> bool:
    wrapper = (
        hasattr(tensor, "__tensor_flatten__") or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    )
    uninitialized = nn.parameter.is_lazy(tensor)
    return tensor.layout is torch.strided and not (wrapper or uninitialized or tensor.is_quantized or tensor.is_nested)


def set_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    """Give a tensor the Python attributes that it had."""
    vars(tensor).update(attributes)


def _sets_state(tensor: Any) -> bool:
    """Whether the class of a tensor has its own `__setstate__`."""
    return type(tensor).__setstate__ is not torch.Tensor.__setstate__


def _set_state_of_tensor(tensor: Any, held: tuple[Any]) -> None:
    """Sets the state like torch, which calls a `__setstate__` of the class even with `None`."""
    (state,) = held
    if _sets_state(tensor):
        tensor.__setstate__(state)
        return
    attributes, slots = state if type(state) is tuple else (state, {})
    vars(tensor).update(attributes or {})
    for name, value in slots.items():
        object.__setattr__(tensor, name, value)


def _rebuild_mkldnn(dense: torch.Tensor) -> torch.Tensor:
    return dense.cpu().to_mkldnn()  # this format exists only in main memory


def _reduce_nested(tensor: torch.Tensor) -> tuple[Any, ...]:
    function, arguments, *rest = tensor.__reduce_ex__(5)
    # If a tensor has attributes, torch's function is among the arguments of another function.
    function, *arguments = (
        rebuild_nested if part is torch_rebuilds_nested else part for part in (function, *arguments)
    )
    return (function, tuple(arguments), *rest)


def _reduce_quantized(tensor: torch.Tensor) -> tuple[Any, ...]:
    content = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    quantizer: tuple[Any, ...]  # as `torch.Tensor.__reduce_ex__` describes it
    if tensor.qscheme() is torch.per_tensor_affine:
        quantizer = tensor.q_scale(), tensor.q_zero_point()
    else:
        quantizer = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()
    return _rebuild_quantized, (content, tensor.dtype, *place, (tensor.qscheme(), *quantizer), tensor.requires_grad)


def _rebuild_quantized(content: torch.Tensor, dtype: torch.dtype, *description: Any) -> torch.Tensor:
    return rebuild_quantized(content.untyped_storage(), dtype, *description)


def tensors_of(obj: Any) -> list[torch.Tensor]:
    """A tensor itself, or the parameters and buffers of a module and of all modules registered in it. Other objects have none."""
    if isinstance(obj, torch.Tensor):
        return [obj]
    members = map(vars, paths.registered_below([obj] if paths.is_module(obj) else []).values())
    groups = (held.get(name, {}) for held in members for name in ("_parameters", "_buffers"))
    return [tensor for group in groups for tensor in group.values() if tensor is not None]


def why_copied(obj: Any) -> str | None:
    """The reason why a tensor, an array or a module has private memory in every load; None if it can be shared."""
    if isinstance(obj, np.ndarray):
        return "an array of Python objects" if obj.dtype.hasobject else None
    if isinstance(obj, torch.Tensor):
        return "MKLDNN has a memory format of its own" if obj.layout is MKLDNN else None
    return "packed parameters of a quantized module" if packs_its_own(type(obj)) else None


def packs_its_own(cls: type) -> bool:
    """Whether modules of this class hide their weights, as those of quantized modules do."""
    return cls.__name__ == "LinearPackedParams"
