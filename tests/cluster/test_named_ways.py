"""Do all ways to publish, pass and keep pipelines work with a name: adoption, parts, devices, wrappers, connections, leaks?"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pipelines
import pytest
import ray
import test_leaks
import test_reuse
import torch
import versions
from conftest import bytes_in_store, run_python, wait_until
from safetensors.torch import save_file
from test_reuse import CHANGES, modules
from torch import nn
from versions import Numbered, numbered

import zerocopy
from zerocopy import ModelWrapper, copied, shared
from zerocopy.errors import (
    ArgumentError,
    DeviceError,
    FollowWarning,
    NotPublishedError,
    PublicationClosedError,
    VersionError,
)
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = pytest.mark.usefixtures("cluster")


@zerocopy.pipeline
class Outside:
    """A pipeline that contains another pipeline and a publication."""

    inner: pipelines.Search = shared()
    extra: nn.Module = shared()
    link: Any = copied(default=None)
    tail: Any = copied(factory=list)


# Adoption


def test_adopted_again_and_changed(name: str) -> None:
    """A pipeline can be adopted again after a write and with a new part, and its publication equals it each time."""
    search = pipelines.search(width=256)
    zerocopy.publish(search, name=name, adopt=True)
    assert_zero_copy(search)
    assert zerocopy.publish(search, name=name, adopt=True).version.number == 1
    with torch.no_grad():
        search.encoder[0].weight[3].fill_(2)
    search.encoder[2] = nn.Linear(256, 256)
    second = zerocopy.publish(search, name=name, adopt=True)
    assert second.version.number == 2
    assert shares_memory(search.encoder[2].weight, second.load().encoder[2].weight)
    assert second.load(verify=True)(1.0) == search(1.0) == zerocopy.lookup(name).load()(1.0)
    assert ray.get(pipelines.top_k_and_mode.remote(search)) == (5, True, True)
    assert pipelines.answer(search, 1.0) == search(1.0)
    assert zerocopy.lookup(name, version=1).load().encoder[0].weight[3, 0] != 2


def test_two_names_and_none(name: str) -> None:
    """A model under two names is stored once for both, and every handle works, also of an earlier publication without a name."""
    search = pipelines.search(width=512)
    nbytes = zerocopy.plan(search).shared_bytes
    unnamed = zerocopy.publish(search)
    expected = search(1.0)
    before = bytes_in_store()
    first = zerocopy.publish(search, name=name)
    second = zerocopy.publish(search, name=f"{name}-other")
    assert wait_until(lambda: bytes_in_store() - before < 1.1 * nbytes, 10)
    assert [handle.load()(1.0) for handle in (unnamed, first, second)] == [expected] * 3
    assert (first.name, second.name) == (name, f"{name}-other")
    zerocopy.remove(name)
    assert second.load(verify=True)(1.0) == expected
    unnamed.close()
    assert pipelines.answer(search, 1.0) == expected


def test_without_a_name_after_one(name: str) -> None:
    """A publication without a name shares the weights that already have a name, and keeps them after the name is removed."""
    search = pipelines.search(width=512)
    zerocopy.publish(search, name=name)
    gc.collect()
    before = bytes_in_store()
    unnamed = zerocopy.publish(search)
    assert bytes_in_store() - before < 100_000
    zerocopy.remove(name)
    assert unnamed.load()(1.0) == search(1.0)
    assert pipelines.answer(unnamed, 1.0) == search(1.0)


# Parts and devices


def test_parts(name: str) -> None:
    """`fields` loads only the given fields from every kind of handle; the part names missing fields and can be passed on."""
    search = pipelines.search(width=64)
    zerocopy.publish(search, name=name)
    for handle in (
        zerocopy.lookup(name),
        zerocopy.lookup(name, version=1),
        pickle.loads(pickle.dumps(zerocopy.lookup(name))),
    ):
        part = handle.load(fields=["encoder", "top_k"], verify=True)
        assert_zero_copy(part)
        assert part.top_k == 5
        assert torch.equal(part.encoder[0].weight, search.encoder[0].weight)
        with pytest.raises(AttributeError, match=r"it was loaded with fields=\['encoder', 'top_k'\] only"):
            part.index
        assert zerocopy.version_of(part) == zerocopy.lookup(name).version
        again = ray.get(ray.put(part))
        assert torch.equal(again.encoder[0].weight, search.encoder[0].weight)
    with pytest.raises(ArgumentError, match="no attribute 'nothing'"):
        zerocopy.lookup(name).load(fields=["nothing"])


@zerocopy.task(num_cpus=0.1, device="auto")
def device_of(search: Numbered) -> str:
    return str(search.table.device)


@zerocopy.task(num_cpus=0.1, device="auto")
def live_device_of(search: zerocopy.Live[Numbered]) -> str:
    return str(search.current().table.device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is told where there is no GPU")
def test_devices(name: str) -> None:
    """Without a GPU "auto" is the CPU, `current` returns one object for all names of the CPU, and "cuda" is an error."""
    publication, following = zerocopy.publish(numbered(1), name=name), zerocopy.lookup(name)
    assert publication.load("auto")() == following.load("cpu")() == 1
    assert publication.current() is following.current("auto") is following.current(torch.device("cpu"))
    assert [device_of(publication), device_of(following), live_device_of(following)] == ["cpu"] * 3
    for ask in (publication.load, following.load, publication.current, following.current):
        with pytest.raises(DeviceError, match="cuda"):
            ask("cuda")
        with pytest.raises(DeviceError):
            ask("nonsense")
    assert following.current()() == 1


# Reuse between calls of tasks


@pytest.fixture(scope="module")
def process(cluster: None) -> Any:
    """One actor process that runs calls of tasks in itself."""
    process = test_reuse.Process.remote()
    ray.get(process.keep_for.remote(600))
    return process


def test_calls_reuse_one_load(process: Any, name: str) -> None:
    """Calls that get a handle or an instance reuse one load, and no call sees a change that an earlier call made."""
    module = modules()
    publication = zerocopy.publish(module, name=name)
    for given in (publication, zerocopy.lookup(name), module):
        places = [test_reuse.call(process, test_reuse.place, given) for _ in range(10)]
        assert len(set(places)) < len(places), places  # on a busy machine, some calls do not wait for a comparison
        before = test_reuse.call(process, test_reuse.look, given)
        for change in ("a write", "a mode", "a child", "an attribute"):
            test_reuse.call(process, test_reuse.apply, given, CHANGES[change])
            assert test_reuse.call(process, test_reuse.look, given) == before, change
    assert ray.get(process.kept.remote()) == 1, "they are the same weights"


def test_a_new_version_is_not_what_was_kept(process: Any, name: str) -> None:
    """The next call gets the new version, both for a handle that follows and for an instance that was changed."""
    module = modules()
    zerocopy.publish(module, name=name)
    following = zerocopy.lookup(name)
    for number in range(3):
        with torch.no_grad():
            module[0].weight.fill_(number)
        assert test_reuse.call(process, test_reuse.look, module)[2][0] == 360_000 * number  # not published by name
        zerocopy.publish(module, name=name)
        for given in (module, following):
            assert test_reuse.call(process, test_reuse.look, given)[2][0] == 360_000 * number
            assert test_reuse.look(given)[2][0] == 360_000 * number


def test_calls_are_short(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When workers have the weights, calls with named handles or instances contain no object reference."""
    from zerocopy._run import short_calls, task

    taken: list[bool] = []
    pack = short_calls.pack_call

    def noted(*call: Any) -> bytes | None:
        packed = pack(*call)
        taken.append(packed is not None)
        return packed

    monkeypatch.setattr(task.short_calls, "pack_call", noted)
    search = numbered(1)
    for given in (zerocopy.publish(search, name=name), zerocopy.lookup(name), search):
        taken.clear()
        assert [versions.ask(given) for _ in range(6)] == [1] * 6
        assert sum(taken) >= 3
    zerocopy.publish(numbered(2), name=name)
    assert versions.ask(zerocopy.lookup(name)) == 2


