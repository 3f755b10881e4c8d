"""Does `zerocopy bench` measure a user's own model, shared and copied, and report what it cannot measure?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zerocopy._cli import bench
from zerocopy._cli.bench import _fitting, _pickled, _Result
from zerocopy._cli.inputs import inputs_of
from zerocopy._cli.sizing import Weights
from zerocopy._cli.trial import Figures, Late, Trial

NBYTES = 6 * (1500 * 1500 + 1500) * 4
FIGURES = Figures(workers=2, memory=100, publish=0.5, load=0.002, first=None, steady=None)


@pytest.mark.long
def test_a_model_of_ones_own_is_measured(cluster: None, told: Callable[..., Any]) -> None:
    """Two workers that share the model use its memory once, two workers with copies use it twice; no figure is missing."""
    found = told("bench", "models_to_name:layers", "--input", "models_to_name:batch", "--workers", 2)
    assert found["shared_bytes"] == NBYTES
    assert (found["notes"], found["plain_memory_is_computed"]) == ([], False)
    assert NBYTES <= found["zerocopy"]["memory"] < 1.6 * NBYTES
    assert 1.8 * NBYTES < found["plain"]["memory"] == found["plain_memory"]
    for way in ("zerocopy", "plain"):
        assert all(0 < found[way][figure] < 60 for figure in ("publish", "load", "first", "steady"))


def test_what_was_not_measured_is_told() -> None:
    """Memory of copies that do not fit or are not ready in time is computed; without a forward pass its figure is missing."""
    weights = Weights(shared=1000, copied=10)
    few = _Result("m:build", weights, 8, FIGURES, FIGURES, "")
    assert few.memory_of_copies == 400
    assert "(computed)" in few.text()
    assert "2 copies were measured: more do not fit" in few.text()
    assert "No forward was run" in few.text()
    none = _Result("m:build", weights, 8, FIGURES, None, "Plain copies were not measured: two minutes were over.")
    assert none.to_dict()["plain_memory"] == 8080
    assert "two minutes were over" in none.text()
    assert "2.0 ms" in none.text()


def test_how_many_copies_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one copy is measured; each copy needs twice its bytes while it is unpickled."""
    monkeypatch.setattr(bench.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    assert [_fitting(8, nbytes) for nbytes in (10, 100, 1000, 0)] == [8, 4, 1, 8]


def test_a_model_that_does_not_pickle_has_no_copies() -> None:
    """The report gives the reason."""
    pickled, why = _pickled(nn.Linear(2, 2).register_forward_hook(lambda *_: None) and (lambda: 0))
    assert pickled is None
    assert "pickle says" in why


def test_time_is_over(cluster: None) -> None:
    """A measurement that takes too long stops with an error."""
    with pytest.raises(Late):
        Trial(1, None, time.monotonic()).copies(lambda: b"", 0.0)


def test_models_say_what_they_take() -> None:
    """Inputs come from a model's `example_inputs`, or from the attributes of transformers and Lightning models."""
    model = nn.Linear(2, 2)
    assert inputs_of(model) is None
    model.example_input_array = torch.ones(1, 2)
    (array,) = inputs_of(model)
    assert array.shape == (1, 2)
    model.dummy_inputs = {}
    assert inputs_of(model, rows=3)["input_ids"].shape == (3, 16)
    model.example_inputs = lambda rows: {"input": rows}
    assert inputs_of(model) == {"input": 1}
