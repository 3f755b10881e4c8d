"""Do `current()`, `Live`, `follow=True` and `refresh` change pipelines in use, without a pause and without mixed versions?"""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import ray
import torch
from conftest import run_python, wait_until
from torch import nn
from versions import Asked, AskedAsync, Following, Numbered, Other, ask, ask_for_item, ask_live, numbered

import zerocopy
from zerocopy import copied
from zerocopy._cluster.following import Followed, Key, Loaded
from zerocopy._cluster.handles import followed_for
from zerocopy._cluster.refresh import tag_of
from zerocopy._load.publication import Publication
from zerocopy.errors import ArgumentError, DeclarationError, FollowWarning, NotPublishedError
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = pytest.mark.usefixtures("cluster")


def test_current_is_one_object_for_each_version(name: str) -> None:
    """All handles of a process return one object, which a new version soon replaces; an object that you keep never changes."""
    publication = zerocopy.publish(numbered(1), name=name)
    first = publication.current()
    assert first is publication.current() is zerocopy.lookup(name).current()
    assert_zero_copy(first)
    assert zerocopy.lookup(name, version=1).current() is first
    zerocopy.publish(numbered(2), name=name)
    assert wait_until(lambda: publication.current()() == 2, 10)
    assert first() == 1
    assert zerocopy.lookup(name, version=1).current() is first
    zerocopy.set_alias(name, "latest", version=1)
    assert wait_until(lambda: publication.current() is first, 10)  # the process still has this object


def test_handles_of_an_alias_and_of_a_version(name: str) -> None:
    """A handle that was published under an alias follows that alias; a handle of one version never changes."""
    canary = zerocopy.publish(numbered(1), name=name, alias="canary")
    fixed = zerocopy.lookup(name, version=1)
    zerocopy.publish(numbered(2), name=name)
    latest = zerocopy.lookup(name)
    assert (canary.current()(), fixed.current()(), latest.current()()) == (1, 1, 2)
    zerocopy.set_alias(name, "canary", version=2)
    assert wait_until(lambda: canary.current()() == 2, 10)
    assert (fixed.current()(), canary.load()()) == (1, 1)  # `load` returns the version that this handle published


def test_a_version_with_another_structure(name: str) -> None:
    """A new version may have more or fewer layers."""
    handle = zerocopy.publish(numbered(1, layers=2), name=name)
    loaded = handle.load()
    assert len(handle.current().encoder) == 2
    zerocopy.publish(numbered(2, layers=5), name=name)
    assert wait_until(lambda: handle.current()() == 2, 10)
    assert len(handle.current().encoder) == 5
    assert zerocopy.refresh(loaded)
    assert (loaded(), len(loaded.encoder)) == (2, 5)


def test_a_version_of_another_class_is_refused(name: str) -> None:
    """The old version stays in use, with one warning; a later version of the right class replaces it."""
    handle = zerocopy.publish(numbered(1), name=name)
    loaded = handle.load()
    current = handle.current()
    zerocopy.publish(numbered(2, cls=Other), name=name)
    with pytest.raises(ArgumentError, match="newest version is a Other, not a Numbered"):
        zerocopy.refresh(loaded)
    time.sleep(0.5)
    with pytest.warns(
        FollowWarning, match="Version 2 of .* is a Other, not a Numbered. This process goes on with version 1"
    ):
        assert handle.current() is current
    assert handle.current() is current
    assert loaded() == 1
    zerocopy.publish(numbered(3), name=name)
    assert wait_until(lambda: handle.current()() == 3, 10)


