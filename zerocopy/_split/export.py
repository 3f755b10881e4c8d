"""How are exported programs split from their tensors: they are saved with stand-ins of one element in the place of them."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram


def reduce_exported(program: ExportedProgram) -> tuple[Any, ...]:
    """An exported program: its graph, and the tensors of its state and its constants by name."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    twin: Any = copy.copy(program)
    twin._state_dict = {name: _stand_in(value) for name, value in program.state_dict.items()}
    twin._constants = {**program.constants, **{name: _stand_in(value) for name, value in constants.items()}}
    graph = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # of the stand-ins: no tensor covers its storage
        torch.export.save(twin, graph)
    return _load, (graph.getvalue(), dict(program.state_dict), constants)


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    one = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(one, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else one


def _load(graph: bytes, state: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]) -> ExportedProgram:
    program: Any = torch.export.load(io.BytesIO(graph))
    program._state_dict.update(state)
    program._constants.update(constants)
    loaded: ExportedProgram = program
    return loaded