# What pipelines hold


def test_copied_fields_that_change(name: str) -> None:
    """A passed pipeline arrives with its current copied fields; a pipeline found by name has the published ones."""
    search = pipelines.search(width=64)
    handles = [zerocopy.publish(search, name=name)]
    for _ in range(2):
        search.top_k = 9
        assert ray.get(pipelines.top_k_and_mode.remote(search))[0] == 9
        search.top_k = 11
        search.encoder.eval()
        assert ray.get(pipelines.top_k_and_mode.remote(search))[0:2] == (11, False)
        search.encoder.train()
        assert zerocopy.lookup(name).load().top_k == 5
        loaded = zerocopy.lookup(name).load()
        loaded.top_k = 7
        assert ray.get(pipelines.top_k_and_mode.remote(loaded))[0] == 7
        assert pipelines.answer(loaded, 0.0) == loaded(0.0)
        handles.clear()  # in the second round only the name keeps the version


def test_pipelines_in_pipelines(name: str) -> None:
    """A pipeline may contain a pipeline or a named publication; the publication arrives as a handle that follows as before."""
    zerocopy.publish(numbered(1), name=f"{name}-inner")
    for link in (zerocopy.lookup(f"{name}-inner"), zerocopy.lookup(f"{name}-inner", version=1)):
        outside = Outside(pipelines.search(width=64), nn.Linear(64, 64), link, [{"again": link}])
        publication = zerocopy.publish(outside, name=name)
        assert zerocopy.publish(outside, name=name).version == publication.version
        zerocopy.remove(f"{name}-inner")
        zerocopy.publish(numbered(1), name=f"{name}-inner")
        loaded = zerocopy.lookup(name).load()
        assert loaded.inner(1.0) == outside.inner(1.0)
        assert loaded.link is loaded.tail[0]["again"]
        if link.alias:
            assert loaded.link.load()() == loaded.link.current()() == 1
        zerocopy.publish(numbered(2), name=f"{name}-inner", keep=5)
        if link.alias:
            assert loaded.link.load()() == 2
            assert ray.get(inner_of.remote(outside)) == 2
        zerocopy.remove(f"{name}-inner")
        zerocopy.publish(numbered(1), name=f"{name}-inner")


