"""Do `publish`, `load`, partial loads, `close` and `unshare` work?"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from typing import Any

import attrs
import numpy as np
import pipelines
import pytest
import ray
import torch
from conftest import wait_until
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy._load import devices, live
from zerocopy._store import object_store
from zerocopy.errors import (
    ArgumentError,
    DeviceError,
    PublicationClosedError,
    StoreTooSmallError,
    VersionError,
)
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = pytest.mark.usefixtures("cluster")


@ray.remote
def describe(publication: zerocopy.Publication) -> dict[str, Any]:
    """The properties of a publication's pipeline in another process."""
    pipeline = publication.load()
    assert_zero_copy(pipeline)
    return {
        "type": type(pipeline),
        "answer": pipeline(2.0),
        "settings": pipeline.settings,
        "top_k": pipeline.top_k,
        "training": pipeline.encoder.training,
    }


def test_another_process_loads_the_same() -> None:
    """A pipeline loaded in another process has the class, answers, modes and copied fields of the original."""
    search = pipelines.search(settings={"mode": "fast"}, top_k=7)
    search.encoder.eval()
    found = ray.get(describe.remote(zerocopy.publish(search)))
    assert found == {
        "type": pipelines.Search,
        "answer": search(2.0),
        "settings": {"mode": "fast"},
        "top_k": 7,
        "training": False,
    }


def test_each_load_is_fresh() -> None:
    """Loads share memory with each other but no Python object, and each load has its own copied fields."""
    publication = zerocopy.publish(pipelines.search())
    one, other = publication.load(), publication.load()
    assert one is not other
    assert one.encoder is not other.encoder
    assert one.settings is not other.settings
    assert shares_memory(one, other)
    assert one.encoder[0].weight.data_ptr() != other.encoder[0].weight.data_ptr()


def test_structure_survives() -> None:
    """Ties, views of one storage, strides, dtypes, buffers and nested containers are unchanged after a load."""

    @zerocopy.pipeline
    class Everything:
        model: nn.Module = shared()
        parts: dict[str, Any] = shared()
        same: nn.Module = shared()
        array: np.ndarray = shared()
        head: Any = copied()

    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8).eval())
    model[1].weight = model[0].weight
    model.register_buffer("scale", torch.ones(3), persistent=False)
    base = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    parts = {"views": [base, (base.t(), base[1:3, ::2])], "odd": torch.ones(2, dtype=torch.float8_e4m3fn)}
    original = Everything(
        model, parts, model, np.asfortranarray(np.eye(3)), {"tied": model[0].weight, "own": torch.ones(2)}
    )
    loaded = zerocopy.publish(original).load()
    assert loaded.model is loaded.same
    assert loaded.model[0].weight is loaded.model[1].weight is loaded.head["tied"]
    assert loaded.model.training
    assert not loaded.model[2].training
    assert list(loaded.model.state_dict()) == list(model.state_dict())
    whole, (transposed, sliced) = loaded.parts["views"]
    assert (transposed.stride(), sliced.stride(), sliced.storage_offset()) == ((1, 6), (6, 2), 6)
    with torch.no_grad():
        whole[1, 2] = 99
    assert transposed[2, 1] == sliced[0, 1] == 99
    assert base[1, 2] == 8
    assert loaded.parts["odd"].dtype is torch.float8_e4m3fn
    assert loaded.array.flags.f_contiguous
    assert torch.equal(loaded.head["own"], original.head["own"])


def test_automatic_rule() -> None:
    """Modules inside undeclared attributes are shared; everything else is private to each load."""
    original = pipelines.Assistant()
    publication = zerocopy.publish(original)
    one, other = publication.load(), publication.load()
    for path in (lambda p: p.models["draft"], lambda p: p.models["final"][0], lambda p: p._hidden):
        assert shares_memory(path(one), path(other))
    assert not shares_memory(one.table, other.table)
    one.history.append("seen")
    one.table[0] = 5
    assert (other.history, other.table[0], original.table[0]) == ([], 0, 0)


