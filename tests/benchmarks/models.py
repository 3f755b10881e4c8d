"""Which models are measured? They are created from their configurations. No weights are downloaded."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn

from zerocopy._cli.inputs import Inputs, inputs_of
from zerocopy._cli.inputs import run as call
from zerocopy.errors import ArgumentError

STATED = re.compile(r"llama(\d+)")  # the depth is a part of the name


@attrs.frozen
class Model:
    """One model to measure.

    Attributes:
        name: its name on the command line.
        title: its name in tables.
        build: creates the model. It is a function of a module, or a partial of one, because workers import it.
        twin: creates a tiny model of the same classes (for a user's own model: of linear layers). It is used before
            anything is measured, so that imports and one-time set-up are done.
        rows: the number of rows for Ray Data; 0 if it is not measured, for example because the model is too large.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    rows: int = 0


def names() -> list[str]:
    """The names of the models that are measured by default."""
    return ["bert", "llama80", "llama1b", "mlp", "script"]


def find(name: str) -> Model:
    """The model called `name`: one of `names()`, `stack`, `llama` and a depth, or `module:build`.

    Raises:
        ArgumentError: there is no such model.
    """
    if ":" in name:
        return Model(name, name, functools.partial(_built, name), functools.partial(_perceptron, 2, 8), rows=64)
    if name in _KNOWN:
        return _KNOWN[name]
    stated = STATED.fullmatch(name)
    if stated and int(stated[1]) > 0:
        return _small_llama(int(stated[1]))
    raise ArgumentError(
        f"There is no model {name!r}.",
        hint=f"choose from {', '.join(names())}, llama and a number of layers, or module:build for one of your own.",
    )


def run(model: nn.Module, rows: int = 1) -> bool:
    """Run the model on `rows` rows, if its inputs are known. Returns whether it ran.

    `zerocopy bench` finds inputs in the same way. In addition, `Perceptron` and TorchScript models may have a `width`.
    A model with an `example_input_array` runs on this array, whatever `rows` is.
    """
    inputs = _inputs(model, rows)
    if inputs is None:
        return False
    call(model, inputs)
    return True


def storages(model: nn.Module) -> list[torch.UntypedStorage]:
    """The storages of all parameters and buffers, each one once."""
    tensors = [*model.parameters(), *model.buffers()]
    return list({tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values())


def _inputs(model: nn.Module, rows: int) -> Inputs | None:
    width = getattr(model, "width", None)
    if isinstance(model, Perceptron | torch.jit.ScriptModule) and width:
        return (torch.ones(rows, width),)
    return inputs_of(model, rows)


def _built(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    hint = "give module:build, where build is a function without arguments that returns an nn.Module."
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(f"There is no function {name!r}: {error}.", hint=hint) from error
    if not callable(build):
        raise ArgumentError(f"{name!r} is {type(build).__name__}, not a function.", hint=hint)
    model = build()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name!r} returned {type(model).__name__}, not an nn.Module.", hint=hint)
    return model


class Perceptron(nn.Module):
    """Linear layers of one width, which TorchScript can compile."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The output of the last layer."""
        for layer in self.layers:
            rows = layer(rows)
        return rows

    @torch.jit.export
    def echo(self, argument: int) -> int:
        """Return the argument. A call of this method computes nothing."""
        return argument


def _perceptron(layers: int, width: int) -> nn.Module:
    return Perceptron(layers, width)


def _script(layers: int, width: int) -> nn.Module:
    scripted: nn.Module = torch.jit.script(Perceptron(layers, width))
    return scripted


def _bert(**shape: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    return _filled(lambda: BertModel(BertConfig(**shape)))


def _llama(*, dtype: torch.dtype = torch.float32, **shape: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    make: Any = LlamaForCausalLM._from_config
    return _filled(lambda: make(LlamaConfig(**shape), dtype=dtype))


def _filled(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with constant weights. Random weights would take most of the time of a run, and just as much memory."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model.eval()


_SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1000}
_TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "num_hidden_layers": 1,
}


def _small_llama(depth: int) -> Model:
    build = functools.partial(_llama, num_hidden_layers=depth, **_SMALL)
    return Model(f"llama{depth}", f"{depth}-layer Llama", build, functools.partial(_llama, **_TINY), rows=256)


_KNOWN = {
    model.name: model
    for model in (
        Model("bert", "BERT-base", _bert, functools.partial(_bert, **_TINY), rows=256),
        Model(
            "llama1b",
            "1.1-billion Llama, bfloat16",
            functools.partial(
                _llama,
                dtype=torch.bfloat16,
                hidden_size=2048,
                intermediate_size=5632,
                num_hidden_layers=22,
                num_attention_heads=32,
                num_key_value_heads=4,
                vocab_size=32000,
            ),
            functools.partial(_llama, dtype=torch.bfloat16, **_TINY),
        ),
        Model("stack", "50 MB MLP", functools.partial(_perceptron, 48, 512), functools.partial(_perceptron, 2, 8)),
        Model("mlp", "1 GB MLP", functools.partial(_perceptron, 16, 4096), functools.partial(_perceptron, 2, 8)),
        Model("script", "TorchScript MLP", functools.partial(_script, 4, 4096), functools.partial(_script, 2, 8), 256),
    )
}
