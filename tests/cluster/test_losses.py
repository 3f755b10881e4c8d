"""After a kill at any point: is no partial version visible, is no memory left over, and do weights come back where they can?"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import run_python, wait_until
from registries import kill_registry
from reliability import fault
from safetensors.torch import save_file
from torch import nn
from versions import Asked, Following, Numbered, ask, numbered

import zerocopy
from zerocopy._cluster import client, writing
from zerocopy._compat.linux import SharedMemory
from zerocopy.errors import NotPublishedError, PublicationLostError

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]
KIND = "Publishers, drivers and the registry"

KILLED = """
import os, sys
import ray, torch, zerocopy
from zerocopy._cluster import client, writing
from versions import numbered
ray.init(sys.argv[1], log_to_driver=False)
when, commit = sys.argv[3], writing.Named.commit_with

def killed(self, shards):
    if when == "before":
        os.kill(os.getpid(), 9)
    submit = client.submit
    def submit_and_die(actor, method, *args):
        submit(actor, method, *args)
        os.kill(os.getpid(), 9)
    client.submit = submit_and_die
    return commit(self, shards)

writing.Named.commit_with = killed
zerocopy.publish(numbered(2, width=700), name=sys.argv[2])
"""


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_publisher_killed(name: str, address: str, when: str, store_use: Callable[[], int]) -> None:
    """A publisher killed before its commit leaves nothing; during the commit it leaves a complete version or none."""
    zerocopy.publish(numbered(1), name=name)
    assert run_python(KILLED, "-", address, name, when).returncode == -signal.SIGKILL
    with fault(KIND, f"A publisher under a name is killed {when} its commit") as told:
        time.sleep(1)
        versions = [one.version.number for one in zerocopy.publications() if one.version.name == name]
        assert versions == [1] if when == "before" else versions in ([1], [1, 2])
        assert zerocopy.lookup(name).load()() == versions[-1]
        zerocopy.remove(name)
        assert wait_until(lambda: store_use() <= 0)
        seen = "the previous version" if when == "before" else "the complete new version or the complete previous one"
        told.result = f"{seen}; nothing is left in the store after the name is removed"


def test_a_registry_killed_while_something_is_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher starts again with the next registry, with and without `adopt=True`."""
    commit = writing.Named.commit_with
    killed: list[int] = []

    def kill_first(self: Any, shards: Any) -> Any:
        if not killed:
            killed.append(1)
            kill_registry()
        return commit(self, shards)

    monkeypatch.setattr(writing.Named, "commit_with", kill_first)
    for number, adopt in ((1, False), (2, True)):
        killed.clear()
        search = numbered(number)
        how = "adopted" if adopt else "published"
        with fault(KIND, f"The registry is killed while something is {how} under a name") as told:
            assert zerocopy.publish(search, name=name, adopt=adopt).version.number == number
            assert zerocopy.lookup(name).load(verify=True)() == search() == number
            told.result = "the version, from the next registry"


def kill_after(patch: pytest.MonkeyPatch, method: str, then: Callable[[], object] = lambda: None) -> None:
    """Kill the registry once, after it ran `method` and before the caller gets its answer."""
    submit, killed = client.submit, []

    def submit_and_kill(actor: Any, asked: str, *args: Any) -> Any:
        reply = submit(actor, asked, *args)
        if asked == method and not killed:
            ray.wait([reply])
            killed.append(kill_registry())
            then()
            return submit(actor, asked, *args)  # to the dead registry
        return reply

    patch.setattr(client, "submit", submit_and_kill)


def test_a_registry_killed_after_the_commit_was_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher commits again and gets the same version."""
    kill_after(monkeypatch, "commit")
    assert zerocopy.publish(numbered(1), name=name).version.number == 1
    assert [one.version.number for one in zerocopy.publications() if one.version.name == name] == [1]
    assert zerocopy.lookup(name).load()() == 1


def test_a_commit_that_is_repeated_moves_no_alias_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alias "latest" stays on a newer version that another publisher committed in between."""
    kill_after(monkeypatch, "commit", lambda: zerocopy.publish(numbered(2), name=name))
    assert zerocopy.publish(numbered(1), name=name).version.number == 1
    assert zerocopy.lookup(name).version.number == 2
    assert zerocopy.lookup(name).load()() == 2