def test_entangled_pipelines_keep_identities() -> None:
    """An object that a shared and a copied field both refer to is still one object after loading."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        config: dict = copied()

    encoder = nn.Linear(64, 64)
    encoder.config = {"threshold": 0.5}
    search = Search(encoder, encoder.config)
    encoder.owner = search
    assert zerocopy.plan(search).entangled == "search.encoder.owner"
    publication = zerocopy.publish(search)
    loaded = publication.load()
    assert loaded.config is loaded.encoder.config
    assert loaded.encoder.owner is loaded
    assert shares_memory(loaded.encoder, publication.load().encoder)


def test_nested_pipelines() -> None:
    """A pipeline inside a pipeline keeps its own shared and copied fields."""

    @zerocopy.pipeline
    class Outer:
        inner: pipelines.Search = shared()
        more: list = copied()

    outer = Outer(pipelines.search(), [pipelines.search()])
    publication = zerocopy.publish(outer)
    one, other = publication.load(), publication.load()
    assert shares_memory(one.inner.encoder, other.inner.encoder)
    assert shares_memory(one.more[0].index, other.more[0].index)
    assert one.inner.settings is not other.inner.settings
    assert one.inner(1.0) == outer.inner(1.0)


def test_arrays_and_tensors_over_one_memory() -> None:
    """A tensor that was made from an array stays tied to it, and their bytes are stored once, also when published again."""

    @zerocopy.pipeline
    class Both:
        array: np.ndarray = shared()
        tensors: list = shared()

    array = np.arange(6.0)
    both = Both(array, [torch.from_numpy(array), torch.from_numpy(array)[2:]])
    publication = zerocopy.publish(both)
    assert publication.shared_bytes == 48
    loaded = publication.load()
    loaded.array[3] = 77
    again = zerocopy.publish(loaded).load()
    for one in (loaded, again):
        assert one.tensors[0][3] == one.tensors[1][1] == 77
    again.array[3] = 5
    assert (again.tensors[1][1], loaded.array[3], array[3]) == (5, 77, 3)


def test_edges() -> None:
    """Empty arrays, a default device and a `__setstate__` that reads tensors all work."""

    @zerocopy.pipeline
    class Edges:
        empty: np.ndarray = shared()
        scale: torch.Tensor = shared()

        def __setstate__(self, state: dict[str, Any]) -> None:
            vars(self).update(state)
            self.number = self.scale.item()

    edges = Edges(np.empty((0, 4)), torch.tensor(3.0))
    with torch.device("meta"):
        publication = zerocopy.publish(edges)
        loaded = publication.load()
    assert (loaded.empty.shape, loaded.number) == ((0, 4), 3.0)
    assert publication.load(fields=(name for name in ["scale"])).scale == 3


def test_a_pipeline_that_is_a_module() -> None:
    """A pipeline that is a module shares its own parameters too, and keeps its modes and plain attributes."""

    @zerocopy.pipeline
    class Model(nn.Module):
        encoder: nn.Module = shared()
        label: str = copied(default="a")

    model = Model(nn.Linear(32, 32))
    model.scale = nn.Parameter(torch.ones(1000))
    model.eval()
    publication = zerocopy.publish(model)
    loaded = publication.load()
    assert (loaded.label, loaded.training, list(loaded.state_dict())) == ("a", False, list(model.state_dict()))
    assert shares_memory(loaded.scale, publication.load().scale)
    assert isinstance(loaded.scale, nn.Parameter)


def test_a_bare_module() -> None:
    """`publish` also takes a module without a pipeline."""
    module = pipelines.encoder()
    loaded = zerocopy.publish(module).load()
    assert torch.equal(loaded(torch.ones(256)), module(torch.ones(256)))
    assert_zero_copy(loaded)


def test_instances_with_eq_and_slots() -> None:
    """A pipeline with slots, and with an `__eq__` that makes it unhashable, can be published."""

    @zerocopy.pipeline
    class Search:
        __slots__ = ("__weakref__", "encoder", "top_k")

        def __init__(self, encoder: nn.Module) -> None:
            self.encoder = encoder
            self.top_k = [1]

        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared by fields")

    search = Search(nn.Linear(4, 4))
    publication = zerocopy.publish(search)
    one, other = publication.load(), publication.load()
    assert one.top_k == [1]
    assert shares_memory(one.encoder, other.encoder)


def test_user_defined_reduction_keeps_policies() -> None:
    """A class with its own `__getstate__` decides what is pickled, and its fields stay shared or copied."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        cache: dict = copied(factory=dict)

        def __getstate__(self) -> dict[str, Any]:
            return {"renamed": self.encoder}

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.encoder = state["renamed"]
            self.cache = {"rebuilt": True}

    publication = zerocopy.publish(Search(pipelines.encoder(), {"big": object}))
    loaded = publication.load()
    assert loaded.cache == {"rebuilt": True}
    assert shares_memory(loaded.encoder, publication.load().encoder)


