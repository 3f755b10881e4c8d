"""Is every PyTorch object the same after it was published and loaded in another process, over shared memory?"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import socket
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray
import torch
from observing import difference, observe
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import zerocopy
from zerocopy import shared
from zerocopy.memory import private_bytes
from zerocopy.testing import assert_zero_copy

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),  # torch and NumPy warn of prototypes and of features that will be removed
]
SIZE = 128
BYTES = SIZE * SIZE * 4


@zerocopy.pipeline
class Holder:
    """A pipeline with one shared field of any kind."""

    value: Any = shared()


class Box(nn.Module):
    """A module with one plain attribute of any kind."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Labelled(torch.Tensor):
    """A tensor subclass that torch functions keep."""


class Tagged(nn.Parameter):
    """A parameter subclass."""


class Scaled(torch.Tensor):
    """A wrapper without its own memory, around integers and their scale."""

    @staticmethod
    def __new__(cls, content: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, content.shape, dtype=scale.dtype)

    def __init__(self, content: torch.Tensor, scale: torch.Tensor) -> None:
        self.content = content
        self.scale = scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["content", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["content"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.content * a.scale if isinstance(a, Scaled) else a for a in args]
        return function(*plain, **(kwargs or {}))


class Doubled(nn.Module):
    """A user-defined parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


class Slotted:
    """An object with slots, and a property that must not be evaluated."""

    __slots__ = ("tensor", "unset")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def dangerous(self) -> None:
        raise AssertionError("a property was evaluated")


class Stateful(nn.Module):
    """A module with its own `__getstate__` and `__setstate__`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise())
        self.cache = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Reduced(nn.Module):
    """A module with its own `__reduce__`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return Reduced, (self.weight.detach(),)


@dataclasses.dataclass(frozen=True)
class Frozen:
    tensor: torch.Tensor
    name: str = "frozen"


@attrs.define
class Defined:
    tensor: torch.Tensor


class Named(NamedTuple):
    tensor: torch.Tensor
    number: int


def noise(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(*(shape or (SIZE, SIZE)))


def hook(module: nn.Module, args: Any, *rest: Any) -> None:
    return None


def state_dict_hook(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    state[prefix + "extra"] = torch.ones(1)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(SIZE, SIZE)


def tied_in_many_ways() -> nn.Module:
    module = nn.Sequential(linear(), linear(), linear())
    module[1].weight = module[0].weight
    module.add_module("again", module[2])
    module.register_buffer("view", module[0].weight.detach()[2:5].t())
    module.register_buffer("hidden", torch.ones(3), persistent=False)
    module.register_buffer("nothing", None)
    module.register_parameter("empty", None)
    module.alias = module[2].bias
    module.overlapping = torch.as_strided(noise(), (60, 60), (2, 1), 5)
    module.expanded = torch.ones(1).expand(5, 5)
    return module


def hooked() -> nn.Module:
    module = nn.Sequential(linear())
    module.register_forward_hook(hook)
    module[0].register_forward_hook(hook, with_kwargs=True)
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_full_backward_hook(hook)
    module.register_state_dict_post_hook(state_dict_hook)
    module.register_load_state_dict_post_hook(hook)
    return module


def modes() -> nn.Module:
    module = nn.Sequential(linear(), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).eval(), linear())
    module[0].weight.requires_grad_(False)
    return module


def parametrized(*ways: Callable[[nn.Module], nn.Module]) -> nn.Module:
    module = linear()
    for way in ways:
        way(module)
    return nn.Sequential(module).eval()


def doubled(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Doubled())


def with_attributes() -> nn.Module:
    module = linear()
    module.weight.optimizer_group = ["slow", {"decay": 0.1}]
    module.bias.partner = module.weight
    return module


def cyclic() -> Holder:
    module = linear()
    holder = Holder(module)
    module.owner = [holder]
    return holder


def with_weak_references() -> nn.Module:
    module = nn.Sequential(linear())
    module[0].parent = weakref.ref(module)
    return module


def quantized_dynamically() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear}, torch.qint8)


def locally_defined() -> nn.Module:
    class Local(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return super().forward(value) + 1

    return Local(SIZE, SIZE)


def bound_method() -> nn.Module:
    module = linear()
    module.run = module.forward
    return module


def memory_mapped(folder: Any) -> np.ndarray:
    array = np.memmap(folder.mktemp("arrays") / "data", "f4", "w+", shape=(SIZE, SIZE))
    array[:] = 3
    return array


KINDS: dict[str, Callable[[], Any]] = {
    "a module": linear,
    "ties, views and overlaps": tied_in_many_ways,
    "train and eval, requires_grad": modes,
    "hooks": hooked,
    "attributes of parameters": with_attributes,
    "lazy modules": lambda: nn.Sequential(nn.LazyLinear(4), linear()),
    "weight_norm": lambda: parametrized(parametrizations.weight_norm),
    "spectral_norm": lambda: parametrized(parametrizations.spectral_norm),
    "orthogonal": lambda: parametrized(parametrizations.orthogonal),
    "a user-defined parametrization": lambda: parametrized(doubled),
    "several parametrizations": lambda: parametrized(doubled, parametrizations.weight_norm),
    "weight_norm of torch.nn.utils": lambda: torch.nn.utils.weight_norm(linear()),
    "a class with `__setstate__`": Stateful,
    "a class with `__reduce__`": lambda: nn.Sequential(Reduced(noise())),
    "a local class": locally_defined,
    "a bound method": bound_method,
    "a lambda": lambda: Box([lambda value: value + 1, noise()]),
    "a `functools.partial`": lambda: Box(functools.partial(torch.add, noise(), other=noise())),
    "a non-leaf tensor": lambda: Box(torch.ones(SIZE, SIZE, requires_grad=True) * 2),
    "weak references": with_weak_references,
    "a cycle": cyclic,
    "a buffer": lambda: Box(nn.Buffer(noise())),
    "channels_last": lambda: Box(noise(4, 8, 16, 16).to(memory_format=torch.channels_last)),
    "transposed and sliced": lambda: Box([noise().t(), noise()[3:7, ::2]]),
    "conjugate and negative views": lambda: Box([(c := torch.randn(SIZE, SIZE, dtype=torch.cfloat).conj()), c.imag]),
    "empty and 0-d": lambda: Box([torch.empty(0, 3), torch.tensor(5), torch.empty(2, 0).t(), noise()]),
    "sparse COO": lambda: Box(noise().relu().to_sparse()),
    "sparse CSR": lambda: Box(noise().relu().to_sparse_csr()),
    "sparse BSR": lambda: Box(noise().relu().to_sparse_bsr((4, 4))),
    "jagged nested tensors": lambda: Box(torch.nested.nested_tensor([noise(9, SIZE), noise(70, SIZE)], layout=torch.jagged)),
    "strided nested tensors": lambda: Box(torch.nested.nested_tensor([noise(9, SIZE), noise(70, SIZE)])),
    "MKLDNN": lambda: Box(noise().to_mkldnn()),
    "quantized per tensor": lambda: Box(torch.quantize_per_tensor(noise(), 0.1, 3, torch.quint8)),
    "quantized per channel": lambda: Box(
        torch.quantize_per_channel(noise(), torch.ones(SIZE), torch.zeros(SIZE), 0, torch.qint8)
    ),
    "dynamically quantized": quantized_dynamically,
    "a tensor subclass": lambda: Box(noise().as_subclass(Labelled)),
    "a parameter subclass": lambda: Box(Tagged(noise())),
    "a wrapper subclass": lambda: Box(Scaled(torch.ones(SIZE, SIZE, dtype=torch.int8), torch.ones(SIZE, 1))),
    "a masked tensor": lambda: Box(torch.masked.masked_tensor(noise(), noise() > 0)),
    "an inference tensor": lambda: torch.inference_mode()(lambda: Box(noise()))(),
    "dicts, lists, tuples, sets": lambda: Holder({"a": [noise(), (noise(), {1})], 2: {linear()}}),
    "ordered and default dicts": lambda: Holder(
        [collections.OrderedDict(a=noise()), collections.defaultdict(list, b=[noise()]), collections.deque([noise()])]
    ),
    "dataclasses, attrs, named tuples": lambda: Holder([Frozen(noise()), Defined(noise()), Named(noise(), 1)]),
    "namespaces and slots": lambda: Holder([types.SimpleNamespace(tensor=noise()), Slotted(noise())]),
    "structured and Fortran arrays": lambda: Holder(
        [np.ones(4000, [("a", "i4"), ("b", ">f8")]), np.asfortranarray(noise().numpy()), np.arange(9)[::-2]]
    ),
    "a NumPy matrix": lambda: Holder(np.matrix(noise().numpy())),
}  # fmt: skip
COPIED = {"MKLDNN", "dynamically quantized"}
DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    - {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4},
    key=str,
)


@ray.remote
def observed(publication: zerocopy.Publication) -> tuple[Any, str]:
    """Observe a publication in another process, and name a tensor of it that is not a view of the store."""
    warnings.simplefilter("ignore")
    loaded = publication.load()
    try:
        assert_zero_copy(loaded)
    except AssertionError as error:
        return observe(loaded), str(error)
    return observe(loaded), ""


def assert_same(original: Any, *, is_shared: bool = True) -> None:
    expected = observe(original)
    found, private = ray.get(observed.remote(zerocopy.publish(original)))
    assert not difference(expected, found)
    assert not is_shared or not private


@pytest.mark.parametrize("kind", KINDS)
def test_comes_out_the_same(kind: str) -> None:
    """Everything that can be observed of an object is equal in another process, and the plan shows copied parts."""
    original = KINDS[kind]()
    plan = zerocopy.plan(original)
    assert plan.shared_bytes >= 0.9 * BYTES / 4, "the weights are not shared"
    assert any(entry.note for entry in plan.entries) == (kind in COPIED)
    assert_same(original, is_shared=kind not in COPIED)


def test_the_docs_list_every_kind() -> None:
    """The table in the docs lists each kind that is tested here, and whether it is shared or copied."""
    page = (Path(__file__).parents[2] / "docs/kinds.md").read_text()
    listed = dict(re.findall(r"^\| (.+?) \| (shared|copied) \|", page, re.MULTILINE))
    assert {kind: listed.get(kind) for kind in KINDS} == {
        kind: "copied" if kind in COPIED else "shared" for kind in KINDS
    }
    assert all(str(dtype).removeprefix("torch.") in page for dtype in DTYPES)


REFUSED: dict[str, Callable[[], Any]] = {
    "a lock": threading.Lock,
    "a generator": lambda: (number for number in range(3)),
    "an open file": lambda: Path(__file__).open(),  # noqa: SIM115
    "a meta tensor": lambda: torch.empty(3, device="meta"),
    "a socket": socket.socket,
    "a thread": threading.Thread,
    "a process group": lambda: one_process_group(),
}


def one_process_group() -> Any:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return torch.distributed.group.WORLD


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_path(kind: str) -> None:
    """An object that cannot be pickled is refused before anything is written; the error has its path, the docs list its kind."""
    culprit = REFUSED[kind]()
    module = nn.Sequential(linear(), nn.Sequential(linear()))
    module[1][0].settings = {"deep": [1, types.SimpleNamespace(culprit=culprit)]}
    with pytest.raises(zerocopy.errors.CannotTravelError) as caught:
        zerocopy.publish(Holder({"net": module}))
    assert caught.value.path.startswith("holder.value['net'][1][0].settings['deep'][1].culprit")
    assert f"| {kind} | refused |" in (Path(__file__).parents[2] / "docs/kinds.md").read_text()
    getattr(culprit, "close", lambda: None)()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Every dtype of torch keeps all its bits."""
    tensor = torch.arange(SIZE * SIZE * 16, dtype=torch.int64).view(torch.uint8)[: SIZE * SIZE * dtype.itemsize]
    assert_same(Box([tensor.clone().view(torch.uint8).view(dtype), torch.empty(0, dtype=dtype)]))


