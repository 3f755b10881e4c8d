"""What does a model take: what a user's function makes, or what the model itself says?"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

TOKENS = 16  # of each row that a language model is given

Inputs: TypeAlias = tuple[Any, ...] | dict[str, Any]


def as_inputs(made: Any) -> Inputs:
    """What a function has made, as arguments: a tuple by position, a dict by name, all else the only one."""
    return made if isinstance(made, tuple | dict) else (made,)


def inputs_of(model: Any, rows: int = 1) -> Inputs | None:
    """What a model says that it takes; None where it does not.

    `example_inputs(rows)` is for models of one's own, `dummy_inputs` is that of transformers, `example_input_array` Lightning's.
    """
    if callable(getattr(model, "example_inputs", None)):
        return as_inputs(model.example_inputs(rows))
    if getattr(model, "dummy_inputs", None) is not None:
        return {"input_ids": torch.ones(rows, TOKENS, dtype=torch.long)}
    array = getattr(model, "example_input_array", None)
    return None if array is None else as_inputs(array)


@torch.inference_mode()
def run(model: Any, inputs: Inputs) -> None:
    """Call the model."""
    if isinstance(inputs, dict):
        model(**inputs)
    else:
        model(*inputs)
