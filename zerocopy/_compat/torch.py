"""Which parts of torch does the package use that torch does not promise?

They were read in the source of torch 2.13.0; links show where.

`Module._parameters`, `_buffers`, `_modules` and `_non_persistent_buffers_set` have underscores, too. The whole package uses them
directly: the documented ways to extend modules are built on these names, and so are many modules of other packages.

Functions that are called for every tensor of a model are torch's own functions, so that no Python frame is added.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

# How often a tensor was written to in place, as autograd counts it. The tensor shares the count with its views and detached
# tensors, but not with the results of `.data`. Inference tensors have no count, and raise an error. `THPVariable_get_version`:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/python_variable.cpp
version_of: Callable[[Any], int] = operator.attrgetter("_version")

# The tensor that a view was created from, None for a tensor that is not a view. In the same file: `THPVariable_get_base`.
base_of: Callable[[torch.Tensor], torch.Tensor | None] = operator.attrgetter("_base")

# Takes a class, a tensor and `requires_grad`, and returns a leaf of that class over the same memory. The leaf is not a view, but
# shares the version counter of the tensor. In the same file: `THPVariable_make_subclass`.
leaf_of_class: Callable[[Any, torch.Tensor, bool], Any] = torch.Tensor._make_subclass

# A view that shows the negated values of its memory, as the imaginary part of a conjugate does.
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml: `_neg_view`
negated_view: Callable[[torch.Tensor], torch.Tensor] = torch._neg_view

# The layout of tensors in MKLDNN's own format. They have no storage.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/utils/tensor_layouts.cpp
MKLDNN: torch.layout = torch._mkldnn  # type: ignore[attr-defined]

# The number of a tensor's storage. No two storages that exist at the same time have the same number.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/jit/python/init.cpp
storage_id: Callable[[torch.Tensor], int] = torch._C._storage_id  # type: ignore[attr-defined]

# The same number, for a storage object. https://github.com/pytorch/pytorch/blob/v2.13.0/torch/storage.py: `_cdata`
id_of_storage: Callable[[torch.UntypedStorage], int] = operator.attrgetter("_cdata")

# How many tensors and storage objects refer to the storage with this number.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/Module.cpp
storage_use_count: Callable[[int], int] = torch._C._storage_Use_Count


# How many C++ references to a tensor exist: from its Python object, from views, from the node that accumulates its gradient, and
# from arrays that share its memory by DLPack. `swap_tensors` uses it:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/__init__.py
tensor_use_count: Callable[[torch.Tensor], int] = torch.Tensor._use_count  # type: ignore[attr-defined]


# In this context, tensors of subclasses behave like plain tensors. Documented, but under a private name:
# https://github.com/pytorch/pytorch/blob/v2.13.0/docs/source/notes/extending.rst
as_plain_tensors: Any = torch._C.DisableTorchFunctionSubclass


def hold_storage_ids(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Reserve the numbers of these tensors' storages: no new storage gets them until they are released. Memory is not kept.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/StorageSharing.cpp: `THPStorage_weakRef`.
    """
    return [tensor.untyped_storage()._weak_ref() for tensor in tensors]  # type: ignore[misc]


# Releases a result of `hold_storage_ids`. In the same file: `THPStorage_freeWeakRef`.
release_storage_id: Callable[[int], None] = torch.UntypedStorage._free_weak_ref


def hooks_registered() -> int:
    """Return a number that grows with every hook that is registered on a module in this process.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/hooks.py: `RemovableHandle.next_id`.
    """
    return RemovableHandle.next_id


def is_parametrized_class(cls: type) -> bool:
    """Whether torch created `cls` for one module with parametrizations, as a subclass of the module's own class.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/utils/parametrize.py: `_inject_new_class`.
    """
    return (
        issubclass(cls, nn.Module)
        and cls.__module__ == parametrize.__name__
        and cls.__name__.startswith("Parametrized")
    )


def parametrize_again(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module the class that makes its parametrizations work. The module must already hold the parametrizations.

    In the same file: `_inject_new_class`, `_inject_property`.
    """
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)


def rebuild_quantized(storage: torch.UntypedStorage, dtype: torch.dtype, *description: Any) -> torch.Tensor:
    """Create a quantized tensor over `storage`, as torch unpickles it, from offset, shape, stride, quantizer, `requires_grad`.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_utils.py: `_rebuild_qtensor`. It takes only a typed storage, and
    creating a typed storage warns without `_internal`.
    """
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
    rebuild: Callable[..., torch.Tensor] = torch._utils._rebuild_qtensor
    return rebuild(typed, *description, OrderedDict())


# Rebuilds a nested tensor of the layout `strided`. In the same file.
torch_rebuilds_nested: Callable[..., torch.Tensor] = torch._utils._rebuild_nested_tensor


def rebuild_nested(content: torch.Tensor, *shapes: torch.Tensor) -> torch.Tensor:
    """Rebuild a nested tensor on any device. The shapes are always moved to main memory: else torch ends the process."""
    return torch_rebuilds_nested(content, *(shape.cpu() for shape in shapes))


def tensors_of_exported(program: ExportedProgram) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dicts in which a program holds its state and its constants, not copies of them.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/export/exported_program.py: `_state_dict`, `_constants`.
    """
    return program._state_dict, program._constants


def set_tensors_of_exported(program: ExportedProgram, state: dict[str, Any], constants: dict[str, Any]) -> None:
    """Give a program other dicts. If the program is a shallow copy, the original does not change."""
    program._state_dict, program._constants = state, constants


def compiled_module(program: torch.jit.ScriptModule) -> Any:
    """Return the module that TorchScript runs. It has `getattr`, `setattr` and `save_to_buffer`; a shallow copy shares the code.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/jit/_script.py: `_c`;
    its methods: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/jit/python/script_init.cpp
    """
    return program._c


def attribute_names(module: Any) -> list[str]:
    """Return the names of a compiled module's attributes: parameters, buffers, tensors and others, but no submodules; sorted.

    In the same `script_init.cpp`: `ConcreteModuleType`.
    """
    concrete: Any = torch._C.ConcreteModuleType
    return sorted(concrete.from_jit_type(module._type()).get_attributes())


def submodules(module: Any) -> list[tuple[str, Any]]:
    """Return the modules that a compiled module holds, by name. In the same `script_init.cpp`: `ModuleDict`."""
    return list(torch._C.ModuleDict(module).items())


def constants_in_code(module: Any) -> Iterator[Any]:
    """Yield the constants in the code of a compiled module's own methods: tensors, lists of tensors, objects that may hold some.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/jit/python/python_ir.cpp: `findAllNodes`, `kindOf`.
    """
    for name in module._method_names():
        for node in module._get_method(name).graph.findAllNodes("prim::Constant", recurse=True):
            kind = node.kindOf("value") if node.hasAttribute("value") else ""
            if kind in ("t", "ts", "ival"):
                yield getattr(node, kind)("value")