def test_fields_loads_a_part() -> None:
    """`fields=` returns an object of the same class with only these attributes; access to another attribute explains why."""
    search = pipelines.search()
    publication = zerocopy.publish(search)
    part = publication.load(fields=["index", "top_k"])
    assert type(part) is pipelines.Search
    assert vars(part).keys() == {"index", "top_k"}
    with pytest.raises(
        AttributeError, match=r"no attribute 'encoder': it was loaded with fields=\['index', 'top_k'\] only"
    ):
        _ = part.encoder
    assert publication.load().encoder is not None
    with pytest.raises(AttributeError, match="no attribute 'encoder'$"):
        _ = pipelines.Search.encoder
    with pytest.raises(ArgumentError, match="no attribute 'decoder' to load"):
        publication.load(fields=["decoder"])
    with pytest.raises(ArgumentError, match="is a string"):
        publication.load(fields="index")


def test_fields_bring_what_they_refer_to() -> None:
    """`fields=` takes undeclared attributes too, and also loads the models that they refer to."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        other: nn.Module = shared()

        def __init__(self) -> None:
            self.encoder = pipelines.encoder()
            self.other = pipelines.encoder()
            self.helper = {"uses": self.encoder}

    publication = zerocopy.publish(Search())
    part = publication.load(fields=["helper"])
    assert shares_memory(part.helper["uses"], publication.load().encoder)
    assert not hasattr(part, "other")


def test_only_needed_shards_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fields=` fetches no bytes of the other fields."""
    search = pipelines.search(index=torch.ones(2_000_000))
    search.encoder = pipelines.encoder(width=1200)
    publication = zerocopy.publish(search)
    fetched = []
    real = object_store.get_all
    monkeypatch.setattr(object_store, "get_all", lambda refs: fetched.append(len(refs)) or real(refs))
    publication.load()
    publication.load(fields=["index"])
    publication.load(fields=["top_k"])
    assert fetched == [1, 2, 1, 1, 1]  # each load fetches the manifest, then the shards that it needs


def test_close() -> None:
    """A closed publication cannot be loaded, but loaded pipelines still work; closing twice is allowed."""
    search = pipelines.search()
    with zerocopy.publish(search) as publication:
        loaded = publication.load()
    publication.close()
    assert publication.closed
    assert "closed" in repr(publication)
    assert loaded(2.0) == search(2.0)
    with pytest.raises(PublicationClosedError, match="of Search was closed"):
        publication.load()
    with pytest.raises(PublicationClosedError):
        pickle.dumps(publication)


def test_publishing_again_shares_one_set() -> None:
    """An unchanged pipeline has one set of weights in the store, and publishing it again detects a change of any byte."""
    search = pipelines.search(width=512)
    first = zerocopy.publish(search)
    again = zerocopy.publish(search)
    assert first.reference == again.reference
    search.encoder[0].weight.data[0, 0] += 1  # no version counter shows this write
    changed = zerocopy.publish(search)
    assert changed.reference != first.reference
    assert changed.load().encoder[0].weight[0, 0] == search.encoder[0].weight[0, 0]
    assert first.load().encoder[0].weight[0, 0] != search.encoder[0].weight[0, 0]


def test_closing_one_handle_leaves_the_other() -> None:
    """Closing one handle does not affect another handle of the same weights."""
    search = pipelines.search()
    first, second = zerocopy.publish(search), zerocopy.publish(search)
    first.close()
    assert second.load()(1.0) == search(1.0)


def test_unshare(store_use: Any) -> None:
    """`unshare` moves the same objects, ties included, to private memory, and releases the store."""
    search = pipelines.search(width=1024, settings={"array": np.ones(3)})
    search.encoder[2].weight = search.encoder[0].weight
    answer = search(1.0)
    publication = zerocopy.publish(search)
    loaded = publication.load()
    weight = loaded.encoder[0].weight
    assert shares_memory(loaded, publication.load())
    zerocopy.unshare(loaded)
    assert not shares_memory(loaded, publication.load())
    assert loaded.encoder[0].weight is weight is loaded.encoder[2].weight
    assert loaded(1.0) == answer
    del search
    publication.close()
    assert wait_until(lambda: store_use() <= 0)
    assert loaded(1.0) == answer
    with pytest.raises(ArgumentError, match="was not loaded from a publication"):
        zerocopy.unshare(pipelines.search())