@ray.remote
def inner_of(outside: Outside) -> int:
    assert_zero_copy(outside.inner)
    return outside.link.load()()


class Plain:
    """Declares no fields, so zerocopy recognizes it by the modules that it contains."""

    def __init__(self, net: nn.Module, other: nn.Module | None = None) -> None:
        self.net = net
        self.other = other


def test_another_object_with_the_same_module(name: str) -> None:
    """Another object that contains a module of a version is not that version, and `refresh` and `unshare` refuse it."""
    published = Plain(nn.Linear(8, 8))
    zerocopy.publish(published, name=name)
    loaded = zerocopy.lookup(name).load()
    for one in (published, loaded):
        mine = Plain(one.net, nn.Linear(8, 8))
        assert zerocopy.version_of(one).number == 1
        assert zerocopy.version_of(mine) is None
        with pytest.raises(ArgumentError, match="was not loaded"):
            zerocopy.refresh(mine)
        with pytest.raises(ArgumentError, match="was not loaded"):
            zerocopy.unshare(mine)
    assert zerocopy.version_of({"net": loaded.net}) is None


def test_classes_by_value(name: str) -> None:
    """Local classes, undecorated subclasses and classes with slots work under a name."""

    @zerocopy.pipeline
    class Local:
        __slots__ = ("__dict__", "__weakref__", "net", "note")

        def __init__(self, note: str) -> None:
            self.net = nn.Linear(300, 300)
            self.note = note

    class Derived(Local):
        pass

    @ray.remote
    def look(pipeline: Any, handle: Any) -> tuple[str, str, str]:
        assert_zero_copy(pipeline)
        return type(pipeline).__name__, pipeline.note, handle.load().note

    for cls in (Local, Derived):
        pipeline = cls("first")
        publication = zerocopy.publish(pipeline, name=name)
        pipeline.note = "second"
        assert ray.get(look.remote(pipeline, zerocopy.lookup(name))) == (cls.__name__, "second", "first")
        loaded = zerocopy.lookup(name).load()
        assert zerocopy.publish(loaded, name=name).version == publication.version


