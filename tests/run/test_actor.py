"""Do actor classes start Ray actors and still work as plain classes?"""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import pipelines
import pytest
import ray
import ray.data
from conftest import run_python, wait_until

import zerocopy
from zerocopy._compat.ray import has_process
from zerocopy.errors import ArgumentError
from zerocopy.testing import assert_zero_copy

pytestmark = pytest.mark.usefixtures("cluster")


def test_still_a_plain_class() -> None:
    """`Worker(search)` makes an ordinary object without Ray, and the decorator returns the same class."""
    worker = pipelines.Worker(pipelines.search(width=8), limit=3)
    assert type(worker) is pipelines.Worker
    assert (worker.limit, worker.ask(1.0)) == (3, worker.pipeline(1.0))
    assert str(inspect.signature(pipelines.Worker.__init__)).startswith("(self, pipeline: 'Search', limit: 'int' = 10")


def test_starting_an_actor_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Ray does not warn about the class."""
    logger = logging.getLogger("ray")
    logger.addHandler(caplog.handler)
    try:

        @zerocopy.actor(num_cpus=0.1)
        class Quiet:
            def ask(self) -> int:
                return 1

        assert ray.get(Quiet.remote().ask.remote()) == 1
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if "overwrites" in record.getMessage()] == []


def test_remote_options_and_arguments() -> None:
    """An actor gets instances, modules and publications loaded, by position and by name, and every kind of method works."""
    search = pipelines.search(width=32)
    worker = pipelines.Worker.options(num_cpus=0.2, name="one").remote(zerocopy.publish(search), limit=4)
    assert isinstance(worker, ray.actor.ActorHandle)
    assert ray.get(worker.ask.remote(2.0)) == search(2.0)
    assert ray.get(worker.ask_async.remote(2.0)) == search(2.0)
    stream = worker.stream.options(num_returns="streaming").remote(2)
    assert [ray.get(ref) for ref in stream] == [search(0), search(1)]
    assert ray.get(ray.get_actor("one").pid.remote()) != os.getpid()
    with pytest.raises(ValueError, match="boom"):
        ray.get(worker.fail.remote("boom"))


def test_generated_init_and_typed_spelling() -> None:
    """A class without `__init__` gets one from its annotations; a subclass of `zerocopy.Actor` needs no decorator."""
    search = pipelines.search(width=32)
    assert pipelines.Annotated(search).limit == 3
    annotated, typed, louder = (
        pipelines.Annotated.remote(search, limit=5),
        pipelines.Typed.options(num_cpus=0.1).remote(search),
        pipelines.Louder.remote(search),
    )
    assert ray.get(annotated.ask.remote(1.0)) == search(1.0) + 5
    assert ray.get(typed.ask.remote(1.0)) == search(1.0)
    assert ray.get(louder.told.remote()) == ("Search", 99)


@pytest.mark.long
def test_inherited_inits_load_too() -> None:
    """An `__init__` inherited from a base class gets its arguments loaded."""

    class Base:
        def __init__(self, pipeline: Any) -> None:
            self.kind = type(pipeline).__name__

        def told(self) -> str:
            return self.kind

    @zerocopy.actor(num_cpus=0.1)
    class Derived(Base):
        pass

    class Mixed(Base, zerocopy.Actor):
        pass

    search = pipelines.search(width=8)
    actors = [Derived.remote(search), Mixed.options(num_cpus=0.1).remote(search)]
    assert ray.get([actor.told.remote() for actor in actors]) == ["Search", "Search"]
    with Derived.pool(1, search) as pool:
        assert list(pool.map("told", [])) == []


def test_pool() -> None:
    """A pool answers in order, uses all its actors, and each actor has its own view of one copy of the weights."""
    search = pipelines.search(width=64)
    with pipelines.Worker.pool(3, search) as pool:
        assert len(pool) == 3
        assert len(set(ray.get([actor.pid.remote() for actor in pool]))) == 3
        queries = [float(number) for number in range(10)]
        assert list(pool.map("ask", iter(queries))) == [search(query) for query in queries]
        assert list(pool.map(pipelines.Worker.ask, queries)) == [search(query) for query in queries]
        assert ray.get(zerocopy.typed(pool[0]).ask.remote(2.0)) == search(2.0)
        biases = ray.get([pool[0].bias.remote(5.0), pool[1].bias.remote(), pool[2].bias.remote()])
        assert biases[0] == pytest.approx(biases[1] + 5 * 64)
        assert biases[1] == biases[2]
        with pytest.raises(ArgumentError, match="Worker has no method 'asc'. Hint: did you mean 'ask'"):
            pool.map("asc", queries)
        with pytest.raises(ArgumentError, match="Worker has no method '<lambda>'"):
            pool.map(lambda worker, query: query, queries)
        with pytest.raises(
            ArgumentError, match=r"pool.map\('ask', items\) iterates `items`, which is 'str'. Hint: pass a list"
        ):
            pool.map("ask", "queries")
        with pytest.raises(AttributeError, match=r"Hint: write pool.map\('ask', items\), or pool\[0\].ask.remote"):
            pool.ask(2.0)
        assert not hasattr(pool, "shape")
        with pytest.raises(ValueError, match="first"):
            list(pool.map("fail", ["first", "second"]))
        assert "3 Worker actors" in repr(pool)
    pool.close()
    with pytest.raises(ArgumentError, match="was closed"):
        pool.map("ask", queries)


def test_a_pool_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the cluster has no room for all actors of a pool, a warning says how many still wait, and what to do."""
    monkeypatch.setattr("zerocopy._run.results.SLOW_SECONDS", 1.0)
    cpus = ray.cluster_resources()["CPU"]
    with pipelines.Worker.options(num_cpus=0.6 * cpus).pool(2, pipelines.search(width=8)) as pool:
        assert wait_until(lambda: any(map(has_process, pool)), 60)
        words = rf"1 of 2 Worker actors still wait .* has {cpus:g} CPU.*Hint: .*num_cpus=0.5"
        with pytest.raises(UserWarning, match=words):  # warnings are errors here, else the calls would wait forever
            list(pool.map("ask", [1.0, 2.0]))


