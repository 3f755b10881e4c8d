"""Can every process find a publication by name, do its versions count up, and does each version store only what changed?"""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pipelines
import pytest
import ray
import torch
from conftest import STORE_BYTES, bytes_in_store, run_python, wait_until
from torch import nn
from versions import Asked, Numbered, ask, numbered

import zerocopy
from zerocopy._cluster import client, handles
from zerocopy.errors import (
    ArgumentError,
    CannotTravelError,
    CorruptedError,
    NotPublishedError,
    PublicationClosedError,
    VersionConflictError,
    VersionInUseError,
)
from zerocopy.testing import assert_zero_copy

pytestmark = pytest.mark.usefixtures("cluster")


def numbers(name: str) -> list[int]:
    return [one.version.number for one in zerocopy.publications() if one.version.name == name]


def test_versions_count_up_and_aliases_point_at_them(name: str) -> None:
    """Each publication is a version; "latest" points at the newest one, and other aliases stay where they were set."""
    first = zerocopy.publish(numbered(1), name=name)
    second = zerocopy.publish(numbered(2), name=name, alias="canary")
    assert (first.version.number, second.version.number) == (1, 2)
    assert [first.load()(), second.load()()] == [1, 2]
    assert [zerocopy.lookup(name).load()(), zerocopy.lookup(name, alias="canary").load()()] == [2, 2]
    pinned, latest, canary = (
        zerocopy.lookup(name, version=1),
        zerocopy.lookup(name),
        zerocopy.lookup(name, alias="canary"),
    )
    assert zerocopy.set_alias(name, "latest", version=1).number == 1
    assert [handle.load()() for handle in (pinned, latest, canary)] == [1, 1, 2]
    zerocopy.set_alias(name, "latest", to="canary")
    assert [handle.load()() for handle in (pinned, latest, canary)] == [1, 2, 2]
    assert zerocopy.publish(numbered(3), name=name).version.number == 3
    assert [handle.load()() for handle in (pinned, latest, canary)] == [1, 3, 2]


def test_equal_content_is_the_version_that_exists(name: str) -> None:
    """Equal weights and copied fields are no new version; other copied fields are a new version that stores no weights again."""
    search = pipelines.search(width=512)
    version = zerocopy.publish(search, name=name).version
    assert zerocopy.publish(search, name=name).version == version
    assert zerocopy.publish(pipelines.search(width=512), name=name).version == version
    assert zerocopy.publish(zerocopy.lookup(name).load(), name=name).version == version
    before = bytes_in_store()
    search.top_k = 9
    assert zerocopy.publish(search, name=name).version.number == version.number + 1
    assert zerocopy.lookup(name).load().top_k == 9
    assert bytes_in_store() - before < 100_000
    search.top_k = 5
    assert zerocopy.publish(search, name=name).version == version
    assert zerocopy.lookup(name).load().top_k == 5  # "latest" points at the first version again


def test_what_is_copied_is_told_apart_to_the_last_bit(name: str) -> None:
    """Copied fields that differ in one bit of a number, in the type of a value or in the storage of a tensor are two versions."""
    first, second = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 3, 4, 5])
    settings: list[Any] = [
        [first[:2].clone()[:1], first[2:].clone()[:1]],
        [second[:3].clone()[:1], second[3:].clone()[:1]],
        [0.0], [-0.0], [0], [False], [float("nan")], [-float("nan")], [10**5000], ["a"], [b"a"], [{1}], [frozenset([1])],
    ]  # fmt: skip
    for number, value in enumerate(settings, 1):
        search = pipelines.search(width=64, settings={"value": value})
        assert zerocopy.publish(search, name=name, keep=len(settings)).version.number == number