# TorchScript, exported programs, checkpoints, wrappers


@pytest.mark.filterwarnings("ignore")
def test_programs(name: str) -> None:
    """TorchScript and exported programs share their weights, alone and in a pipeline; equal programs are one version."""
    linear = nn.Linear(400, 400)
    given = torch.ones(2, 400)
    expected = linear(given)
    programs = {
        "scripted": torch.jit.script(linear),
        "traced": torch.jit.trace(linear, given),
        "exported": torch.export.export(linear, (given,)),
    }
    for kind, program in programs.items():
        holder = Outside(pipelines.search(width=16), nn.Linear(2, 2), tail=[kind])
        holder.extra = program
        publication = zerocopy.publish(holder, name=name)
        assert publication.shared_bytes > linear.weight.nbytes
        assert zerocopy.publish(holder, name=name).version == publication.version
        loaded = zerocopy.lookup(name).load(verify=True)
        run = loaded.extra.module() if kind == "exported" else loaded.extra
        torch.testing.assert_close(run(given), expected)
        assert ray.get(kind_of.remote(zerocopy.lookup(name))) == kind
        assert zerocopy.publish(loaded, name=name).version == publication.version, kind
    zerocopy.publish(programs["scripted"], name=f"{name}-bare")
    torch.testing.assert_close(zerocopy.lookup(f"{name}-bare").load()(given), expected)
    assert zerocopy.refresh(zerocopy.lookup(f"{name}-bare").load()) is False


@ray.remote
def kind_of(handle: Any) -> str:
    return handle.load().tail[0]


def build_tied() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(300, 128), "head": nn.Linear(128, 300, bias=False)})
    model["head"].weight = model["embedding"].weight
    model.register_buffer("scale", torch.full((3,), 2.0), persistent=False)
    return model.eval()


def test_checkpoints(name: str, tmp_path: Path) -> None:
    """A checkpoint and an equal live model are the same version; ties, buffers and dtypes are kept."""
    torch.manual_seed(0)
    model = build_tied()
    save_file({"embedding.weight": model["embedding"].weight.detach()}, tmp_path / "model.safetensors")
    for dtype in (None, torch.bfloat16):
        publication = zerocopy.publish_checkpoint(build_tied, tmp_path / "*.safetensors", name=name, dtype=dtype)
        loaded = zerocopy.lookup(name).load(verify=True)
        assert loaded["head"].weight is loaded["embedding"].weight
        assert torch.equal(loaded.scale, model.scale)
        assert not loaded.training
        assert torch.equal(loaded["head"].weight, model["head"].weight.to(dtype or torch.float32))
        live = build_tied()
        live.load_state_dict(model.state_dict())
        if dtype:
            live["head"].weight = live["embedding"].weight = nn.Parameter(live["head"].weight.to(dtype))
        assert zerocopy.publish(live, name=name).version == publication.version
        assert zerocopy.publish(loaded, name=name).version == publication.version
    assert [one.source for one in zerocopy.publications() if one.version.name == name] == [True, True]


