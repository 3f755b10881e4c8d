"""Is an object equal to the original, and to pickle's result, after it was split and joined again?"""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy._load.load import graft_skeleton
from zerocopy._split.introspect import Subject, introspect
from zerocopy._split.roles import Roles
from zerocopy._split.skeleton import Split, graft, strip
from zerocopy._split.zones import PipelineReducer, Place, Zone, call
from zerocopy._store.tensors import TensorTable, rebuild
from zerocopy.errors import CannotTravelError

CPU = torch.device("cpu")


def through_bytes(obj: Any, zone: Zone = Zone.SHARED) -> Any:
    """Strip an object, describe its tensors, rebuild them over copies of their bytes, and graft the object."""
    stripped = strip([obj], zone=zone, split=Split.NOWHERE)
    table = TensorTable()
    for external in stripped.externals[1:]:
        table.add(external)
    memory = [bytearray(storage.to_bytes().tobytes()) for storage in table.storages]
    rebuilt = rebuild(table.specs, {index: (content, 0, len(content)) for index, content in enumerate(memory)}, {})
    return graft(stripped.payload, [None, *rebuilt])[0]


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Contiguous, transposed, sliced, expanded and empty tensors of any dtype."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape).to(draw(st.sampled_from(DTYPES)))
    change = draw(st.sampled_from(["none", "transpose", "slice", "expand", "offset"]))
    if change == "transpose" and tensor.dim() >= 2:
        return tensor.transpose(0, 1)
    if change == "slice" and tensor.dim() and tensor.shape[0] > 1:
        return tensor[1:]
    if change == "expand":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    if change == "offset" and tensor.dim() and tensor.shape[-1] > 1:
        return tensor[..., ::2]
    return tensor


@st.composite
def structures(draw: st.DrawFn) -> Any:
    """Nested containers with repeated tensors, also as views of each other."""
    pool = draw(st.lists(tensors(), min_size=1, max_size=3))
    pool += [tensor[:1] for tensor in pool if tensor.dim()]
    leaves = st.one_of(st.sampled_from(pool), st.integers(), st.text(max_size=3), st.none())
    nested = st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
        max_leaves=8,
    )
    return draw(st.lists(nested, min_size=1, max_size=4)) + pool


def tensors_in(obj: Any) -> list[torch.Tensor]:
    if isinstance(obj, torch.Tensor):
        return [obj]
    children = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, list) else []
    return [tensor for child in children for tensor in tensors_in(child)]


def shape_of(obj: Any) -> Any:
    if isinstance(obj, torch.Tensor):
        return "tensor"
    if isinstance(obj, dict):
        return {key: shape_of(value) for key, value in obj.items()}
    return [shape_of(value) for value in obj] if isinstance(obj, list) else obj


@settings(max_examples=150, deadline=None)
@given(structures())
def test_round_trip(structure: Any) -> None:
    """Values, dtypes, shapes, strides, offsets, identities and shared storages are equal after a round trip."""
    loaded = through_bytes(structure)
    assert shape_of(loaded) == shape_of(structure)
    with contextlib.suppress(AttributeError):  # pickle does not support torch's unsigned dtypes
        assert shape_of(loaded) == shape_of(pickle.loads(pickle.dumps(structure)))
    before, after = tensors_in(structure), tensors_in(loaded)
    for old, new in zip(before, after, strict=True):
        assert (old.dtype, old.shape, old.stride(), old.storage_offset()) == (
            new.dtype, new.shape, new.stride(), new.storage_offset(),
        )  # fmt: skip
        assert old.untyped_storage().nbytes() == new.untyped_storage().nbytes()
        assert bytes(old.untyped_storage()) == bytes(new.untyped_storage())
    identities = [[one is other for other in before] for one in before]
    assert identities == [[one is other for other in after] for one in after]
    storages = [[a.untyped_storage()._cdata == b.untyped_storage()._cdata for b in before] for a in before]
    assert storages == [[a.untyped_storage()._cdata == b.untyped_storage()._cdata for b in after] for a in after]