def test_arrow_tables() -> None:
    """Arrow tables and pandas frames with strings are shared and equal after loading."""
    table = pa.table({"a": np.arange(9000.0), "b": ["text"] * 9000})
    frame = pd.DataFrame({"s": ["text", None] * 4500, "a": np.arange(9000.0), "b": np.arange(9000)})
    publication = zerocopy.publish(Holder([table, frame]))
    assert publication.shared_bytes > 100_000
    loaded = publication.load()
    assert loaded.value[0].equals(table)
    pd.testing.assert_frame_equal(loaded.value[1], frame)


def test_memory_mapped_arrays(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A memory-mapped array is stored by its bytes and has the same type after loading."""
    loaded = zerocopy.publish(Holder(memory_mapped(tmp_path_factory))).load()
    assert type(loaded.value) is np.memmap
    assert (loaded.value == 3).all()


def test_gradients_are_dropped() -> None:
    """Gradients are not published, as in pickle."""
    module = linear()
    module(noise()).sum().backward()
    assert zerocopy.publish(module).load().weight.grad is None


def test_graph_modules() -> None:
    """A traced `GraphModule` is rebuilt from its code, over shared weights."""
    traced = torch.fx.symbolic_trace(nn.Sequential(linear()))
    publication = zerocopy.publish(traced)
    loaded = publication.load()
    assert publication.shared_bytes == BYTES + 4 * SIZE
    assert torch.equal(loaded(noise()), traced(noise()))
    assert loaded.code == traced.code


def test_compiled_modules() -> None:
    """A compiled module can be published, and is compiled again in the process that runs it."""
    compiled = torch.compile(linear(), backend="eager")
    publication = zerocopy.publish(compiled)
    loaded = publication.load()
    assert publication.shared_bytes == BYTES + 4 * SIZE
    torch.testing.assert_close(loaded(noise()), compiled(noise()))


@zerocopy.actor(num_cpus=0.1)
class Prober:
    """Loads once so that everything is imported, and then again for the measurement."""

    def measure(self, publication: zerocopy.Publication) -> tuple[int, float]:
        warnings.simplefilter("ignore")
        publication.load()
        before = private_bytes()
        self.kept = publication.load()
        return private_bytes() - before, float(self.kept.value["linear"](torch.ones(1, 2048)).sum().detach())


@pytest.mark.long
def test_all_at_once_takes_no_memory() -> None:
    """A load of a pipeline with 100 MB in many kinds of objects takes less than 2 % of its size in private memory."""
    big = noise(2048, 2048)
    value = {
        "linear": parametrizations.weight_norm(nn.Linear(2048, 2048)),
        "sparse": big.relu().to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(big, 0.1, 3, torch.quint8),
        "labelled": big.clone().as_subclass(Labelled),
        "scaled": Scaled(torch.ones(2048, 2048, dtype=torch.int8), torch.ones(2048, 1)),
        "bfloat16": big.to(torch.bfloat16).t(),
        "scripted": torch.jit.trace(nn.Linear(2048, 2048), torch.ones(1, 2048)),
        "exported": torch.export.export(nn.Linear(2048, 2048), (torch.ones(1, 2048),)),
        "frame": pd.DataFrame({"a": np.arange(1_000_000.0)}),
    }
    publication = zerocopy.publish(Holder(value))
    assert publication.shared_bytes > 100_000_000
    with Prober.pool(1) as pool:
        grown, total = ray.get(pool[0].measure.remote(publication))
    assert grown < 0.02 * publication.shared_bytes
    assert total == pytest.approx(float(value["linear"](torch.ones(1, 2048)).sum().detach()), abs=1e-2)


def test_taken_apart_tensors_are_published_once() -> None:
    """A pipeline of sparse, quantized and subclassed tensors is written again only after one of them has changed."""
    value = {
        "sparse": noise().relu().to_sparse(),
        "quantized": torch.quantize_per_tensor(noise(), 0.1, 3, torch.quint8),
        "labelled": noise().as_subclass(Labelled),
    }
    holder = Holder(value)
    sent = [zerocopy._publish.publish.publish_automatically(holder).reference for _ in range(3)]
    assert len(set(sent)) == 1
    value["labelled"].add_(1)
    changed = zerocopy._publish.publish.publish_automatically(holder)
    assert changed.reference != sent[0]
    assert torch.equal(changed.load().value["labelled"], value["labelled"])
