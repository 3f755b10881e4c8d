"""How are exported programs split from their tensors: they are saved with stand-ins of one element in the place of them."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat.torch import set_tensors_of_exported, tensors_of_exported


def reduce_exported(program: ExportedProgram) -> tuple[Any, ...]:
    """An exported program: its graph, and the tensors of its state and its constants by name."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    twin = copy.copy(program)
    set_tensors_of_exported(
        twin,
        {name: _stand_in(value) for name, value in program.state_dict.items()},
        {**program.constants, **{name: _stand_in(value) for name, value in constants.items()}},
    )
    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # of the stand-ins: no tensor covers its storage
        torch.export.save(twin, graph)
    return _load, (graph.getvalue(), dict(program.state_dict), constants)


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    one = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(one, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else one


def _load(graph: bytes, state: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]) -> ExportedProgram:
    program = torch.export.load(io.BytesIO(graph))
    for held, tensors in zip(tensors_of_exported(program), (state, constants), strict=True):
        held.update(tensors)
    return program