def test_tensor_details() -> None:
    """Tensors keep their parameter class, `requires_grad`, conjugation and negation, stay leaves, and become no views."""
    parameter = nn.Parameter(torch.ones(3), requires_grad=False)
    grown = torch.ones(2, requires_grad=True)
    conjugate = torch.tensor([1 + 2j]).conj()
    negative = conjugate.imag
    back = through_bytes([parameter, grown, conjugate, negative])
    assert type(back[0]) is nn.Parameter
    assert [tensor.requires_grad for tensor in back] == [False, True, False, False]
    assert [tensor.is_conj() for tensor in back] == [False, False, True, False]
    assert [tensor.is_neg() for tensor in back] == [False, False, False, True]
    assert all(tensor.is_leaf and not tensor._is_view() for tensor in back)
    assert torch.equal(back[3], negative)


def test_attributes_of_tensors() -> None:
    """A parameter keeps its Python attributes, also if it occurs twice."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.tags = ["frozen"]
    first, second = through_bytes([parameter, parameter])
    assert first is second
    assert first.tags == ["frozen"]


def test_arrays() -> None:
    """Arrays keep order, strides, dtype and flags; an array over a tensor's memory still shares that memory."""
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    frozen = np.arange(4)
    frozen.flags.writeable = False
    records = np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")])
    tensor = torch.arange(8)
    window = tensor.numpy()[2:6]
    back = through_bytes([fortran, frozen, records, fortran[::-1], tensor, window])
    assert back[0].flags.f_contiguous
    assert np.array_equal(back[0], fortran)
    assert not back[1].flags.writeable
    assert back[2].dtype == records.dtype
    assert back[3].strides == fortran[::-1].strides
    back[4][3] = 77
    assert back[5][1] == 77
    back[0][0, 0] = 9
    assert back[3][-1, 0] == 9


def test_modules_and_modes() -> None:
    """Modules keep train and eval modes, non-persistent buffers, `None` parameters and hooks."""
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2).eval())
    module.register_buffer("scale", torch.ones(1), persistent=False)
    module[0].register_forward_pre_hook(double_the_input)
    back = through_bytes(module)
    assert (back.training, back[1].training) == (True, False)
    assert back[0].bias is None
    assert "scale" not in back.state_dict()
    assert torch.equal(back.scale, module.scale)
    module.eval()
    back.eval()
    assert torch.equal(back(torch.ones(1, 2)), module(torch.ones(1, 2)))


def double_the_input(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2,)


def test_values_are_written_in_the_zone_of_their_policy() -> None:
    """Each field's value is written in the zone of its policy, also a copied value that refers back to its pipeline."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        settings: dict[str, Any] = copied()
        top_k: int = copied(default=5)

    head = nn.Linear(1, 1)
    search = Search(nn.Linear(1, 1), {"fallback": head})
    function, (prelude, *_), state, *_ = PipelineReducer({}, Roles()).reduce(search, Place(Zone.AUTO))
    assert function is call
    assert prelude == [Place(Zone.AUTO), search.encoder, Place(Zone.COPIED), search.settings, Place(Zone.AUTO)]
    assert state == vars(search)
    search.settings["owner"] = search
    stripped = strip([search], zone=Zone.AUTO, split=Split.ROOTS)
    assert stripped.roots == [search.encoder]
    assert [id(obj) for obj in stripped.externals] == [*map(id, [None, search.encoder, head.weight, head.bias])]
    (back,) = graft(stripped.payload, stripped.externals)
    assert back.encoder is search.encoder
    assert back.settings["owner"] is back
    assert back.settings["fallback"] is not head


def test_the_culprit_is_named() -> None:
    """The error for an object that cannot be pickled has the path of the object, at any depth."""
    culprit = (number for number in range(3))
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].extra = {"deep": [1, (2, culprit)]}
    with pytest.raises(CannotTravelError) as caught:
        introspect(Subject(module))
    assert caught.value.path == "sequential[0].extra['deep'][1][1]"
    assert caught.value.kind == "generator"


def test_skeleton_is_small() -> None:
    """The skeleton, which has no tensors, does not grow with the size of the tensors."""
    small, large = (introspect(Subject(nn.Linear(width, width))) for width in (4, 2048))
    assert len(large.shared.payload) - len(small.shared.payload) < 100
    sizes = [storage.nbytes for storage in large.table.storages]
    tensors = rebuild(large.table.specs, {index: (bytearray(size), 0, size) for index, size in enumerate(sizes)}, {})
    assert graft_skeleton(large.shared, tensors, ())[0].weight.shape == (2048, 2048)
