"""Do `extract_tensors` and its inverse `replace_tensors` work?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray
import torch
from observing import difference, observe
from torch import nn
from torch.nn.utils import parametrizations

from zerocopy import extract_tensors, replace_tensors
from zerocopy.memory import private_bytes
from zerocopy.testing import shares_memory


class Everything(nn.Module):
    """A module with ties, a shared child, unusual dtypes, strides, buffers, flags, attributes, a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.again = self.first
        self.half = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(8)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.rotated = parametrizations.orthogonal(nn.Linear(4, 4))
        self.register_buffer("hidden", torch.arange(4.0), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("missing", None)
        self.second.bias.requires_grad_(False)
        self.first.bias.tag = "mine"
        self.scale = torch.ones(3)


def test_inverse() -> None:
    """After `extract_tensors` and `replace_tensors` a module has the same ties, dtypes, strides, flags, modes and attributes."""
    module = Everything()
    module.norm.eval()
    before = observe(module)
    skeleton, tensors = extract_tensors(module)
    assert difference(before, observe(module)) == ""
    replace_tensors(skeleton, tensors)
    # An extracted tensor alone does not show where its storage is.
    assert difference(before, observe(skeleton)) == ""


def test_form() -> None:
    """The skeleton has no data; arrays are in the order of `named_modules`, and are views of the module's memory."""
    module = Everything()
    skeleton, tensors = extract_tensors(module)
    assert all(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    assert skeleton.first.weight.shape == (8, 8)
    names = [name for name, _ in module.named_modules()]
    first, second = tensors[names.index("first")]["params"], tensors[names.index("second")]["params"]
    assert isinstance(first["weight"], np.ndarray)
    assert first["weight"] is second["weight"]
    assert np.shares_memory(first["weight"], module.first.weight.detach().numpy())
    assert tensors[names.index("half")]["params"]["weight"].dtype is torch.bfloat16
    assert tensors[0]["buffers"].keys() == {"hidden"}


@ray.remote
def put_back(skeleton: Any, tensors: Any) -> Any:
    before = private_bytes()
    replace_tensors(skeleton, tensors)
    total = float(skeleton[0].weight.detach().sum())
    grown = private_bytes() - before
    second_skeleton, _ = extract_tensors(skeleton)
    replace_tensors(second_skeleton, tensors)
    shared = shares_memory(skeleton[0].weight, second_skeleton[0].weight)
    with torch.no_grad():
        skeleton[0].weight.zero_()
    return total, grown, shared, float(tensors[1]["params"]["weight"].sum()), skeleton[0].weight.requires_grad


def test_through_the_store(cluster: None) -> None:
    """Arrays from the object store are mapped, not copied, and a write to the module never reaches the store."""
    module = nn.Sequential(nn.Linear(3000, 3000), nn.Linear(3000, 3000, bias=False))
    module[1].weight = module[0].weight
    skeleton, tensors = extract_tensors(module)
    total, grown, shared, stored, requires_grad = ray.get(put_back.remote(skeleton, ray.put(tensors)))
    assert total == pytest.approx(float(module[0].weight.detach().sum()), rel=1e-3)
    assert grown < 0.1 * 4 * 3000 * 3000
    assert shared
    assert stored == pytest.approx(total, rel=1e-3)
    assert requires_grad


def test_read_only_arrays_are_copied() -> None:
    """A read-only array that is not in the store is copied into a new tensor, without a warning."""
    skeleton, tensors = extract_tensors(nn.Linear(4, 4))
    array = tensors[0]["params"]["weight"].copy()
    array.flags.writeable = False
    tensors[0]["params"]["weight"] = array
    replace_tensors(skeleton, tensors)
    with torch.no_grad():
        skeleton.weight.zero_()
    assert array.any()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_refusals() -> None:
    """Each misuse raises an error with a clear message."""
    for wrong in ("text", torch.jit.script(nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="extract_tensors expects an nn.Module"):
            extract_tensors(wrong)  # type: ignore[arg-type]
    skeleton, tensors = extract_tensors(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="1 modules, but there are tensors for 2"):
        replace_tensors(skeleton, [*tensors, *tensors])
    tensors[0]["params"]["weigth"] = tensors[0]["params"]["weight"]
    with pytest.raises(TypeError, match=r"no params\['weigth'\]"):
        replace_tensors(skeleton, tensors)
    assert skeleton.weight.is_meta
    for wrong, words in (
        ([{"params": {"weight": np.ones((2, 2), np.float32)}}], r"params\['bias'\] is missing"),
        (
            [{"params": {"weight": np.ones((3, 2)), "bias": np.ones(2, np.float32)}}],
            r"float64 of shape \(3, 2\), not float32",
        ),
        ([{"weights": {}}], "'weights' is neither 'params' nor 'buffers'"),
    ):
        with pytest.raises(TypeError, match=words):
            replace_tensors(skeleton, wrong)