def test_refreshing_by_hand(name: str) -> None:
    """`refresh` changes weights and copied fields together in the same object; `version_of` returns the new version."""
    publication = zerocopy.publish(numbered(1), name=name)
    loaded, fixed = zerocopy.lookup(name).load(), zerocopy.lookup(name, version=1).load()
    assert not zerocopy.refresh(loaded)
    zerocopy.publish(numbered(2), name=name)
    assert zerocopy.refresh(loaded)
    assert not zerocopy.refresh(loaded)
    assert loaded() == 2
    assert_zero_copy(loaded)
    version = zerocopy.version_of(loaded)
    assert version is not None
    assert version.number == 2
    assert not zerocopy.refresh(fixed)  # fixed to one version
    assert fixed() == publication.load()() == 1
    module = nn.Linear(300, 300)
    zerocopy.publish(module, name=f"{name}-module")
    bare = zerocopy.lookup(f"{name}-module").load()
    with torch.no_grad():
        module.weight.zero_()
    zerocopy.publish(module, name=f"{name}-module")
    assert zerocopy.refresh(bare)
    assert torch.equal(bare.weight, module.weight)


class Holder:
    """A class without declarations, which zerocopy knows by its modules."""

    def __init__(self, number: int) -> None:
        self.net = numbered(number).encoder


def test_refreshing_an_object_without_declarations(name: str) -> None:
    """It can be refreshed again and again."""
    zerocopy.publish(Holder(1), name=name)
    loaded = zerocopy.lookup(name).load()
    for number in (2, 3):
        zerocopy.publish(Holder(number), name=name)
        assert zerocopy.refresh(loaded)
        version = zerocopy.version_of(loaded)
        assert version is not None
        assert version.number == number
        assert loaded.net[0].weight.eq(number).all()


@zerocopy.pipeline
class Slotted:
    """A pipeline with slots in addition to its dict."""

    __slots__ = ("__dict__", "__weakref__", "extra", "net")

    def __init__(self, value: float, extra: Any = None) -> None:
        self.net = nn.Linear(300, 300)
        with torch.no_grad():
            self.net.weight.fill_(value)
        if extra is not None:
            self.extra = extra


def test_refreshing_slots(name: str) -> None:
    """`refresh` also updates attributes in slots, and removes those that the new version does not have."""
    zerocopy.publish(Slotted(1, "a"), name=name)
    loaded = zerocopy.lookup(name).load()
    zerocopy.publish(Slotted(2), name=name)
    assert zerocopy.refresh(loaded)
    assert (float(loaded.net.weight.detach()[0, 0]), hasattr(loaded, "extra")) == (2.0, False)
    zerocopy.publish(Slotted(3, "c"), name=name)
    assert zerocopy.refresh(loaded)
    assert (float(loaded.net.weight.detach()[0, 0]), loaded.extra) == (3.0, "c")


class ListModel(nn.Module, list):
    """A module that is also a list."""


def test_what_cannot_be_refreshed(name: str) -> None:
    """A pipeline without a name, a partly loaded pipeline and a pipeline that is a container cannot be refreshed."""
    with pytest.raises(ArgumentError, match="not loaded from a publication with a name"):
        zerocopy.refresh(zerocopy.publish(numbered(1)).load())
    with pytest.raises(ArgumentError, match="not loaded from a publication with a name"):
        zerocopy.refresh(numbered(1))
    publication = zerocopy.publish(numbered(1), name=name)
    with pytest.raises(ArgumentError, match=r"was loaded with fields=.* only, and cannot change in place"):
        zerocopy.refresh(publication.load(fields=["encoder"]))
    zerocopy.publish(ListModel(), name=f"{name}-list")
    listed = zerocopy.lookup(f"{name}-list").load()
    changed = ListModel()
    changed.number = 2
    zerocopy.publish(changed, name=f"{name}-list")
    with pytest.raises(ArgumentError, match="is itself a dict, list, tuple or set"):
        zerocopy.refresh(listed)