def test_wrappers(name: str) -> None:
    """`ModelWrapper` takes a pipeline that was loaded by name, and stores no second copy of its weights."""
    search = pipelines.search(width=64)
    zerocopy.publish(search, name=name)
    loaded = zerocopy.lookup(name).load()
    before = bytes_in_store()
    wrapper = ModelWrapper.from_model(loaded)
    assert bytes_in_store() - before < 100_000
    assert wrapper.load()(1.0) == search(1.0)
    remote = ModelWrapper.for_tasks(loaded)
    assert remote(1.0) == pytest.approx(search(1.0))
    wrapper.close()
    assert zerocopy.lookup(name).load()(1.0) == search(1.0)


# Handles


def test_copies_of_handles(name: str) -> None:
    """A copied handle follows the same alias or stays on the same version as its original, and is closed separately."""
    publication, following = zerocopy.publish(numbered(1), name=name), zerocopy.lookup(name)
    fixed = zerocopy.lookup(name, version=1)
    copies = [way(handle) for way in (copy.copy, copy.deepcopy) for handle in (publication, following, fixed)]
    zerocopy.publish(numbered(2), name=name)
    assert [handle.load()() for handle in copies] == [1, 2, 1] * 2
    assert [handle.alias for handle in copies] == [handle.alias for handle in (publication, following, fixed)] * 2
    copies[1].close()
    assert following.load()() == 2
    following.close()
    assert copies[4].load()() == 2
    with pytest.raises(PublicationClosedError):
        copy.copy(following)