def test_equal_content_takes_what_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing equal content again records its `source`; required isolation makes a new version, whose readers must isolate."""
    search = numbered(3)
    assert zerocopy.publish(search, name=name).version.number == 1
    assert zerocopy.publish(search, name=name, source=lambda: numbered(3)).version.number == 1
    assert [one.source for one in zerocopy.publications() if one.version.name == name] == [True]
    monkeypatch.setenv("ZEROCOPY_REQUIRE_ISOLATION", "1")
    assert zerocopy.publish(search, name=name).version.number == 2
    assert zerocopy.lookup(name).requires_isolation


SET = """
import sys
import ray, torch, zerocopy, pipelines
ray.init(sys.argv[1], log_to_driver=False)
search = pipelines.search(width=64, settings={"words": {"one", "two", "three", ("four", 4)}, "code": compute})
print(zerocopy.publish(search, name=sys.argv[2]).version.number)
"""


@pytest.mark.long
def test_equal_content_of_other_processes(name: str, address: str) -> None:
    """Equal sets and equal classes pickled by value are one version, though each process pickles them differently."""
    source = "class Code: top = 5\ncompute = Code()\n" + SET
    runs = [run_python(source, "-", address, name, PYTHONHASHSEED=seed) for seed in ("1", "2", "3")]
    assert [run.stdout.strip() for run in runs] == ["1", "1", "1"], runs[-1].stderr
    changed = run_python(source.replace("top = 5", "top = 6"), "-", address, name)
    assert changed.stdout.strip() == "2", changed.stderr


def test_a_version_costs_what_changed(name: str) -> None:
    """Storages that the cluster has under any name are not stored again."""
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(512, 512) for _ in range(20)])
    nbytes = sum(parameter.nbytes for parameter in base.parameters())
    start = bytes_in_store()
    zerocopy.publish(base, name=name)
    assert wait_until(lambda: bytes_in_store() - start < 1.02 * nbytes + 200_000, 10)
    once = bytes_in_store() - start
    for number in range(10):  # ten fine-tunings of one base, each under its own name
        with torch.no_grad():
            base[-1].weight.fill_(number)
        zerocopy.publish(base, name=f"{name}-{number}")
    assert wait_until(lambda: bytes_in_store() - start < once + 10 * (base[-1].weight.nbytes + 200_000), 10)
    assert [zerocopy.lookup(f"{name}-{n}").load()[-1].weight[0, 0].item() for n in range(10)] == list(range(10))
    assert torch.equal(zerocopy.lookup(f"{name}-3").load()[0].weight, base[0].weight)


class Parts(nn.Module):
    """Parts of equal size and different content, which can be changed one by one."""

    def __init__(self, count: int, nbytes: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.full((nbytes // 4,), float(index)) for index in range(count)])

    @torch.no_grad()
    def change(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.parts[index] += 1000


def test_a_version_writes_no_more_than_what_changed(name: str, store_use: Callable[[], int]) -> None:
    """If a version changes storages in several shards, the other storages of these shards are not stored again."""
    model = Parts(40, 1 << 20)
    zerocopy.publish(model, name=name)
    model.change([0, 6])
    zerocopy.publish(model, name=name)
    assert wait_until(lambda: 42 << 20 <= store_use() < (42 << 20) + 1_000_000, 10)


def test_many_versions_take_little_room(name: str, store_use: Callable[[], int]) -> None:
    """Storages of superseded versions leave the store; a shard with too many of them is rewritten without them."""
    chosen = random.Random(0)
    model = Parts(64, 128 << 10)
    nbytes = 64 * (128 << 10)
    for _ in range(40):
        model.change(chosen.sample(range(64), 3))
        zerocopy.publish(model, name=name)
    assert wait_until(lambda: store_use() < 1.6 * nbytes, 10)
    loaded = zerocopy.lookup(name).load(verify=True)
    assert all(torch.equal(*pair) for pair in zip(loaded.parts, model.parts, strict=True))


def test_a_lookup_and_a_load_ask_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load right after a lookup reuses the registry's answer, unless this process changed the name in between."""
    monkeypatch.setattr(handles, "ANSWER_SECONDS", 5)
    for number in (1, 2, 3):
        zerocopy.publish(numbered(number), name=name)
    asked: list[str] = []
    submit = client.submit
    monkeypatch.setattr(client, "submit", lambda actor, *args: asked.append(args[0]) or submit(actor, *args))
    assert zerocopy.lookup(name).load()() == 3
    assert [method for method in asked if method != "poll"] == ["resolve"]
    found, gone = zerocopy.lookup(name), zerocopy.lookup(name, version=1)
    zerocopy.set_alias(name, "latest", version=2)
    zerocopy.remove(name, version=1)
    assert found.load()() == 2
    with pytest.raises(NotPublishedError):
        gone.load()