def test_a_registry_killed_after_it_removed_a_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that is repeated succeeds; to remove a name that does not exist is still an error."""
    zerocopy.publish(numbered(1), name=name)
    kill_after(monkeypatch, "remove")
    zerocopy.remove(name)
    with pytest.raises(NotPublishedError):
        zerocopy.remove(name)


def build_counted(path: str) -> Numbered:
    with Path(path).open("a") as file:
        file.write("x")
    time.sleep(0.5)
    return numbered(71, width=300)  # no other test has these weights mapped and could give them back


def test_a_source_runs_once_for_all_who_ask(name: str, tmp_path: Path) -> None:
    """If many callers need lost weights at once, the source runs once and restores the version with the same number."""
    ran = tmp_path / "ran"
    version = zerocopy.publish(build_counted(str(ran)), name=name, source=lambda: build_counted(str(ran))).version
    handle = zerocopy.lookup(name)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(handle.load())) for _ in range(6)]
    with fault(
        KIND, "The registry is killed; no process has the weights, they have a source, and six callers ask at once"
    ) as told:
        kill_registry()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told.result = "the same version for all six; the source runs once"
    assert [answer() for answer in answers] == [71] * 6
    assert {zerocopy.version_of(answer) for answer in answers} == {version}
    assert ran.read_text() == "xx"  # one run in this test, one run for all callers
    assert handle.load(verify=True)() == 71


def test_a_source_whose_bytes_have_changed(name: str, tmp_path: Path) -> None:
    """A source that returns other weights causes a clear error, never a mixture of two versions."""
    value = tmp_path / "value"
    value.write_text("1")

    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
        with torch.no_grad():
            module[0].weight.fill_(1)
            module[1].weight.fill_(float(value.read_text()))
            module[0].bias.zero_()
            module[1].bias.zero_()
        return module

    zerocopy.publish(build(), name=name, source=build)
    handle = zerocopy.lookup(name)
    value.write_text("2")
    kill_registry()
    with pytest.raises(PublicationLostError, match=r"version 1 of .* are gone: its source gave other weights") as lost:
        handle.load()
    assert lost.value.reason == "no source"
    value.write_text("1")
    assert float(handle.load()[1].weight.detach()[0, 0]) == 1  # the source runs again
    assert zerocopy.publications().names.count(name) == 1


def test_a_source_that_fails(name: str) -> None:
    """The message of `PublicationLostError` contains the error of the source."""

    def build() -> nn.Module:
        raise RuntimeError("no such bucket")

    zerocopy.publish(numbered(55), name=name, source=build)
    kill_registry()
    with pytest.raises(PublicationLostError, match="its source failed: .*no such bucket"):
        zerocopy.lookup(name).load()


def test_a_checkpoint_comes_back(name: str, tmp_path: Path, store_use: Callable[[], int]) -> None:
    """Lost weights of a checkpoint are read from its files again, but not from changed files, and are not stored twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400))

    publication = zerocopy.publish_checkpoint(build, tmp_path / "*.safetensors", name=name, alias="files")
    assert publication.version.number == 1
    once = store_use()
    assert zerocopy.publish(model, name=f"{name}-live").load()[0].weight.equal(model[0].weight)
    assert wait_until(lambda: store_use() < once + 200_000, 10)
    zerocopy.remove(f"{name}-live")
    kill_registry()
    assert zerocopy.lookup(name, alias="files").load(verify=True)[1].weight.equal(model[1].weight)
    changed = {key: value + 1 for key, value in model.state_dict().items()}
    publication.close()
    del model  # else this model would give the weights back
    gc.collect()
    kill_registry()
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(PublicationLostError, match="its source gave other weights"):
        zerocopy.lookup(name).load()


def test_a_publisher_gives_back(name: str) -> None:
    """Lost weights are restored from the publisher's own pipeline, unless that pipeline has changed."""
    search = numbered(22)
    version = zerocopy.publish(search, name=name).version
    kill_registry()
    assert zerocopy.version_of(zerocopy.lookup(name).load(verify=True)) == version
    with torch.no_grad():
        search.table.zero_()
    gc.collect()  # else the loaded pipeline would give the table back
    kill_registry()
    with pytest.raises(PublicationLostError, match="no process that runs holds all"):
        zerocopy.lookup(name).load()


IN_ENVIRONMENT = """
import sys
import ray, zerocopy
ray.init(sys.argv[1], log_to_driver=False, runtime_env={"env_vars": {"NUMBER_OF_THE_SOURCE": "5"}})

def build():
    import os
    from versions import numbered
    return numbered(int(os.environ["NUMBER_OF_THE_SOURCE"]))

@ray.remote
def publish(name):
    return zerocopy.publish(build(), name=name, source=build).version.number

print(ray.get(publish.remote(sys.argv[2])))
"""


def test_a_source_runs_in_the_environment_of_its_publisher(name: str, address: str) -> None:
    """This holds also after the publisher and its job have ended."""
    done = run_python(IN_ENVIRONMENT, "-", address, name)
    assert done.stdout.strip() == "1", done.stderr
    kill_registry()
    assert zerocopy.lookup(name).load(verify=True)() == 5


