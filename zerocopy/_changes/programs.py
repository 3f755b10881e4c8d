"""Have TorchScript modules changed? Their members are not in Python, and torch creates new Python objects for their tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from zerocopy._changes.tensor_states import TensorStates
from zerocopy._split import programs


class Programs:
    """TorchScript modules at one moment: their tensors, and the modes of their parts. Keeps none of them alive."""

    def __init__(self, objects: Iterable[Any]) -> None:
        """`objects`: any objects. Those that are not TorchScript modules are ignored."""
        found = [obj for obj in objects if isinstance(obj, torch.jit.ScriptModule)]
        self._states = [
            (weakref.ref(program), _modes_of(program), TensorStates(list(programs.tensors_of(program))))
            for program in found
        ]

    def are_unchanged(self) -> bool:
        """Whether all of them are alive, and have the same tensors and the same modes."""
        for ref, modes, states in self._states:
            program = ref()
            if program is None or _modes_of(program) != modes:
                return False
            if not states.are_like(list(programs.tensors_of(program))):
                return False
        return True


def _modes_of(program: torch.jit.ScriptModule) -> list[bool]:
    return [getattr(part, "training", False) for part in program.modules()]  # a frozen program has no mode