@pytest.mark.long
def test_what_was_looked_up_keeps_nothing(name: str, store_use: Callable[[], int]) -> None:
    """After use, a handle that follows an alias keeps no version, so the memory of removed versions is freed."""
    zerocopy.publish(numbered(1), name=name)
    looked_up = [zerocopy.lookup(name) for _ in range(4)]
    looked_up[0].load()
    ask(looked_up[1])
    actor = Asked.remote(looked_up[2])
    assert ray.get(actor.ask.remote()) == looked_up[3].current()() == 1
    zerocopy.remove(name)
    ray.kill(actor)
    looked_up[3].close()
    assert wait_until(lambda: store_use() <= 0, 20)
    with pytest.raises(NotPublishedError):
        looked_up[0].load()


def test_what_no_version_needs_goes(name: str, store_use: Callable[[], int]) -> None:
    """`keep` superseded versions stay, and all versions with an alias; the memory of others is freed with their last reader."""
    for number in range(1, 6):
        zerocopy.publish(numbered(number), name=name)
    assert numbers(name) == [3, 4, 5]
    reader = zerocopy.lookup(name, version=3).load()
    zerocopy.set_alias(name, "stable", version=4)
    zerocopy.publish(numbered(6), name=name, keep=0)
    assert numbers(name) == [4, 6]
    assert (reader(), zerocopy.lookup(name, alias="stable").load()()) == (3, 4)
    with pytest.raises(NotPublishedError, match=r"has no version 3. Hint: its versions are 4 \(stable\), 6 \(latest\)"):
        zerocopy.lookup(name, version=3)
    del reader
    zerocopy.remove(name)
    assert wait_until(lambda: store_use() <= 0, 20)


def test_removing(name: str) -> None:
    """Readers keep their version, numbers continue to count up, and a version with an alias cannot be removed."""
    publication = zerocopy.publish(numbered(1), name=name)
    zerocopy.publish(numbered(2), name=name)
    reader, handle = publication.load(), zerocopy.lookup(name, version=1)
    with pytest.raises(VersionInUseError, match="'latest' points at it"):
        zerocopy.remove(name, version=2)
    zerocopy.remove(name, version=1)
    with pytest.raises(NotPublishedError, match="no version 1"):
        handle.load()
    assert publication.load()() == 1  # this handle still holds a reference
    assert reader() == 1
    zerocopy.remove(name)
    with pytest.raises(NotPublishedError, match="No publication has the name"):
        zerocopy.lookup(name)
    with pytest.raises(NotPublishedError):
        zerocopy.remove(name)
    assert zerocopy.publish(numbered(3), name=name).version.number == 3


def test_expecting_a_version(name: str) -> None:
    """`expect` refuses a publication if "latest" is another version, and changes nothing; of two at once, one is refused."""
    zerocopy.publish(numbered(1), name=name, expect=0)
    with pytest.raises(
        VersionConflictError, match="has version 1 as 'latest', but expect=0 asks for no version"
    ) as refused:
        zerocopy.publish(numbered(2), name=name, expect=0)
    assert (refused.value.expected, refused.value.found) == (0, 1)
    with pytest.raises(VersionConflictError):
        zerocopy.publish(numbered(2), name=name, adopt=True, expect=5)
    assert numbers(name) == [1]
    results: list[Any] = []

    def publish(number: int) -> None:
        try:
            results.append(zerocopy.publish(numbered(number), name=name, expect=1).version.number)
        except VersionConflictError as error:
            results.append(error)

    threads = [threading.Thread(target=publish, args=[number]) for number in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(result, VersionConflictError) for result in results) == [False, True]
    assert numbers(name) == [1, 2]


PUBLISH = """
import sys
import ray, zerocopy
from versions import numbered
ray.init(sys.argv[1], log_to_driver=False)
print(zerocopy.publish(numbered(int(sys.argv[3])), name=sys.argv[2]).version.number)
"""