def test_an_instance_is_never_joined_with_another_version(name: str) -> None:
    """The copied fields of one version are only used with the weights of that version; if those are gone, it is an error."""
    zerocopy.publish(numbered(1), name=name)
    loaded = zerocopy.lookup(name).load()
    pickled = ray.cloudpickle.dumps(loaded)
    assert ray.cloudpickle.loads(pickled)() == 1
    zerocopy.publish(numbered(2), name=name, keep=0)
    with pytest.raises(NotPublishedError, match="no version 1"):
        ray.cloudpickle.loads(pickled)


def test_publishing_goes_on_after_a_loss(name: str) -> None:
    """Right after the registry was killed, a process can publish pipelines without a name, also one that had a name before."""
    search = numbered(44)
    zerocopy.publish(search, name=name)
    assert ask(search) == 44
    kill_registry()
    assert zerocopy.publish(search).load()() == zerocopy.publish(numbered(45)).load()() - 1 == 44
    assert ask(search) == 44


def test_a_source_that_fails_hides_no_holder(name: str) -> None:
    """Weights that a process has mapped come back, also if the source now returns other weights."""
    zerocopy.publish(numbered(46), name=name, source=lambda: numbered(47))
    held = zerocopy.lookup(name).load()
    gc.collect()
    kill_registry()
    assert zerocopy.lookup(name).load(verify=True)() == held() == 46


def test_living_holders_give_back(name: str) -> None:
    """Without a source, actors that have the weights mapped continue to work and give back the published bytes."""
    publication = zerocopy.publish(numbered(3, width=300), name=name)
    following, asked = Following.remote(publication), Asked.remote(publication)
    assert ray.get([following.ask.remote(), asked.ask.remote()]) == [3, 3]
    publication.close()
    with fault(KIND, "The registry is killed; actors have the weights mapped") as told:
        kill_registry()
        assert ray.get([following.ask.remote(), asked.ask.remote()]) == [3, 3]
        found = zerocopy.lookup(name).load(verify=True)
        told.result = "the actors go on, and upload the weights for a new `load()`"
    assert found() == 3
    zerocopy.publish(numbered(4, width=300), name=name)
    assert wait_until(lambda: ray.get(asked.ask.remote()) == 4 == ray.get(following.ask.remote()), 20)


@ray.remote(num_cpus=0)
class Holder:
    """Holds a version; with `ends` it is killed when it uploads weights, else it lets other holders go first."""

    def __init__(self, name: str, *, ends: bool) -> None:
        self._loaded, submit = zerocopy.lookup(name).load(), client.submit

        def end_or_wait(actor: Any, method: str, *args: Any) -> Any:
            if ends and method == "store":
                os.kill(os.getpid(), signal.SIGKILL)
            if not ends and method == "poll":
                time.sleep(2)
            return submit(actor, method, *args)

        client.submit = end_or_wait

    def ask(self) -> int:
        answer: int = self._loaded()
        return answer


def test_a_holder_killed_while_it_gives_back(name: str) -> None:
    """Another holder gives the same weights back."""
    zerocopy.publish(numbered(48, width=300), name=name)
    first, second = Holder.remote(name, ends=True), Holder.remote(name, ends=False)
    assert ray.get([first.ask.remote(), second.ask.remote()]) == [48, 48]
    gc.collect()
    with fault(KIND, "The registry is killed, and then a process that uploads weights to the next registry") as told:
        kill_registry()
        assert zerocopy.lookup(name).load(verify=True)() == 48
        told.result = "the right answer: another process uploads them"
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(first.ask.remote())


def test_the_rest_is_lost_in_clear_words(name: str) -> None:
    """Weights without a source and a holder are lost with a clear error; publishing the same weights again repairs the name."""
    zerocopy.publish(numbered(33), name=name)
    handle = zerocopy.lookup(name)
    with fault(KIND, "The registry is killed; no process has the weights, and they have no source") as told:
        kill_registry()
        with pytest.raises(
            PublicationLostError, match=r"no source, and no process that runs holds all of its weights.*source="
        ):
            handle.load()
        told.result = "`PublicationLostError` (no source)"
    (listed,) = [one for one in zerocopy.publications() if one.version.name == name]
    assert listed.nodes == ()
    assert zerocopy.publish(numbered(33), name=name).version == listed.version
    assert handle.load()() == 33


def test_numbers_and_aliases_survive_the_registry(name: str) -> None:
    """They are stored in Ray's control plane."""
    for number in (1, 2, 3):
        zerocopy.publish(
            numbered(number), name=name, alias=f"alias-{number}", source=lambda number=number: numbered(number)
        )
    zerocopy.set_alias(name, "latest", version=2)
    kill_registry()
    listed = {one.version.number: one.aliases for one in zerocopy.publications() if one.version.name == name}
    assert listed == {1: ("alias-1",), 2: ("alias-2", "latest"), 3: ("alias-3",)}
    assert zerocopy.lookup(name).load()() == 2
    assert zerocopy.publish(numbered(4), name=name).version.number == 4


