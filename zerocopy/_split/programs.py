"""How are programs (TorchScript and exported programs) split from their tensors?

torch saves programs, because pickle cannot. A program is saved with stand-ins of one element instead of its tensors. The tensors
travel beside the saved program, and are attached to it after it is loaded.
"""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat.torch import (
    attribute_names,
    compiled_module,
    constants_in_code,
    set_tensors_of_exported,
    submodules,
    tensors_of_exported,
)
from zerocopy._store.tensors import repeated

TORCHSCRIPT = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
PROGRAMS = (*TORCHSCRIPT, ExportedProgram)

SMALL = 1024  # bytes: smaller constants stay in the code


def reduce_program(program: Any) -> tuple[Any, ...]:
    """A program of any kind: its file, and the tensors to attach to it."""
    if isinstance(program, ExportedProgram):
        return _reduce_exported(program)
    if isinstance(program, torch.jit.ScriptModule):
        return _reduce_module(compiled_module(program))
    file = io.BytesIO()
    torch.jit.save(program, file)
    return _load_function, (file.getvalue(),)


def _load_function(code: bytes) -> Any:
    return torch.jit.load(io.BytesIO(code))


# Exported programs: their tensors are in two dicts, by name.


def _reduce_exported(program: ExportedProgram) -> tuple[Any, ...]:
    constants = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    twin = copy.copy(program)
    set_tensors_of_exported(
        twin,
        {name: _exported_stand_in(value) for name, value in program.state_dict.items()},
        {**program.constants, **{name: _exported_stand_in(value) for name, value in constants.items()}},
    )
    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # stand-ins do not cover their storages
        torch.export.save(twin, graph)
    return _load_exported, (graph.getvalue(), dict(program.state_dict), constants)


def _exported_stand_in(tensor: torch.Tensor) -> torch.Tensor:
    stand_in = repeated(0, tensor.shape, tensor.dtype, tensor.device)
    return nn.Parameter(stand_in, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stand_in


def _load_exported(graph: bytes, state: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]) -> ExportedProgram:
    program = torch.export.load(io.BytesIO(graph))
    for held, tensors in zip(tensors_of_exported(program), (state, constants), strict=True):
        held.update(tensors)
    return program


# TorchScript modules: scripted, traced or frozen. `module` is the compiled module that torch runs below the Python object.
#
# Tensors in attributes are replaced in a shallow copy. After loading, they are attached in the order of a walk: an assignment to
# `.data` takes effect in the compiled code too. The constants of a frozen graph belong to its code, which copies share. They are
# replaced only while the program is saved, and each is found again by the number in its stand-in.

_Key: TypeAlias = tuple[torch.dtype, tuple[int, ...], int]  # dtype and shape of a constant, the number in its stand-in

_saving = threading.Lock()


def tensors_of(program: torch.jit.ScriptModule) -> Iterator[torch.Tensor]:
    """Parameters, buffers and tensors in other attributes of a program, as its code sees them."""
    yield from _attribute_tensors(compiled_module(program))


def _reduce_module(module: Any) -> tuple[Any, ...]:
    constants = _numbered(_constants(module))
    skeleton = _copy_with_stand_ins(module)
    with _saving:
        held = {key: constant.data for key, constant in constants.items()}
        try:
            for key, constant in constants.items():
                constant.data = repeated(key[2], constant.shape, constant.dtype, constant.device)
            code = skeleton.save_to_buffer()
        finally:
            for key, constant in constants.items():
                constant.data = held[key]
    return _load_module, (code, [tensor.detach() for tensor in _attribute_tensors(module)], constants)


def _load_module(code: bytes, tensors: list[torch.Tensor], constants: dict[_Key, torch.Tensor]) -> Any:
    placed = [*tensors, *constants.values()]
    program = torch.jit.load(io.BytesIO(code), map_location=placed[0].device if placed else None)
    module = compiled_module(program)
    for own, shared in zip(_attribute_tensors(module), tensors, strict=True):
        own.data = shared
    for own in _constants(module):
        if own.numel() and not any(own.stride()):
            own.data = constants.get(_key(own, _number_in(own)), own)
    return program


def _attribute_tensors(module: Any) -> Iterator[torch.Tensor]:
    """Parameters, buffers and tensors in other attributes, of `module` and below."""
    for name in attribute_names(module):
        yield from _tensors_in(module.getattr(name))
    for _, child in submodules(module):
        yield from _attribute_tensors(child)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def _copy_with_stand_ins(module: Any) -> Any:
    twin = copy.copy(module)
    for name in attribute_names(module):
        value = module.getattr(name)
        if next(_tensors_in(value), None) is not None:
            twin.setattr(name, _with_stand_ins(value))
    for name, child in submodules(module):
        twin.setattr(name, _copy_with_stand_ins(child))
    return twin


def _with_stand_ins(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return repeated(0, value.shape, value.dtype, value.device).requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(_with_stand_ins(item) for item in value)
    if isinstance(value, dict):
        return {key: _with_stand_ins(item) for key, item in value.items()}
    return value


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


def _numbered(constants: list[torch.Tensor]) -> dict[_Key, torch.Tensor]:
    """Constants by the keys of their stand-ins. Stand-ins must differ: equal ones would be saved as one, in another order.

    A dtype with few exact integers (bool, float8) has few keys. The remaining constants of such a dtype stay in the code.
    """
    keyed: dict[_Key, torch.Tensor] = {}
    for constant in constants:
        exact = (n for n in range(100) if _number_in(repeated(n, (1,), constant.dtype, constant.device)) == n)
        number = next((number for number in exact if _key(constant, number) not in keyed), None)
        if number is not None:
            keyed[_key(constant, number)] = constant
    return keyed


def _number_in(stand_in: torch.Tensor) -> int:
    """The number that a stand-in repeats; -1 for a value that is not an integer."""
    value = stand_in.flatten()[0].item().real
    return int(value) if value == value // 1 else -1


def _key(constant: torch.Tensor, number: int) -> _Key:
    return constant.dtype, tuple(constant.shape), number