def test_named_weights_outlive_their_driver(name: str, address: str) -> None:
    """Named weights stay after their driver ends, and two drivers that publish at the same time get two versions."""
    assert run_python(PUBLISH, "-", address, name, "1").stdout.strip() == "1"
    found = zerocopy.lookup(name).load()
    assert found() == 1
    assert_zero_copy(found)
    runs: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: runs.append(run_python(PUBLISH, "-", address, name, str(n)).stdout.strip()))
        for n in (2, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(runs) == ["2", "3"]
    assert {zerocopy.lookup(name, version=number).load()() for number in (2, 3)} == {2, 3}


MAIN = """
import sys
import ray, torch, zerocopy
from torch import nn
from zerocopy import copied, shared
ray.init(sys.argv[1], log_to_driver=False)

@zerocopy.pipeline
class Mine:
    net: nn.Module = shared()
    number: int = copied()
    def __call__(self):
        return self.number * self.net.weight[0, 0].item()

net = nn.Linear(300, 300)
with torch.no_grad():
    net.weight.fill_(float(sys.argv[3]))
old = zerocopy.lookup(sys.argv[2]).load() if sys.argv[4] == "refresh" else None
version = zerocopy.publish(Mine(net=net, number=int(sys.argv[3])), name=sys.argv[2]).version.number
if old is not None:
    before = old()
    print(before, zerocopy.refresh(old), old())
print(version, zerocopy.lookup(sys.argv[2]).load()())
"""


@pytest.mark.long
def test_classes_of_main(name: str, address: str) -> None:
    """Classes of two drivers' `__main__` modules are two versions, and every process can load both."""
    first = run_python(MAIN, "-", address, name, "2", "")
    assert first.stdout.split() == ["1", "4.0"], first.stderr
    second = run_python(MAIN, "-", address, name, "3", "refresh")
    assert second.stdout.split() == ["4.0", "True", "9.0", "2", "9.0"], second.stderr
    assert [zerocopy.lookup(name, version=number).load()() for number in (1, 2)] == [4.0, 9.0]


TIED = """
import sys
import ray, zerocopy
from versions import numbered
ray.init(sys.argv[1], log_to_driver=False)
zerocopy.publish(numbered(1), name=sys.argv[2], lifetime="job")
print(zerocopy.lookup(sys.argv[2]).load()())
"""


@pytest.mark.long
def test_a_name_can_end_with_its_job(name: str, address: str, store_use: Callable[[], int]) -> None:
    """With `lifetime="job"` a name is removed when the publisher's job ends."""
    tied = run_python(TIED, "-", address, name)
    assert tied.stdout.strip() == "1", tied.stderr
    assert wait_until(lambda: name not in zerocopy.publications().names, 20)
    assert wait_until(lambda: store_use() <= 0, 20)


def test_handles_travel_by_name(name: str) -> None:
    """Named handles travel in plain pickle, closures and arguments of tasks, without an object reference."""
    publication = zerocopy.publish(numbered(4), name=name)
    following = zerocopy.lookup(name)
    for handle in (publication, following, zerocopy.lookup(name, version=1)):
        pickled = pickle.dumps(handle)
        assert len(pickled) < 1000
        assert pickle.loads(pickled).load()() == 4
        assert ray.cloudpickle.loads(ray.cloudpickle.dumps(handle)).load()() == 4

    @ray.remote
    def captured() -> tuple[int, int]:
        return publication.load()(), following.load()()

    @ray.remote
    def given(handles: list[Any]) -> list[int]:
        return [handle.load()() for handle in handles]

    assert ray.get(captured.remote()) == (4, 4)
    assert ray.get(given.remote([publication, following])) == [4, 4]
    assert [ask(handle) for handle in (publication, following)] == [4, 4]
    assert list(ask.map([publication, following])) == [4, 4]
    assert ask.local(following) == 4


def test_an_instance_that_has_a_name_travels_by_it(name: str) -> None:
    """A closure may capture an instance with a name, also where captured references are forbidden."""
    search = pipelines.search(width=64)
    zerocopy.publish(search, name=name)
    loaded = zerocopy.lookup(name).load()
    search.top_k = 7

    @ray.remote
    def captured() -> tuple[int, int, Any]:
        return search.top_k, loaded.top_k, zerocopy.version_of(search)

    assert ray.get(captured.remote()) == (7, 5, zerocopy.version_of(search))
    with torch.no_grad():
        search.index.add_(1)
    assert zerocopy.version_of(search) is not None
    assert ray.get(pipelines.plain_answer.remote(search, 1.0)) == search(1.0)  # as an argument, with its own weights
    assert zerocopy.version_of(search) is None


def test_versions_of_live_pipelines(name: str) -> None:
    """`version_of` returns name, number and digest of a pipeline that has a name, and None for other pipelines."""
    search = numbered(1)
    assert zerocopy.version_of(search) is None
    version = zerocopy.publish(search, name=name).version
    assert (version.name, version.number, len(version.digest)) == (name, 1, 32)
    assert zerocopy.version_of(search) == zerocopy.version_of(zerocopy.lookup(name).load()) == version
    assert zerocopy.version_of(zerocopy.publish(numbered(1)).load()) is None

    @zerocopy.task(num_cpus=0.1)
    def version_there(search: Numbered) -> Any:
        return zerocopy.version_of(search)

    assert [version_there(zerocopy.lookup(name)) for _ in range(3)] == [version] * 3
    assert version_there(search) == version


def test_adopting_under_a_name(name: str, store_use: Callable[[], int]) -> None:
    """The publisher's tensors become views of the store, and a later write stays in the publisher."""
    search = numbered(5, width=600)
    zerocopy.publish(search, name=name, adopt=True)
    assert_zero_copy(search)
    assert search() == zerocopy.lookup(name).load()() == 5
    with torch.no_grad():
        search.encoder[0].weight.zero_()
    assert (search(), zerocopy.lookup(name).load()()) == (-1, 5)
    again = zerocopy.publish(search, name=name, adopt=True)
    assert again.version.number == 2
    assert torch.equal(again.load().encoder[0].weight, torch.zeros(600, 600))
    zerocopy.remove(name)
    del search, again
    assert wait_until(lambda: store_use() <= 0, 20)


def test_the_table(name: str) -> None:
    """`publications()` lists names, versions, aliases, bytes, nodes, age and source; it prints as a table and as HTML."""
    zerocopy.publish(numbered(1), name=name, source=lambda: numbered(1))
    zerocopy.publish(numbered(2), name=name, alias="canary")
    listed = [one for one in zerocopy.publications() if one.version.name == name]
    assert [one.version.number for one in listed] == [1, 2]
    assert [one.aliases for one in listed] == [(), ("canary", "latest")]
    assert [one.source for one in listed] == [True, False]
    assert all(one.kind == "Numbered" and one.nodes == (ray.get_runtime_context().get_node_id(),) for one in listed)
    assert all(0 <= one.age < 60 and one.shared_bytes > 250_000 for one in listed)
    table = str(zerocopy.publications())
    assert all(word in table for word in (name[:20], "canary, latest", "Numbered"))
    assert ">Numbered</td>" in zerocopy.publications()._repr_html_()


def test_verifying_what_is_loaded(name: str) -> None:
    """`verify=True` compares digests, and so finds overwritten bytes; a publication without a name has no digests."""
    publication = zerocopy.publish(numbered(1), name=name)
    assert publication.load(verify=True)() == 1
    assert publication.load(fields=["encoder"], verify=True).encoder[0].weight[0, 0] == 1
    with pytest.raises(ArgumentError, match="verify=True needs digests"):
        zerocopy.publish(numbered(1)).load(verify=True)
    import ctypes

    from zerocopy._store.mapping import start_of
    from zerocopy._store.read import buffers_of, manifest_of

    manifest = manifest_of(publication.reference)
    shard, buffer, offset, _ = manifest.location_rows[0]
    memory = buffers_of(manifest.shard(shard))[buffer]  # Ray's own mapping, which is writable
    ctypes.memset(start_of(memory) + offset, 255, 1)
    with pytest.raises(CorruptedError, match="1 of 9 storages have other bytes") as found:
        zerocopy.lookup(name).load(verify=True)
    assert found.value.storages == [0]


def test_little_room_is_told_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning reports that the store has too little free memory for a publication; Ray itself would write to disk silently."""
    from zerocopy._store import object_store

    monkeypatch.setattr(object_store, "_warned", set())
    held = ray.put(np.zeros(STORE_BYTES // 8 - 2_000_000))
    assert len(ray.get(held)) > 0
    with pytest.warns(UserWarning, match=r"take [\d,]+ bytes more, but the object store of this node has [\d,]+ free"):
        zerocopy.publish(numbered(1, width=2000), name=name)
    assert zerocopy.lookup(name).load()() == 1
    del held
    assert wait_until(lambda: bytes_in_store() < STORE_BYTES / 2, 20)


def test_closing_a_named_handle_removes_nothing(name: str) -> None:
    """Closing affects only that handle; the name and its versions stay."""
    with zerocopy.publish(numbered(1), name=name) as publication:
        pass
    assert publication.closed
    with pytest.raises(PublicationClosedError):
        publication.load()
    with pytest.raises(PublicationClosedError):
        publication.current()
    assert zerocopy.lookup(name).load()() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alias": "canary"}, "alias= is for publications with a name"),
        ({"keep": 3}, "keep= is for publications with a name"),
        ({"source": numbered}, "source= is for publications with a name"),
        ({"expect": 0}, "expect= is for publications with a name"),
        ({"lifetime": "job"}, "lifetime= is for publications with a name"),
        ({"name": ""}, "name='' is not a name"),
        ({"name": 3}, "name=3 is not a name"),
        ({"name": "n", "alias": ""}, "alias='' is not an alias"),
        ({"name": "n", "keep": -1}, "keep=-1 is not a number of versions"),
        ({"name": "n", "expect": "1"}, "expect='1' is not the number of a version"),
        ({"name": "n", "lifetime": "for ever"}, "lifetime='for ever' is unknown"),
        ({"name": "n", "source": "build"}, "source='build' cannot be called"),
        ({"name": "n", "source": nn.Linear(1, 1)}, "source= got a Linear, not a function that makes it"),
        ({"name": "n", "source": nn.Linear}, "needs arguments: missing a required argument: 'in_features'"),
        ({"adopt": "no"}, "adopt='no' is neither True nor False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], words: str) -> None:
    """An error names the wrong argument before anything is stored."""
    with pytest.raises(ArgumentError, match=words):
        zerocopy.publish(numbered(1), **arguments)
    assert "n" not in zerocopy.publications().names


def test_other_mistakes(name: str) -> None:
    """Missing names, aliases and versions, contradictory arguments and values that cannot be pickled each get a clear error."""
    with pytest.raises(NotPublishedError, match="publish it with zerocopy.publish\\(..., name='nobody'\\)"):
        zerocopy.lookup("nobody")
    zerocopy.publish(numbered(1), name=name)
    with pytest.raises(ArgumentError, match=f"has positions, not the key '{name}'.*lookup"):
        zerocopy.publications()[name]
    with pytest.raises(NotPublishedError, match="has no alias 'canary'"):
        zerocopy.lookup(name, alias="canary")
    with pytest.raises(ArgumentError, match="an alias or a version, got both"):
        zerocopy.lookup(name, alias="canary", version=1)
    with pytest.raises(ArgumentError, match="a version or an alias to point at, got none"):
        zerocopy.set_alias(name, "canary")
    for wrong in (
        lambda: zerocopy.lookup(name, version="1"),  # type: ignore[call-overload]
        lambda: zerocopy.set_alias(name, "canary", version="1"),  # type: ignore[arg-type]
        lambda: zerocopy.remove(name, version="1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError, match="version='1' is not the number of a version"):
            wrong()
    with pytest.raises(NotPublishedError, match="has no version 9") as missing:
        zerocopy.set_alias(name, "canary", version=9)
    assert (missing.value.name, missing.value.versions) == (name, [1])
    broken = pipelines.search(width=64, settings={"lock": threading.Lock()})
    with pytest.raises(CannotTravelError, match=r"search\.settings\['lock'\]"):
        zerocopy.publish(broken, name=name)
    assert numbers(name) == [1]