def test_inference_mode_does_not_change_what_is_loaded() -> None:
    """Loading under `inference_mode` returns ordinary tensors."""
    publication = zerocopy.publish(pipelines.search())
    with torch.inference_mode():
        loaded = publication.load()
    assert not loaded.encoder[0].weight.is_inference()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load(device=...)` moves every tensor unless its field has its own device; `auto` is the device that Ray assigned."""
    real = devices.resolve
    monkeypatch.setattr(devices, "resolve", lambda name: torch.device("meta") if name == "there" else real(name))

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        index: torch.Tensor = shared(device="cpu")
        own: torch.Tensor = copied()
        array: np.ndarray = shared(factory=lambda: np.zeros(50_000))

    publication = zerocopy.publish(Search(nn.Linear(4, 4), torch.ones(3), torch.ones(2)))
    loaded = publication.load(device="there")
    loaded.array[0] = 1  # arrays stay in main memory and are writable
    assert (loaded.encoder.weight.device.type, loaded.index.device.type, loaded.own.device.type) == (
        "meta",
        "cpu",
        "meta",
    )
    assert isinstance(loaded.encoder.weight, nn.Parameter)
    monkeypatch.setattr(object_store, "assigned_gpu", lambda: True)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no device 'cuda:0'"):
            publication.load(device="auto")
    monkeypatch.setattr(object_store, "assigned_gpu", lambda: False)
    assert publication.load(device="auto").encoder.weight.device.type == "cpu"
    assert_zero_copy(zerocopy.publish(pipelines.search()).load(device="cpu:0"))  # another name of the CPU
    with pytest.raises(DeviceError, match="device='warp:9' is not a device that torch knows"):
        publication.load(device="warp:9")


def test_ties_may_not_span_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that share memory but would be on different devices are refused by `publish` or `load`."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared(device="cuda")
        view: torch.Tensor = shared(device="cpu")

    @zerocopy.pipeline
    class Half:
        encoder: nn.Module = shared(device="cpu")
        view: torch.Tensor = shared()

    encoder = nn.Linear(4, 4)
    with pytest.raises(DeviceError, match="Fields 'encoder' and 'view' of search share memory but declare"):
        zerocopy.publish(Search(encoder, encoder.weight.detach()))
    publication = zerocopy.publish(Half(encoder, encoder.weight.detach()))
    assert publication.load().view.device.type == "cpu"
    real = devices.resolve
    monkeypatch.setattr(devices, "resolve", lambda name: torch.device("meta") if name == "there" else real(name))
    with pytest.raises(DeviceError, match="share memory would be loaded on different devices: cpu and meta"):
        publication.load(device="there")


def test_versions_that_disagree() -> None:
    """A handle from another torch version is refused with an error that names both versions."""
    publication = zerocopy.publish(pipelines.search())
    publication._versions = attrs.evolve(publication._versions, torch="1.13.1")
    with pytest.raises(VersionError, match=r"written with torch 1\.13, but this process has"):
        publication.load()


def test_too_large_for_the_store() -> None:
    """A model larger than the store is refused before a byte is written; the error has both sizes and a remedy."""
    huge = nn.Module()
    huge.register_buffer("weight", torch.empty(1_600_000_000, dtype=torch.uint8))
    with pytest.raises(StoreTooSmallError) as caught:
        zerocopy.publish(huge)
    assert caught.value.needed == 1_600_000_000
    assert f"{caught.value.capacity:,}" in str(caught.value)
    assert "object_store_memory" in str(caught.value)


@pytest.mark.alone
def test_handles_are_small_and_plain() -> None:
    """A handle can be printed and hashed, and pickles to less than 3,000 bytes for a model of any size."""
    publication = zerocopy.publish(pipelines.search(width=1024))
    assert repr(publication) == f"<zerocopy.Publication of Search: {publication.shared_bytes:,} bytes>"
    assert len({publication, publication}) == 1
    assert len(ray.cloudpickle.dumps(publication)) < 3000
    assert copy.copy(publication) is not None


def test_the_last_handle_is_dropped_while_the_pipeline_is_published_again() -> None:
    """Another thread may drop the last handle of a pipeline at any moment of a new publication."""
    module = nn.Linear(8, 8)
    handles = [zerocopy.publish(module)]
    published = live.entry_of(module).published
    lease = published.lease
    published.lease = lambda: (handles.clear(), lease())[1]
    again = zerocopy.publish(module)
    assert not handles
    assert torch.equal(again.load().weight, module.weight)
    assert zerocopy.publish(module).reference == again.reference


def test_close_while_another_thread_uses_the_handle() -> None:
    """`current()` gives the pipeline, or says that the publication was closed."""
    publication = zerocopy.publish(nn.Linear(8, 8))
    closed, interval = 0, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(200):
            handle = copy.copy(publication)
            handle.current()
            closing = threading.Thread(target=handle.close)
            closing.start()
            try:
                while True:
                    assert isinstance(handle.current(), nn.Linear)
            except PublicationClosedError:
                closed += 1
            closing.join()
    finally:
        sys.setswitchinterval(interval)
    assert closed == 200