DETACHED = """
import sys
import ray, zerocopy
from versions import Following, Asked, numbered
ray.init(sys.argv[1], namespace="detached", log_to_driver=False)
search = numbered(6)
publication = zerocopy.publish(search, name=sys.argv[2])
options = {"lifetime": "detached", "max_restarts": 3}
actors = [
    Following.options(name="followed", **options).remote(publication),
    Following.options(name="instance", **options).remote(search),
    Asked.options(name="asked", **options).remote(zerocopy.lookup(sys.argv[2])),
]
@ray.remote(num_cpus=0.1, **options)
class Plain:
    def __init__(self, search, handles):
        self.search, self.handles = search, handles
    def ask(self):
        answers = {self.search(), *(handle.load()() for handle in self.handles)}
        return answers.pop() if len(answers) == 1 else -1
actors.append(Plain.options(name="plain").remote(search, [publication, zerocopy.lookup(sys.argv[2])]))
print(ray.get([actor.ask.remote() for actor in actors]))
"""


def test_restarted_actors_find_their_weights_by_name(name: str, address: str) -> None:
    """A detached actor that restarts after its driver ended finds its weights, if the pipeline that it received has a name."""
    started = run_python(DETACHED, "-", address, name)
    assert started.stdout.strip() == "[6, 6, 6, 6]", started.stderr
    actors = [ray.get_actor(one, "detached") for one in ("followed", "instance", "asked", "plain")]
    try:
        pids = [ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in actors]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for actor in actors:
            assert wait_until(lambda actor=actor: answer_of(actor) == 6, 60)
    finally:
        for actor in actors:
            ray.kill(actor)


def answer_of(actor: Any) -> int | None:
    try:
        return ray.get(actor.ask.remote())
    except ray.exceptions.ActorUnavailableError:
        return None


def test_removing_while_readers_read(name: str, store_use: Callable[[], int]) -> None:
    """Readers finish with their version, new readers get an error, and the memory is free after the last reader."""
    publication = zerocopy.publish(numbered(2, width=500), name=name)
    actors = [Asked.remote(publication) for _ in range(2)]
    assert ray.get([actor.ask.remote() for actor in actors]) == [2, 2]
    streams = [actor.stream.options(num_returns="streaming").remote(20) for actor in actors]
    zerocopy.remove(name)
    publication.close()
    assert [ray.get(one) for stream in streams for one in stream] == [2] * 40
    with pytest.raises(NotPublishedError):
        zerocopy.lookup(name)
    for actor in actors:
        ray.kill(actor)
    assert wait_until(lambda: store_use() <= 0, 20)


def test_a_task_that_may_not_look_into_the_publisher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the task runs as another user or in another container, the shard travels through the object store."""
    monkeypatch.setattr(SharedMemory, "path", property(lambda _: "/nowhere"))
    zerocopy.publish(numbered(1, width=600), name=name)
    assert zerocopy.lookup(name).load(verify=True)() == 1


@pytest.mark.parametrize("size", [1000, 10_000_000])
def test_a_path_that_means_another_memory(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    """In another container, the path of the publisher's memory may lead to other memory. Its bytes are never taken."""
    other = tmp_path / "other"
    other.write_bytes(bytes(size))
    monkeypatch.setattr(SharedMemory, "path", property(lambda _: str(other)))
    zerocopy.publish(numbered(1, width=600), name=name)
    assert zerocopy.lookup(name).load(verify=True)() == 1


def test_a_store_task_that_is_killed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task runs again, because the publisher's memory still exists."""
    submit, stopped = client.submit, []

    def kill_worker(actor: Any, method: str, *args: Any) -> Any:
        reply = submit(actor, method, *args)
        if method == "store" and not stopped:
            stopped.append(kill_store_task())
        return reply

    monkeypatch.setattr(client, "submit", kill_worker)
    with fault("Workers", "The process that stores a shard of 300 MB for the registry is killed") as told:
        zerocopy.publish(Large(), name=name)
        assert stopped == [True]
        assert zerocopy.lookup(name).load(verify=True).weight[-1].item() == 1
        told.result = "the version: the shard is stored again"


class Large(nn.Module):
    """A model with one storage that takes some time to store."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(75_000_000))


def kill_store_task() -> bool:
    """Kill the process that runs a store task as soon as one runs; whether one was found."""
    for _ in range(200):
        for process in psutil.process_iter(["cmdline"]):
            if any("ray::zerocopy.store" in part for part in process.info["cmdline"] or ()):
                process.kill()
                return True
    return False