def test_a_restarted_actor_loads_again() -> None:
    """An actor that Ray restarts has its pipeline, also after the publisher has dropped its own."""
    search = pipelines.search(width=64)
    expected = search(1.0)
    worker = pipelines.Worker.remote(search)
    first = ray.get(worker.pid.remote())
    del search
    os.kill(first, 9)
    for _ in range(20):
        try:
            second = ray.get(worker.pid.remote())
            break
        except ray.exceptions.ActorUnavailableError:
            continue
    assert second != first
    assert ray.get(worker.ask.remote(1.0)) == expected
    ray.kill(worker)  # with Python 3.14, Ray keeps the frame of an error, and so the actor


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray Data warns about its own settings
def test_ray_data() -> None:
    """`map_batches` takes an actor class, with a pipeline or a publication as an argument."""
    search = pipelines.search(width=32)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for given, size in ((search, 2), (zerocopy.publish(search), 1)):
        results = ray.data.from_items([{"query": float(number)} for number in range(8)]).map_batches(
            pipelines.Worker,
            fn_constructor_kwargs={"pipeline": given},
            compute=ray.data.ActorPoolStrategy(size=size),
            batch_size=4,
            num_cpus=0.5,
        )
        answers = sorted(row["answer"] for row in results.take_all())
        assert answers == pytest.approx(sorted(search(float(number)) for number in range(8)))


@pytest.mark.long
def test_subclasses_and_errors_of_init() -> None:
    """Ray's error contains the error of the actor's `__init__`."""

    @zerocopy.actor(num_cpus=0.1)
    class Picky:
        def __init__(self, pipeline: pipelines.Search) -> None:
            assert_zero_copy(pipeline)
            raise LookupError("not this one")

        def ask(self) -> None: ...

    with pytest.raises(ray.exceptions.ActorDiedError, match="not this one"):
        ray.get(Picky.remote(pipelines.search(width=8)).ask.remote())


def test_device_of_the_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor's pipelines are loaded on the device that its `device=` names."""

    @zerocopy.actor(device="cuda:7", num_cpus=0.1)
    class Remote:
        def __init__(self, pipeline: pipelines.Search) -> None:
            self.pipeline = pipeline

        def ask(self) -> None: ...

    with pytest.raises(ray.exceptions.ActorDiedError, match="This process has no device 'cuda:7'"):
        ray.get(Remote.remote(pipelines.search(width=8)).ask.remote())


@pytest.mark.long
def test_what_was_looked_up_arrives_with_its_version(name: str) -> None:
    """A pipeline that an actor gets from a named handle has the name, number and digest of its version."""
    version = zerocopy.publish(pipelines.search(width=64), name=name).version

    @zerocopy.actor(num_cpus=0.1)
    class Given:
        def __init__(self, followed: pipelines.Search, pinned: pipelines.Search) -> None:
            self.pipelines = followed, pinned

        def versions(self) -> list[Any]:
            return [zerocopy.version_of(pipeline) for pipeline in self.pipelines]

    actor = Given.remote(zerocopy.lookup(name), zerocopy.lookup(name, version=1))
    assert ray.get(actor.versions.remote()) == [version, version]


SERVE = """
import sys
import ray
from ray import serve
import pipelines, zerocopy, zerocopy.testing

ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
serve.start(proxy_location="Disabled")
search = pipelines.search(width=64)

@serve.deployment
@zerocopy.actor
class Deployed:
    def __init__(self, search: pipelines.Search):
        zerocopy.testing.assert_zero_copy(search)
        self.search = search
    async def __call__(self, query: float) -> float:
        return self.search(query)

try:
    for given in (search, zerocopy.publish(search)):
        handle = serve.run(Deployed.bind(given), route_prefix=None)
        print(handle.remote(2.0).result() == search(2.0))
except zerocopy.errors.OutOfBandError as error:
    print("refused", error)
serve.shutdown()
"""


@pytest.mark.long
@pytest.mark.alone  # Serve's controller pickles references too
def test_serve(address: str) -> None:
    """Arguments of a deployment arrive loaded."""
    done = run_python(SERVE, "-", address)
    assert done.stdout.splitlines()[:2] == ["True", "True"], done.stdout + done.stderr


@pytest.mark.long
def test_serve_where_references_are_forbidden(address: str) -> None:
    """If references out of band are forbidden, a deployment with an unnamed pipeline gets a clear error."""
    done = run_python(SERVE, "-", address, RAY_allow_out_of_band_object_ref_serialization="0")
    assert "refused A pipeline of class Search was captured" in done.stdout, done.stdout + done.stderr