def test_other_versions_of_python_or_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that another torch version wrote is refused, with a clear error, in every way to load it."""
    from zerocopy._cluster import writing
    from zerocopy._store.manifest import Versions

    publication = zerocopy.publish(numbered(1), name=name)
    current = publication.current()
    loaded = publication.load()
    told, theirs = writing._told, attrs.evolve(Versions.here(), torch="1.13.0")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_told", lambda found: {**told(found), "versions": attrs.astuple(theirs)})
        zerocopy.publish(numbered(2), name=name)
    words = r"written with torch 1\.13, but this process has"
    with pytest.raises(VersionError, match=words):
        zerocopy.lookup(name).load()
    with pytest.raises(VersionError, match=words):
        zerocopy.refresh(loaded)
    with pytest.warns(FollowWarning, match=words):
        assert wait_until(lambda: publication.current() is current and has_warned_of(name), 10)
    with pytest.raises(VersionError, match=words):
        versions.ask.local(zerocopy.lookup(name))
    with pytest.raises(VersionError, match=words):
        versions.ask(zerocopy.lookup(name))
    assert (loaded(), publication.current()) == (1, current)
    zerocopy.publish(numbered(3), name=name)
    assert wait_until(lambda: publication.current()() == 3, 10)


def has_warned_of(name: str) -> bool:
    from zerocopy._cluster import following

    return any(repr(name) in text for text in following._warned)


class Broken(nn.Module):
    """A module whose versions can fail while they are loaded."""

    def __init__(self, number: int, error: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(300, 300)
        self.number, self.error = number, error

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["error"]:
            raise RuntimeError(state["error"])
        super().__setstate__(state)


def test_a_version_that_cannot_be_loaded_holds_up_no_other(name: str) -> None:
    """If loading a version raises, the old version stays in use with one warning, and other names still get new versions."""
    first, second = zerocopy.publish(Broken(1), name=name), zerocopy.publish(numbered(1), name=f"{name}-other")
    assert (first.current().number, second.current()()) == (1, 1)
    zerocopy.publish(Broken(2, "no such file"), name=name)
    zerocopy.publish(numbered(2), name=f"{name}-other")
    with pytest.warns(FollowWarning, match="goes on with version 1: RuntimeError: no such file"):
        assert wait_until(lambda: second.current()() == 2 and has_warned_of(name), 10)
    assert first.current().number == 1
    zerocopy.publish(numbered(3), name=f"{name}-other")
    assert wait_until(lambda: second.current()() == 3, 10)
    zerocopy.publish(Broken(3), name=name)
    assert wait_until(lambda: first.current().number == 3, 10)


# Leaks


def is_free(store_use: Callable[[], int]) -> bool:
    return wait_until(lambda: store_use() <= 0, 30)


@pytest.mark.long
def test_nothing_is_left(name: str, store_use: Callable[[], int]) -> None:
    """After tasks, closures, `map`, containers, actors, pools and `Live` end and the name is removed, the store is empty."""
    search = pipelines.search(width=1024)
    expected = search(1.0)
    publication, following = zerocopy.publish(search, name=name), zerocopy.lookup(name)
    assert [pipelines.answer(given, 1.0) for given in (search, publication, following)] == [expected] * 3
    assert list(pipelines.answer.map(following, [1.0, 1.0])) == [expected] * 2

    assert ray.get(closure_over(following).remote()) == expected
    assert ray.get(ray.put([search, {"again": publication}]))[1]["again"].load()(1.0) == expected
    with pipelines.Worker.pool(1, following) as pool:
        assert list(pool.map("ask", [1.0])) == [expected]
    actor = Newest.remote(search)
    assert ray.get(actor.ask.remote(1.0)) == expected
    assert wait_until(lambda: store_use() < 1.3 * test_leaks.WEIGHTS, 20), "there is more than one set"
    zerocopy.remove(name)
    del search, publication, following, actor, pool
    assert is_free(store_use)


@zerocopy.actor(num_cpus=0.1)
class Newest:
    def __init__(self, search: zerocopy.Live[pipelines.Search]) -> None:
        self.search = search

    def ask(self, query: float) -> float:
        return self.search.current()(query)


def closure_over(handle: Any) -> Any:
    """A task over a captured handle. A worker keeps the function; a handle that follows an alias keeps no version in it."""

    @ray.remote(num_cpus=0.1)
    def captured() -> float:
        return handle.load()(1.0)

    return captured


@pytest.mark.long
def test_nothing_is_left_of_changes(name: str, store_use: Callable[[], int]) -> None:
    """An instance that is adopted, passed, trained and published again holds one set of weights besides the kept versions."""
    search = pipelines.search(width=1024)
    for adopt in (False, True):
        for _ in range(2):
            publication = zerocopy.publish(search, name=name, adopt=adopt, keep=0)
            assert pipelines.answer(search, 1.0) == search(1.0) == publication.load()(1.0)
            with torch.no_grad():
                search.encoder[0].weight.add_(1)
            assert pipelines.answer(search, 1.0) == search(1.0)
    del publication
    zerocopy.remove(name)
    assert pipelines.answer(search, 1.0) == search(1.0)
    assert wait_until(lambda: store_use() < 2.3 * test_leaks.WEIGHTS, 20)
    del search
    assert is_free(store_use)


def test_a_refused_publishing_leaves_nothing(name: str, store_use: Callable[[], int]) -> None:
    """A refused publication leaves nothing in the store, also if `expect` did not match."""
    with pytest.raises(zerocopy.errors.CannotTravelError):
        zerocopy.publish(pipelines.search(width=1024, settings={"stream": (number for number in ())}), name=name)
    assert store_use() <= 0
    search = pipelines.search(width=1024)
    with pytest.raises(zerocopy.errors.VersionConflictError):
        zerocopy.publish(search, name=name, expect=3, adopt=True)
    assert is_free(store_use)
    assert zerocopy.publications().names.count(name) == 0
    assert search(1.0) == search(1.0)


# Connections


CONNECTIONS = """
import os, pickle, sys, warnings
import ray
import zerocopy, zerocopy.errors
from versions import ask, numbered
address, name = sys.argv[1:]

def start(address, **options):
    ray.init(address, logging_level="ERROR", log_to_driver=False, **options)