def test_who_keeps_the_old_version_is_named(name: str) -> None:
    """An optimizer, a global or a hook that holds an inner module keeps the old version, and one warning names the holder."""

    class Cache:
        def __init__(self, held: object) -> None:
            self.held = {"encoder": [held]}

    zerocopy.publish(numbered(1), name=name)
    loaded = zerocopy.lookup(name).load()
    optimizer = torch.optim.SGD(loaded.encoder.parameters())
    zerocopy.publish(numbered(2), name=name)
    with pytest.warns(
        FollowWarning, match="An object of the class 'SGD' still holds a part of an older version of Numbered"
    ):
        zerocopy.refresh(loaded)
    del optimizer
    cache = Cache(loaded.encoder)
    zerocopy.publish(numbered(3), name=name)
    with pytest.warns(FollowWarning, match=r"Cache' still holds"):
        zerocopy.refresh(loaded)
    assert float(cache.held["encoder"][0][0].weight.detach()[0, 0]) == 2
    assert loaded() == 3
    del cache
    zerocopy.publish(numbered(4), name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zerocopy.refresh(loaded)


def test_an_actor_follows_between_calls(name: str) -> None:
    """`follow=True` updates the actor's pipeline in place and calls `on_version`; a stream stays on one version."""
    publication = zerocopy.publish(numbered(1), name=name)
    actor, of_instance = Following.remote(publication), Following.remote(zerocopy.lookup(name).load())
    assert ray.get([actor.ask.remote(), of_instance.ask.remote()]) == [1, 1]
    stream = actor.stream.options(num_returns="streaming").remote(20)
    first = ray.get(next(stream))
    zerocopy.publish(numbered(2), name=name)
    assert [first, *map(ray.get, stream)] == [1] * 20
    for one in (actor, of_instance):
        assert wait_until(lambda one=one: ray.get(one.ask.remote()) == 2, 20)
    zerocopy.set_alias(name, "latest", version=1)
    assert wait_until(lambda: ray.get(actor.ask.remote()) == 1, 20)
    assert ray.get(actor.heard_of.remote()) == [2, 1]
    assert Following(numbered(5)).ask() == 5  # a plain class, without Ray


@zerocopy.actor(num_cpus=0.1, follow=True)
class Hooked:
    """Calls its own methods when a new version arrives."""

    def __init__(self, search: Numbered) -> None:
        self.search = search
        self.prepared = 0

    def on_version(self, search: Numbered) -> None:
        self.prepare(search)

    def prepare(self, search: Numbered) -> None:
        self.prepared = search.number

    def ask(self) -> tuple[int, int]:
        return self.search(), self.prepared


def test_what_starts_late_catches_up(name: str) -> None:
    """A pipeline that starts to follow at an older version still gets the newest one."""
    zerocopy.publish(numbered(1), name=name)
    loaded = zerocopy.lookup(name).load()
    tag = tag_of(loaded)
    zerocopy.publish(numbered(2), name=name)
    handle = zerocopy.lookup(name)
    others = [Followed(Key(name, "latest", None), lambda: Loaded(2, None, handle)) for _ in range(20)]
    assert {other.newest().number for other in others} == {2}
    followed = followed_for(loaded, tag, torch.device("cpu"))
    followed.start()
    assert wait_until(lambda: followed.newest().number == 2, 10)
    assert followed.newest().pipeline is not loaded


def test_on_version_may_call_methods(name: str) -> None:
    """`on_version` may call methods of its actor that also check for new versions."""
    actor = Hooked.remote(zerocopy.publish(numbered(1), name=name))
    assert ray.get(actor.ask.remote()) == (1, 0)
    zerocopy.publish(numbered(2), name=name)
    assert wait_until(lambda: ray.get(actor.ask.remote(), timeout=20) == (2, 2), 20)


@zerocopy.actor(num_cpus=0.1, follow=True)
class Tuned:
    """Changes the pipeline after it was loaded, and has no `on_version`."""

    def __init__(self, search: Numbered) -> None:
        self.search = search
        search.encoder.eval()

    def ask(self) -> tuple[int, list[str]]:
        return self.search(), [str(one.message) for one in warned]


warned: list[Any] = []


class Inherited(Tuned):
    """Follows like its base class."""

    def ask(self) -> tuple[int, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = self.again()
            warned.extend(caught)
        return answer, [str(one.message) for one in warned]

    def again(self) -> int:
        return self.search()


def test_what_was_done_after_loading_is_told(name: str) -> None:
    """Without `on_version`, a warning names the changes after loading that the new version does not have."""
    from zerocopy._run.following import _difference, _state_of

    search = numbered(1)
    before = _state_of(search)
    search.encoder.eval()
    assert _difference(before, _state_of(search)) == "train or eval mode of 'encoder'"
    before = _state_of(search)
    search.encoder[1] = nn.Identity()
    assert _difference(before, _state_of(search)) == "the class of 'encoder.1'"
    actor = Inherited.remote(zerocopy.publish(numbered(1), name=name))
    assert ray.get(actor.ask.remote())[0] == 1
    zerocopy.publish(numbered(2), name=name)
    assert wait_until(lambda: ray.get(actor.ask.remote())[0] == 2, 20)


def test_live_parameters(name: str) -> None:
    """Threaded, async and streaming actors and tasks ask for the newest version; each call keeps the version that it got."""
    handle = zerocopy.lookup(zerocopy.publish(numbered(1), name=name).name)
    threaded, concurrent = Asked.options(max_concurrency=8).remote(handle), AskedAsync.remote(handle)
    assert (
        ray.get([threaded.ask.remote() for _ in range(10)] + [concurrent.ask.remote() for _ in range(10)]) == [1] * 20
    )
    assert ask_live(handle) == 1
    stream = threaded.stream.options(num_returns="streaming").remote(10)
    first = ray.get(next(stream))
    zerocopy.publish(numbered(2), name=name)
    assert wait_until(lambda: ray.get(threaded.ask.remote()) == ray.get(concurrent.ask.remote()) == 2, 20)
    assert [first, *map(ray.get, stream)] == [1] * 10
    assert ask_live(handle) == ask(handle) == 2
    assert ray.get(threaded.version.remote()).number == 2


def test_live_parameters_take_whatever_has_no_name() -> None:
    """A pipeline, a module and a publication without a name get `current()` too, also in a plain class."""
    search = numbered(3)
    assert Asked(search).ask() == 3
    assert ask_live.local(search) == 3
    assert ask_live(search) == ask_live(zerocopy.publish(search)) == 3
    actor = Asked.remote(search)
    assert ray.get([actor.ask.remote(), actor.version.remote()]) == [3, None]
    publication = zerocopy.publish(search)
    assert publication.current() is publication.current()
    assert shares_memory(publication.current().table, publication.load().table)


def test_following_handles_are_resolved_when_a_task_is_submitted(name: str) -> None:
    """`map` and retries stay on one version while new versions are published; the next call gets the newest version."""
    handle = zerocopy.lookup(zerocopy.publish(numbered(1), name=name).name)
    answers = [ask.remote(handle) for _ in range(4)]
    results = ask_for_item.map(handle, range(12), max_in_flight=2)
    first = next(results)
    zerocopy.publish(numbered(2), name=name)
    assert [first, *results] == [1] * 12
    assert ray.get(answers) == [1] * 4
    assert ask(handle) == ray.get(ask.remote(handle)) == 2


def test_follow_is_refused_where_calls_run_at_one_time() -> None:
    """`follow=True` with async methods, threads or concurrency groups is an error that recommends `Live`."""
    with pytest.raises(DeclarationError, match=r"async method 'ask'.*zerocopy\.Live"):

        @zerocopy.actor(follow=True)
        class Async:
            async def ask(self) -> None: ...

    with pytest.raises(DeclarationError, match=r"max_concurrency=4.*zerocopy\.Live"):

        @zerocopy.actor(follow=True, max_concurrency=4)
        class Threaded:
            def ask(self) -> None: ...

    with pytest.raises(DeclarationError, match=r"max_concurrency=8.*zerocopy\.Live"):
        Following.options(max_concurrency=8)
    with pytest.raises(DeclarationError, match="async method 'wait'"):

        class Derived(Following):
            async def wait(self) -> None: ...


def test_no_call_waits_for_a_new_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A background thread loads each new version before a call can get it."""
    loads: list[str] = []
    load = Publication._load

    def noted(self: Publication, *how: Any, **more: Any) -> Any:
        loads.append(threading.current_thread().name)
        return load(self, *how, **more)

    monkeypatch.setattr(Publication, "_load", noted)
    handle = zerocopy.publish(numbered(1), name=name)
    assert handle.current()() == 1
    for number in (2, 3, 4):
        zerocopy.publish(numbered(number), name=name)
        assert wait_until(lambda number=number: handle.current()() == number, 10)
    assert loads == ["MainThread", *["zerocopy-follow"] * 3]


def test_a_name_that_is_removed(name: str) -> None:
    """A follower keeps its version after the name is removed, and follows again when the name is published again."""
    handle = zerocopy.publish(numbered(1), name=name)
    actor, looked_up = Following.remote(handle), zerocopy.lookup(name)
    current = handle.current()
    assert ray.get(actor.ask.remote()) == ask(looked_up) == 1
    zerocopy.remove(name)
    time.sleep(0.3)
    assert (handle.current(), ray.get(actor.ask.remote())) == (current, 1)
    with pytest.raises(NotPublishedError):
        zerocopy.refresh(handle.load())
    with pytest.raises(NotPublishedError):
        ask(looked_up)
    zerocopy.publish(numbered(2), name=name)
    assert wait_until(lambda: handle.current()() == 2 == ray.get(actor.ask.remote()), 20)


ELSEWHERE = """
import os, sys, time
import ray, zerocopy
from versions import numbered
address, name = sys.argv[1:]
ray.init(address, log_to_driver=False)
handle = zerocopy.publish(numbered(1), name=name)
print(handle.current()(), flush=True)
if not (child := os.fork()):
    print(handle.current()(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
ray.shutdown()
print(handle.current()(), flush=True)
ray.init(address, log_to_driver=False)
print(handle.current()(), handle.load()(), zerocopy.lookup(name).load()(), flush=True)
zerocopy.publish(numbered(2), name=name)
end = time.monotonic() + 10
while handle.current()() != 2 and time.monotonic() < end:
    time.sleep(0.01)
print(handle.current()())
"""


@pytest.mark.long
def test_forks_and_other_connections(name: str, address: str) -> None:
    """A process without its own connection to Ray keeps the version that it loaded; on a new connection it follows again."""
    done = run_python(ELSEWHERE, "-", address, name)
    assert done.stdout.split() == ["1", "1", "1", "1", "1", "1", "2"], done.stderr


@pytest.mark.long
def test_following_leaks_nothing(name: str, store_use: Callable[[], int]) -> None:
    """Old versions leave the store soon, and all memory is free after the name is removed and its handles are closed."""
    zerocopy.publish(numbered(0, width=400), name=name)
    handle = zerocopy.lookup(name)
    nbytes = sum(one.shared_bytes for one in zerocopy.publications() if one.version.name == name)
    assert handle.current()() == 0
    for number in range(1, 8):
        zerocopy.publish(numbered(number, width=400), name=name)
        assert wait_until(lambda number=number: handle.current()() == number, 10)
    assert wait_until(lambda: store_use() < 3.3 * nbytes, 20)  # the latest and two more
    zerocopy.remove(name)
    handle.close()
    gc.collect()
    assert wait_until(lambda: store_use() <= 0, 20)


@zerocopy.pipeline
class Heavy(Numbered):
    """A pipeline whose copied part is too large to travel inside the handle."""

    notes: bytes = copied(default=b"")


def heavy(number: int) -> Heavy:
    made = numbered(number, width=400, cls=Heavy)
    made.notes = bytes(200_000)
    return made


@pytest.mark.parametrize("kind", [Following, Asked])
def test_an_actor_that_follows_keeps_no_old_version(name: str, kind: Any, store_use: Callable[[], int]) -> None:
    """The version that an actor was started with leaves the store when newer versions replace it, whatever is copied."""
    first = zerocopy.publish(heavy(0), name=name, keep=0)
    nbytes = first.shared_bytes
    actor = kind.remote(first)
    assert ray.get(actor.ask.remote()) == 0
    first.close()
    for number in (1, 2):
        zerocopy.publish(heavy(number), name=name, keep=0)
    assert wait_until(lambda: ray.get(actor.ask.remote()) == 2, 10)
    gc.collect()
    assert wait_until(lambda: store_use() < 1.6 * nbytes, 20)
    ray.kill(actor)
