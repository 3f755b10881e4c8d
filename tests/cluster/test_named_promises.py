"""Do the promises for publications also hold for publications with a name: all kinds, isolation, equal storages, losses?"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import test_faithful
import test_isolation
import torch
import versions
from hypothesis import given, settings
from observing import difference, observe
from registries import kill_registry
from test_faithful import COPIED, DTYPES, KINDS
from test_isolation import WRITES, content
from test_round_trip import CHECKS, Random
from test_round_trip import pipelines as random_pipelines
from torch import nn
from versions import Numbered, build_seven, numbered

import zerocopy
from zerocopy.testing import assert_zero_copy

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),  # torch and NumPy warn of prototypes and of features that will be removed
]


CHANGED_BY_LOOKING = {
    "test_comes_out_the_same[a `functools.partial`]"
}  # it pickles a `__dict__` after any code has asked for its `__dict__`


@zerocopy.actor(num_cpus=0.1)
class Process:
    """Another process that looks up and loads pipelines."""

    def observe(self, name: str) -> tuple[Any, str]:
        """Observe the newest version, and name a tensor of it that is not a view of the store."""
        warnings.simplefilter("ignore")
        loaded = zerocopy.lookup(name).load(verify=True)
        try:
            assert_zero_copy(loaded)
        except AssertionError as error:
            return observe(loaded), str(error)
        return observe(loaded), ""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


@pytest.fixture(scope="module")
def process(cluster: None) -> Iterator[Any]:
    with Process.pool(1) as pool:
        yield pool[0]


def assert_same(original: Any, name: str, process: Any, *, is_shared: bool = True) -> None:
    expected = observe(original)
    version = zerocopy.publish(original, name=name).version
    found, private = ray.get(process.observe.remote(name))
    assert not difference(expected, found)
    assert not is_shared or not private
    loaded = zerocopy.lookup(name).load(verify=True)
    assert not difference(expected, observe(loaded))
    assert zerocopy.version_of(loaded) == version
    if name not in CHANGED_BY_LOOKING:
        assert zerocopy.publish(original, name=name).version == version  # its digest does not change


@pytest.mark.parametrize("kind", KINDS)
def test_comes_out_the_same(kind: str, name: str, process: Any) -> None:
    """Every kind of object comes out the same here and in another process, and is the same version if published again."""
    assert_same(KINDS[kind](), name, process, is_shared=kind not in COPIED)


def test_dtypes(name: str, process: Any) -> None:
    """Every dtype of torch keeps all its bits."""
    tensors = [
        test_faithful.noise().view(torch.uint8)[:, : 4 * dtype.itemsize].clone().view(dtype)
        for dtype in DTYPES
        if dtype.itemsize <= 16
    ]
    assert_same(test_faithful.Box([*tensors, *[torch.empty(0, dtype=dtype) for dtype in DTYPES]]), name, process)


NAMES = itertools.count()


@settings(parent=CHECKS, max_examples=20)
@given(random_pipelines())
def test_random_pipelines(pipeline: Random) -> None:
    """Types, identities, storages, bytes, strides, flags and modes equal the original; equal pipelines are one version."""
    expected = observe(pipeline)
    name = f"random-{next(NAMES)}"
    version = zerocopy.publish(pipeline, name=name).version
    loaded = zerocopy.lookup(name).load(verify=True)
    assert not difference(expected, observe(loaded))
    assert loaded.model() == pipeline.model()
    assert zerocopy.publish(pipeline, name=name).version == version
    zerocopy.remove(name)


def test_small_changes(name: str) -> None:
    """A version in which one small tensor changed has the right bytes, for every size of that tensor."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(100_000)), nn.Parameter(torch.zeros(1))])
    zerocopy.publish(module, name=name, keep=0)
    for nbytes in (*range(16, 260, 4), 512, 1024, 2044, 2048, 2052, 4096, 131_072):
        module[1] = nn.Parameter(torch.arange(nbytes // 4, dtype=torch.float32))
        loaded = zerocopy.publish(module, name=name).load(verify=True)
        assert torch.equal(loaded[1], module[1]), nbytes


def test_nothing_to_share(name: str) -> None:
    """A pipeline without a tensor can be published, and loaded with `verify=True`."""
    zerocopy.publish(nn.Sequential(nn.ReLU()), name=name)
    assert isinstance(zerocopy.lookup(name).load(verify=True)[0], nn.ReLU)


# Isolation


def write_there(name: str, how: Callable[[Any], None]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The content of a loaded model before and after a write, and of a later load in the same process."""
    model = zerocopy.lookup(name).load()
    before = content(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        how(model)
    return before, content(model), content(zerocopy.lookup(name).load())


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_stay_where_they_were_made(write: Callable[[Any], None], name: str, process: Any) -> None:
    """A write in another process, in the publisher, adopted or not, or in a loaded pipeline never reaches another pipeline."""
    for adopt in (False, True):
        original = test_isolation.model()
        expected = content(original)
        publication = zerocopy.publish(original, name=name, adopt=adopt)
        early, current = publication.load(), publication.current()
        before, after, later = ray.get(process.call.remote(write_there, name, write))
        assert before == later == expected != after
        assert content(early) == content(original) == content(current) == expected
        write(original)
        write(early)
        assert content(current) == content(zerocopy.lookup(name).load(verify=True)) == expected
        assert content(original) != expected != content(early)
        del current


def twins() -> nn.ModuleList:
    """Two modules with equal bytes that are not tied, a module tied to the first, and a module with other bytes."""
    modules = nn.ModuleList([nn.Linear(200, 200) for _ in range(4)])
    modules[1].load_state_dict(modules[0].state_dict())
    modules[2].weight = modules[0].weight
    return modules


def assert_twins(modules: Any) -> None:
    """Equal modules have separate memory, and the tied module sees a write to the first."""
    weights = [module.weight.detach() for module in modules]
    before = weights[3].clone()
    assert torch.equal(weights[0], weights[1])
    weights[0].fill_(7)
    assert (weights[2] == 7).all()
    assert not (weights[1] == 7).any()
    weights[1].fill_(8)
    assert (weights[0] == 7).all()
    assert torch.equal(weights[3], before)


def test_equal_storages_are_memory_of_their_own(name: str) -> None:
    """Equal storages have separate memory in each load, after adoption and in later versions, but one copy in the store."""
    for adopt in (False, True):
        modules = twins()
        zerocopy.publish(modules, name=name, adopt=adopt)
        assert_twins(zerocopy.lookup(name).load(verify=True))
        with torch.no_grad():
            modules[3].weight.add_(1)  # the other modules are not stored again
        zerocopy.publish(modules, name=name, adopt=adopt)
        assert_twins(zerocopy.lookup(name).load(verify=True))
        assert_twins(ray.get(ray.put(modules)))
        assert_twins(modules)
    trained = zerocopy.lookup(name).load()
    with torch.no_grad():
        trained[1].weight.copy_(trained[3].weight)  # modules 1 and 3 are equal now, and the store has one of them
    zerocopy.publish(trained, name=name)
    loaded = zerocopy.lookup(name).load(verify=True)
    loaded[1].weight.detach().zero_()
    assert torch.equal(loaded[3].weight, trained[3].weight)
    assert torch.equal(loaded[0].weight, loaded[2].weight)
    assert not torch.equal(loaded[0].weight, loaded[1].weight)


@pytest.mark.long
def test_equal_storages_after_a_recovery(name: str) -> None:
    """Weights from a source and from another process that holds them are both restored with separate memory."""
    torch.manual_seed(0)
    modules = twins()
    state = modules.state_dict()

    def build() -> nn.Module:
        made = twins()
        made.load_state_dict(state)
        return made

    held = zerocopy.publish(modules, name=name).load()
    zerocopy.publish(modules, name=f"{name}-source", source=build)
    kill_registry()
    assert_twins(zerocopy.lookup(name).load(verify=True))
    assert torch.equal(held[3].weight, modules[3].weight)
    del held
    kill_registry()
    assert_twins(zerocopy.lookup(f"{name}-source").load(verify=True))


# Losses


@pytest.mark.long
def test_calls_and_actors_after_a_loss(name: str) -> None:
    """A handle still works after its references died with the registry, also as an argument of tasks and actors."""
    publication = zerocopy.publish(numbered(7), name=name, source=build_seven)
    assert versions.ask(publication) == 7
    for call in (
        lambda: versions.ask(publication),
        lambda: versions.ask.local(publication),
        lambda: ask_afresh(publication),
    ):
        kill_registry()
        assert call() == 7
    kill_registry()
    kept = Kept.remote(publication)
    assert ray.get(kept.ask.remote()) == 7


@zerocopy.task(num_cpus=0.1, reuse=False)
def ask_afresh(search: Numbered) -> int:
    return search()


@zerocopy.actor(num_cpus=0.1)
class Kept:
    def __init__(self, search: Numbered) -> None:
        self.search = search

    def ask(self) -> int:
        return self.search()


def test_an_instance_after_a_loss(name: str) -> None:
    """Its process has the weights, so it can still pass the instance when the registry has lost them."""
    search = numbered(3)
    publication = zerocopy.publish(search, name=name)
    assert versions.ask(search) == 3
    kill_registry()
    assert versions.ask(search) == 3
    publication.close()
    other = numbered(4)
    zerocopy.publish(other, name=f"{name}-other")
    assert versions.ask(other) == 4
    kill_registry()
    assert versions.ask(other) == 4


def test_an_instance_whose_name_is_removed(name: str) -> None:
    """Its process can still pass the instance right after the name was removed."""
    search = numbered(3)
    zerocopy.publish(search, name=name)
    assert versions.ask(search) == 3
    zerocopy.remove(name)
    assert versions.ask(search) == 3
    publication = zerocopy.publish(search, name=name)
    zerocopy.remove(name)
    assert [versions.ask(search), versions.ask(publication)] == [3, 3]


@pytest.mark.long
def test_holders_of_several_versions_give_back_all(name: str) -> None:
    """Versions share shards, and a process that has loaded two versions gives both back."""
    for order in ([1, 2], [2, 1]):
        modules = twins()
        zerocopy.publish(modules, name=name)
        with torch.no_grad():
            modules[3].weight.add_(1)
        second = zerocopy.publish(modules, name=name).version.number
        numbers = [second - 2 + which for which in order]
        held = [zerocopy.lookup(name, version=number).load() for number in numbers]
        kill_registry()
        for number, pipeline in zip(numbers, held, strict=True):
            loaded = zerocopy.lookup(name, version=number).load(verify=True)
            assert torch.equal(loaded[3].weight, pipeline[3].weight)
        zerocopy.remove(name)