start(address)
search = numbered(1)
publication, following, kept = zerocopy.publish(search, name=name), zerocopy.lookup(name), zerocopy.lookup(name)
loaded, current, pickled = publication.load(), kept.current(), pickle.dumps(publication)
child = os.fork()
if not child:
    for handle in (publication, following, kept, pickle.loads(pickled)):
        for way in (handle.load, handle.current):
            try:
                print(way()())
            except zerocopy.errors.ZeroCopyError as error:
                refused = "not running in this process" in str(error) or "was forked from one" in str(error)
                print("child", refused)
    publication.close()
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
ray.shutdown()
for handle in (publication, following, pickle.loads(pickled)):
    try:
        handle.load()
    except zerocopy.errors.ZeroCopyError as error:
        print("ended", "needs Ray, which is not running in this process" in str(error))
print("after shutdown", loaded(), current())
start(address)
print("again", publication.load()(), following.load()(), pickle.loads(pickled).load()(), kept.current()(), kept.load()())
print("tasks", ask(publication), ask(following), ask(search), ask(loaded), ask(current))
print("republished", zerocopy.publish(search, name=name).version.number)
zerocopy.publish(numbered(2), name=name)
print("refreshed", zerocopy.refresh(loaded), loaded(), ask(following))
ray.shutdown()
warnings.simplefilter("ignore")
start("local", num_cpus=1, object_store_memory=100_000_000, include_dashboard=False)
for handle in (publication, following):
    try:
        handle.load()
    except zerocopy.errors.NotPublishedError as error:
        print("other cluster", "No publication has the name" in str(error))
zerocopy.publish(numbered(5), name=name)
print("other cluster", following.load()())
try:
    publication.load()
except zerocopy.errors.NotPublishedError as error:
    print("other cluster", "has other content" in str(error))
"""


@pytest.mark.long
def test_connections_that_end(name: str, address: str) -> None:
    """A named handle works again after a reconnection to the same cluster; a fork or another cluster gets a clear error."""
    done = run_python(CONNECTIONS, "-", address, name)
    assert done.stdout.splitlines() == [
        *["child True"] * 5,
        "1",  # the version that `current()` returned before the fork still works
        *["child True"] * 2,
        *["ended True"] * 3,
        "after shutdown 1 1",
        "again 1 1 1 1 1",
        "tasks 1 1 1 1 1",
        "republished 1",
        "refreshed True 2 2",
        "other cluster True",
        "other cluster True",
        "other cluster 5",
        "other cluster True",
    ], done.stderr


def test_errors_pickle(name: str) -> None:
    """Errors keep their type, message and attributes through pickle, also errors that a task raises."""
    zerocopy.publish(numbered(1), name=name)
    mistakes = [
        lambda: zerocopy.lookup("nobody"),
        lambda: zerocopy.lookup(name, version=9),
        lambda: zerocopy.lookup(name, alias="canary"),
        lambda: zerocopy.publish(numbered(2), name=name, expect=7),
        lambda: zerocopy.remove(name, version=1),
    ]
    for mistake in mistakes:
        with pytest.raises(zerocopy.errors.ZeroCopyError) as found:
            mistake()
        again = pickle.loads(pickle.dumps(found.value))
        assert (type(again), str(again), vars(again)) == (type(found.value), str(found.value), vars(found.value))

    @zerocopy.task(num_cpus=0.1)
    def look_up() -> None:
        zerocopy.lookup(name, version=9)

    with pytest.raises(NotPublishedError, match="has no version 9") as told:
        look_up()
    assert (told.value.name, told.value.versions) == (name, [1])


def test_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that needs the registry refuses Ray Client."""
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    for ask in (
        lambda: zerocopy.publish(numbered(1), name="n"),
        lambda: zerocopy.publish_checkpoint(nn.Identity, [], name="n"),
        lambda: zerocopy.lookup("n"),
        lambda: zerocopy.set_alias("n", "a", version=1),
        lambda: zerocopy.publications(),
        lambda: zerocopy.remove("n"),
    ):
        with pytest.raises(zerocopy.errors.RayClientError, match="cannot work through Ray Client"):
            ask()
