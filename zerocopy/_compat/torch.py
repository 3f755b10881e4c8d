"""What of torch does the package use that torch does not promise. Read in torch 2.13.0; a link says where.

`Module._parameters`, `_buffers`, `_modules` and `_non_persistent_buffers_set` have underscores too. They are used all over the
package as they are: what torch documents for those who extend modules is built on these names, and so are many modules of others.

What is asked of every tensor of a model is bound to torch's own function, so that no Python frame stands between.
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

# How often a tensor was written to in place, as autograd counts: together with its views and detached twins, but not with what
# `.data` gives. Inference tensors do not count: asked for it they raise. `THPVariable_get_version`:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/python_variable.cpp
version_of: Callable[[Any], int] = operator.attrgetter("_version")

# The tensor that a view was made from, None for others. In the same file: `THPVariable_get_base`.
base_of: Callable[[torch.Tensor], torch.Tensor | None] = operator.attrgetter("_base")

# Of a class, a tensor and `requires_grad` a leaf of that class over the same memory: not a view, but it counts versions together
# with the tensor. In the same file: `THPVariable_make_subclass`.
leaf_of_class: Callable[[Any, torch.Tensor, bool], Any] = torch.Tensor._make_subclass

# A view that shows its memory negated, as the imaginary part of a conjugate does.
# https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml: `_neg_view`
negated_view: Callable[[torch.Tensor], torch.Tensor] = torch._neg_view

# The layout of tensors in a format of MKLDNN's own, which have no storage.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/utils/tensor_layouts.cpp
MKLDNN: torch.layout = torch._mkldnn  # type: ignore[attr-defined]

# Which storage a tensor has, as a number: no two that live have the same.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/jit/python/init.cpp
storage_id: Callable[[torch.Tensor], int] = torch._C._storage_id  # type: ignore[attr-defined]

# The same number, asked of a storage. https://github.com/pytorch/pytorch/blob/v2.13.0/torch/storage.py: `_cdata`
id_of_storage: Callable[[torch.UntypedStorage], int] = operator.attrgetter("_cdata")

# How many tensors and storage objects refer to the storage of this number.
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/Module.cpp
storage_use_count: Callable[[int], int] = torch._C._storage_Use_Count


# How many references of C++ there are to a tensor: that of its Python object, of views, of the node that accumulates its
# gradient, of arrays that share its memory by DLPack. `swap_tensors` asks for it:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/__init__.py
tensor_use_count: Callable[[torch.Tensor], int] = torch.Tensor._use_count  # type: ignore[attr-defined]


# Within it, tensors of subclasses answer as plain ones do. Documented, but under a private name:
# https://github.com/pytorch/pytorch/blob/v2.13.0/docs/source/notes/extending.rst
as_plain_tensors: Any = torch._C.DisableTorchFunctionSubclass


def hold_storage_ids(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Keep the numbers of these tensors' storages from being given to new ones, but not their memory, until each is let go of.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/StorageSharing.cpp: `THPStorage_weakRef`.
    """
    return [tensor.untyped_storage()._weak_ref() for tensor in tensors]  # type: ignore[misc]


# Lets go of what `hold_storage_ids` gave. In the same file: `THPStorage_freeWeakRef`.
release_storage_id: Callable[[int], None] = torch.UntypedStorage._free_weak_ref


def hooks_registered() -> int:
    """A number that grows with every hook that is registered on a module in this process.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/hooks.py: `RemovableHandle.next_id`.
    """
    return RemovableHandle.next_id


def is_parametrized_class(cls: type) -> bool:
    """Whether `cls` was made on the fly for one module with parametrizations, derived from the module's own class.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/utils/parametrize.py: `_inject_new_class`.
    """
    return (
        issubclass(cls, nn.Module)
        and cls.__module__ == parametrize.__name__
        and cls.__name__.startswith("Parametrized")
    )


def parametrize_again(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module that holds its parametrizations already the class that makes them work.

    In the same file: `_inject_new_class`, `_inject_property`.
    """
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)


def rebuild_quantized(storage: torch.UntypedStorage, dtype: torch.dtype, *description: Any) -> torch.Tensor:
    """A quantized tensor over `storage`, as torch unpickles one: offset, shape, stride, quantizer, `requires_grad`.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_utils.py: `_rebuild_qtensor`. It takes a typed storage only, and
    making one warns without `_internal`.
    """
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
    rebuild: Callable[..., torch.Tensor] = torch._utils._rebuild_qtensor
    return rebuild(typed, *description, OrderedDict())


# Puts a nested tensor of the layout `strided` together. In the same file.
torch_rebuilds_nested: Callable[..., torch.Tensor] = torch._utils._rebuild_nested_tensor


def rebuild_nested(content: torch.Tensor, *shapes: torch.Tensor) -> torch.Tensor:
    """As torch does, on any device. The shapes are in main memory wherever the content is: else torch ends the process."""
    return torch_rebuilds_nested(content, *(shape.cpu() for shape in shapes))


def tensors_of_exported(program: ExportedProgram) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dicts in which a program holds its state, and its constants: not copies of them.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/export/exported_program.py: `_state_dict`, `_constants`.
    """
    return program._state_dict, program._constants


def set_tensors_of_exported(program: ExportedProgram, state: dict[str, Any], constants: dict[str, Any]) -> None:
    """Let a program hold other dicts. A shallow copy of one that does so leaves the original as it is."""
    program._state_dict, program._constants = state, constants


def compiled_module(program: torch.jit.ScriptModule) -> Any:
    """The module that TorchScript runs. It has `getattr`, `setattr` and `save_to_buffer`; a shallow copy shares the code.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/jit/_script.py: `_c`;
    its methods: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/jit/python/script_init.cpp
    """
    return program._c


def attribute_names(module: Any) -> list[str]:
    """The names of a compiled module's attributes: parameters, buffers, tensors and others, but no submodules; sorted.

    In the same `script_init.cpp`: `ConcreteModuleType`.
    """
    concrete: Any = torch._C.ConcreteModuleType
    return sorted(concrete.from_jit_type(module._type()).get_attributes())


def submodules(module: Any) -> list[tuple[str, Any]]:
    """The modules that a compiled module holds, by name. In the same `script_init.cpp`: `ModuleDict`."""
    return list(torch._C.ModuleDict(module).items())


def constants_in_code(module: Any) -> Iterator[Any]:
    """The constants that the code of a compiled module's own methods holds: tensors, lists of them, other objects with some.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/jit/python/python_ir.cpp: `findAllNodes`, `kindOf`.
    """
    for name in module._method_names():
        for node in module._get_method(name).graph.findAllNodes("prim::Constant", recurse=True):
            kind = node.kindOf("value") if node.hasAttribute("value") else ""
            if kind in ("t", "ts", "ival"):
                yield getattr(node, kind)("value")
