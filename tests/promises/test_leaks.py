"""Does anything leak? When the last user of weights is gone, the store has as many bytes as before."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pipelines
import pytest
import ray
import torch
from conftest import wait_until

import zerocopy

pytestmark = pytest.mark.usefixtures("cluster")
WEIGHTS = 2 * 1024 * 1024 * 4  # bytes of the encoder of width 1024


@ray.remote
def answer(search: pipelines.Search, query: float) -> float:
    return search(query)


def is_free(store_use: Callable[[], int]) -> bool:
    return wait_until(lambda: store_use() <= 0)


@pytest.mark.long
def test_automatic_publishing(store_use: Callable[[], int]) -> None:
    """After a pipeline and its results are dropped, nothing of it stays in the store, also if it was passed and changed often."""
    search = pipelines.search(width=1024)
    for _ in range(3):
        results = [answer.remote(search, 1.0) for _ in range(5)]
        ray.get(results)
        with torch.no_grad():
            search.encoder[0].weight.add_(1)
    assert wait_until(lambda: store_use() < 2.5 * WEIGHTS), "the weights of earlier versions are still there"
    assert store_use() > 0.9 * WEIGHTS  # memory that an idle worker kept from an earlier test may be freed meanwhile
    del search, results
    assert is_free(store_use)


def test_handles_and_loaded_pipelines(store_use: Callable[[], int]) -> None:
    """Weights stay in the store until the last handle, loaded pipeline and tensor are gone."""
    search = pipelines.search(width=1024)
    expected = search(1.0)
    publication = zerocopy.publish(search)
    loaded = publication.load()
    weight = publication.load().encoder[0].weight
    del search, publication
    gc.collect()
    assert loaded(1.0) == expected
    assert store_use() > 0.9 * WEIGHTS  # memory that an idle worker kept from an earlier test may be freed meanwhile
    total = float(weight.detach().sum())
    del loaded
    gc.collect()
    assert float(weight.detach().sum()) == total, "a tensor keeps the memory it is a view of"
    del weight
    assert is_free(store_use)


def test_a_handle_dropped_while_the_pipeline_lives(store_use: Callable[[], int]) -> None:
    """Only the handle keeps explicitly published weights in the store, not the pipeline that was published."""
    search = pipelines.search(width=1024)
    publication = zerocopy.publish(search)
    assert store_use() > 0.9 * WEIGHTS  # memory that an idle worker kept from an earlier test may be freed meanwhile
    del publication
    assert is_free(store_use)
    assert search.top_k == 5


def test_a_handle_keeps_nothing_of_the_publisher() -> None:
    """A model dropped after publishing is freed, also a pipeline in a reference cycle with its shared dict."""
    module = pipelines.encoder(64)
    gone = weakref.ref(module[0].weight)
    publication = zerocopy.publish(module)
    del module
    gc.collect()
    assert gone() is None
    assert publication.load() is not None

    @zerocopy.pipeline
    class Cyclic:
        index: dict = zerocopy.shared()

    cyclic = Cyclic({"tensor": torch.ones(1000)})
    cyclic.index["owner"] = cyclic
    gone = weakref.ref(cyclic)
    ray.put(cyclic)
    del cyclic
    gc.collect()
    assert gone() is None


def test_copies_of_a_handle_are_handles() -> None:
    """Each copy of a handle is closed separately; closing one does not affect the others."""
    search = pipelines.search(width=64)
    first, second = zerocopy.publish(search), zerocopy.publish(search)
    twin = copy.copy(first)
    first.close()
    assert second.load()(1.0) == twin.load()(1.0) == search(1.0)
    twin.close()
    assert second.load()(1.0) == search(1.0)


def test_close_releases_automatic_publishing_too(store_use: Callable[[], int]) -> None:
    """The end of `with` frees the store, also if the pipeline was passed directly meanwhile."""
    search = pipelines.search(width=1024)
    with zerocopy.publish(search):
        ray.get(answer.remote(search, 1.0))
    assert is_free(store_use)
    assert ray.get(answer.remote(search, 1.0)) == search(1.0)
    del search
    assert is_free(store_use)


def test_tasks_actors_and_pools(store_use: Callable[[], int]) -> None:
    """Tasks, actors and pools keep weights in the store only while they run."""
    search = pipelines.search(width=1024)
    assert pipelines.answer(search, 1.0) == search(1.0)
    with pipelines.Worker.pool(1, search) as pool:
        assert list(pool.map("ask", [1.0, 1.0])) == [search(1.0)] * 2
    worker = pipelines.Worker.remote(search)
    expected = search(1.0)
    del search
    assert ray.get(worker.ask.remote(1.0)) == expected
    assert store_use() > 0.9 * WEIGHTS  # memory that an idle worker kept from an earlier test may be freed meanwhile
    del worker, pool
    assert is_free(store_use)


def test_a_bare_module(store_use: Callable[[], int]) -> None:
    """A module that is passed to a task is published, and its weights are freed with the module."""
    module = pipelines.encoder(1024)

    @zerocopy.task
    def total(module: torch.nn.Module) -> float:
        return float(module[0].weight.detach().sum())

    assert total(module) == pytest.approx(float(module[0].weight.detach().sum()))
    assert store_use() > 0.9 * WEIGHTS  # memory that an idle worker kept from an earlier test may be freed meanwhile
    del module
    assert is_free(store_use)


def test_a_failed_publishing_leaves_nothing(store_use: Callable[[], int]) -> None:
    """A pipeline that cannot be pickled is refused before anything is written."""
    with pytest.raises(zerocopy.errors.CannotTravelError):
        zerocopy.publish(pipelines.search(width=1024, settings={"stream": (number for number in ())}))
    assert store_use() <= 0
