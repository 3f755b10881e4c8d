"""What are the inputs of a model? A user's function creates them, or the model itself declares them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

TOKENS = 16  # in each row for a language model

Inputs: TypeAlias = tuple[Any, ...] | dict[str, Any]


def as_inputs(made: Any) -> Inputs:
    """The result of a function, as arguments: a tuple by position, a dict by name, any other object as the only argument."""
    return made if isinstance(made, tuple | dict) else (made,)


def inputs_of(model: Any, rows: int = 1) -> Inputs | None:
    """The inputs that a model declares; None if it declares none.

    A user's own model may have `example_inputs(rows)`. Models of transformers have `dummy_inputs`, and those of Lightning have
    `example_input_array`.
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
