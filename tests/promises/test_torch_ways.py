"""Do all functions of torch that change a module still work after it was published?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, HistogramObserver, PerChannelMinMaxObserver
from torch.nn.utils import prune

import zerocopy
from zerocopy import copied, shared
from zerocopy.testing import assert_zero_copy

pytestmark = pytest.mark.usefixtures("cluster")


class Scaled(torch.Tensor):
    """A tensor subclass, for which torch always swaps tensors."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


def net() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
    module[2].weight = nn.Parameter(torch.ones(8, 64).as_subclass(Scaled))
    module.register_buffer("steps", torch.zeros(1))
    return module.eval()


def published(module: nn.Module) -> nn.Module:
    publication = zerocopy.publish(module)
    module.kept = publication  # type: ignore[assignment]
    return module


def adopted(module: nn.Module) -> nn.Module:
    zerocopy.publish(module, adopt=True)
    return module


def loaded(module: nn.Module) -> nn.Module:
    result: nn.Module = zerocopy.publish(module).load()
    return result


def passed_on(module: nn.Module) -> nn.Module:
    result = loaded(module)
    zerocopy.publish(result)
    return result


STATES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "published": published,
    "adopted": adopted,
    "loaded": loaded,
    "passed on": passed_on,
}
CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda module: module.half(),
    "double and back": lambda module: module.double().float(),
    "to": lambda module: module.to(torch.bfloat16),
    "load_state_dict": lambda module: module.load_state_dict(net().state_dict()),
    "load_state_dict, assigned": lambda module: module.load_state_dict(net().state_dict(), assign=True),
    "to_empty": lambda module: module.to_empty(device="cpu").load_state_dict(net().state_dict()),
    "share_memory": lambda module: module.share_memory(),
    "requires_grad": lambda module: module.requires_grad_(False),
    "parametrize": lambda module: nn.utils.parametrizations.weight_norm(module[0]),
    "prune": lambda module: prune.l1_unstructured(module[0], "weight", 0.5),
    "swap": lambda module: torch.utils.swap_tensors(module[0].weight, nn.Parameter(torch.ones(64, 64))),
    "a step": lambda module: torch.optim.SGD(module.parameters(), lr=0.1).step(),
    "apply": lambda module: module.apply(
        lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None
    ),
}


@pytest.fixture(params=[False, True], ids=["data is assigned", "tensors are swapped"])
def swapping(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", STATES)
def test_every_way_to_change_a_module_works(state: str, change: str) -> None:
    """A published, adopted or loaded module changes like one that was never published, and is then published with the change."""
    torch.manual_seed(0)
    ours, plain = STATES[state](net()), net()
    plain.load_state_dict(ours.state_dict())
    for module in (ours, plain):
        torch.manual_seed(1)
        CHANGES[change](module)
    expected = plain.state_dict()
    for found in (ours, zerocopy.publish(ours).load()):
        assert list(found.state_dict()) == list(expected)
        for name, tensor in found.state_dict().items():
            assert tensor.dtype is expected[name].dtype
            assert torch.equal(tensor, expected[name]), name


@zerocopy.pipeline
class Observed:
    observers: nn.Module = shared()
    table: torch.Tensor = copied()
    index: torch.Tensor = shared()


def observers() -> nn.ModuleDict:
    per_channel = {"quant_min": 0, "quant_max": 255, "ch_axis": 0}
    return nn.ModuleDict(
        {
            "channels": PerChannelMinMaxObserver(),
            "histogram": HistogramObserver(bins=16),
            "fake": FusedMovingAvgObsFakeQuantize(
                torch.ao.quantization.MovingAveragePerChannelMinMaxObserver,
                qscheme=torch.per_channel_symmetric,
                dtype=torch.qint8,
                quant_min=-128,
                quant_max=127,
                ch_axis=per_channel["ch_axis"],
            ),
        }
    )


@pytest.mark.parametrize("state", STATES)
def test_observers_grow(state: str) -> None:
    """Observers of a published module can grow from one element to one per channel."""
    ours, plain = STATES[state](observers()), observers()
    batch = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for module in (ours, plain):
        for observer in module.values():
            observer(batch)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
def test_single_elements_and_copied_tensors_grow(dtype: torch.dtype) -> None:
    """Storages with one element, and storages of `copied()` fields, can be resized after a load."""
    found = zerocopy.publish(Observed(observers(), torch.ones(1000), torch.ones((), dtype=dtype))).load()
    for tensor in (found.index, found.table):
        before = tensor.flatten()[:1].clone()
        tensor.resize_(5000)
        assert torch.equal(tensor[:1], before)
    torch.add(torch.ones(7000), 1, out=found.table.resize_(0))
    assert found.table.shape == (7000,)


def test_views_of_a_tiny_storage_stay_tied() -> None:
    """Tensors and arrays that share one storage of a few bytes still share it after a load."""
    base = torch.arange(4, dtype=torch.uint8)
    value = {"base": base, "view": base[1:3], "array": base.numpy()}
    found = zerocopy.publish(Observed(observers(), base, value)).load().index
    found["base"][1] = 77
    assert found["view"][0] == 77
    assert found["array"][1] == 77


def test_tiny_storages_are_no_copies_to_complain_about() -> None:
    """`assert_zero_copy` ignores tiny storages, which each load copies by design, and passing them on writes nothing."""
    publication = zerocopy.publish(nn.BatchNorm1d(2))
    module = publication.load()
    assert_zero_copy(module)
    assert zerocopy.publish(module).reference == publication.reference
