"""How are TorchScript programs split from their tensors: they are saved, not pickled.

A program is saved with stand-ins of one element in the place of its tensors, and the loaded one is pointed to the real
ones: assigning `.data` holds for its compiled code too. Tensors in attributes are replaced in a shallow copy of the program. The
constants of a frozen graph belong to its code, which copies share: they are replaced for the moment of saving.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from zerocopy._compat.torch import attribute_names, compiled_module, constants_in_code, submodules

PROGRAMS = (torch.jit.ScriptModule, torch.jit.ScriptFunction)

SMALL = 1024  # constants below so many bytes stay in the code

_Key: TypeAlias = tuple[torch.dtype, tuple[int, ...], int]

_saving = threading.Lock()


def reduce_program(program: Any) -> tuple[Any, ...]:
    """A scripted, traced or frozen module, or a scripted function: its code, and its tensors in the order of a walk."""
    module = compiled_module(program) if isinstance(program, torch.jit.ScriptModule) else None
    if module is None:
        return _load_function, (_saved(program),)
    constants = _numbered(_constants(module))
    skeleton = _copy_with_stand_ins(module)
    with _saving:
        held = {key: constant.data for key, constant in constants.items()}
        try:
            for key, constant in constants.items():
                constant.data = _stand_in(constant, key[2])
            code = skeleton.save_to_buffer()
        finally:
            for key, constant in constants.items():
                constant.data = held[key]
    return _load_module, (code, [tensor.detach() for tensor in _slots(module)], constants)


def tensors_of(program: torch.jit.ScriptModule) -> Iterator[torch.Tensor]:
    """Parameters, buffers and tensors in other attributes of a program, as its code sees them."""
    yield from _slots(compiled_module(program))


def _saved(function: Any) -> bytes:
    file = io.BytesIO()
    torch.jit.save(function, file)
    return file.getvalue()


def _load_function(code: bytes) -> Any:
    return torch.jit.load(io.BytesIO(code))


def _load_module(code: bytes, slots: list[torch.Tensor], constants: dict[_Key, torch.Tensor]) -> Any:
    placed = [*slots, *constants.values()]
    program = torch.jit.load(io.BytesIO(code), map_location=placed[0].device if placed else None)
    module = compiled_module(program)
    for own, shared in zip(_slots(module), slots, strict=True):
        own.data = shared
    for own in _constants(module):
        if own.numel() and not any(own.stride()):
            own.data = constants.get(_key(own, int(own.flatten()[0].item())), own)
    return program


def _stand_in(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """A tensor like `tensor` over a single element, which is `number`."""
    return torch.full((), number, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _slots(module: Any) -> Iterator[torch.Tensor]:
    """Parameters, buffers and tensors in other attributes, of `module` and below."""
    for name in attribute_names(module):
        yield from _tensors_in(module.getattr(name))
    for _, child in submodules(module):
        yield from _slots(child)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def _replaced(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        stand_in = _stand_in(value.detach(), 0)
        return stand_in.requires_grad_() if value.requires_grad else stand_in
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item) for key, item in value.items()}
    return value


def _copy_with_stand_ins(module: Any) -> Any:
    twin = copy.copy(module)
    for name in attribute_names(module):
        value = module.getattr(name)
        if next(_tensors_in(value), None) is not None:
            twin.setattr(name, _replaced(value))
    for name, child in submodules(module):
        twin.setattr(name, _copy_with_stand_ins(child))
    return twin


def _constants(module: Any) -> list[torch.Tensor]:
    """Plain tensors of at least a kilobyte that are constants of the code of `module` and below, each once."""
    found: dict[int, torch.Tensor] = {}
    for constant in _tensors_in(list(constants_in_code(module))):
        if constant.layout is torch.strided and constant.nbytes >= SMALL:
            found.setdefault(constant.data_ptr(), constant)
    for _, child in submodules(module):
        for constant in _constants(child):
            found.setdefault(constant.data_ptr(), constant)
    return list(found.values())


def _key(constant: torch.Tensor, number: int) -> _Key:
    return constant.dtype, tuple(constant.shape), number


def _numbered(constants: list[torch.Tensor]) -> dict[_Key, torch.Tensor]:
    """Constants by what their stand-ins will be known by: equal stand-ins would be saved as one, in another order.

    Of a dtype with few values (bool) only as many as it can tell apart; the rest stays in the code.
    """
    keyed: dict[_Key, torch.Tensor] = {}
    for constant in constants:
        values = 2 if constant.dtype is torch.bool else 100
        free = (number for number in range(values) if _key(constant, number) not in keyed)
        number = next(free, None)
        if number is not None:
            keyed[_key(constant, number)] = constant
    return keyed
