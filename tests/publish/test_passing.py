"""Are pipelines that are passed directly to Ray published only once, and again only after a change?"""

from __future__ import annotations

import pickle
from typing import Any

import pipelines
import pytest
import ray
import torch
from conftest import run_python
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy.testing import assert_zero_copy

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_hundred_calls_publish_once(publishings: list[int]) -> None:
    """A plain remote function gets the pipeline loaded; its weights are published at the first call, and again after a change."""
    search = pipelines.search(width=128)
    expected = search(2.0)
    assert set(ray.get([pipelines.plain_answer.remote(search, 2.0) for _ in range(100)])) == {expected}
    assert len(publishings) == 1
    optimizer = torch.optim.SGD(search.encoder.parameters(), lr=0.1)
    search.encoder(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    assert search(2.0) != expected
    assert set(ray.get([pipelines.plain_answer.remote(search, 2.0) for _ in range(10)])) == {search(2.0)}
    assert len(publishings) == 2


def test_a_changed_copied_field_arrives_without_publishing(publishings: list[int]) -> None:
    """Copied fields are pickled with each call, so a change of them arrives without a new publication."""
    search = pipelines.search(width=64)
    ray.get(pipelines.plain_answer.remote(search, 1.0))
    search.top_k = 900
    search.settings["new"] = [1, 2]
    assert ray.get(pipelines.plain_answer.remote(search, 1.0)) == search(1.0) > 800
    assert len(publishings) == 1


@zerocopy.pipeline
class Scaled(nn.Module):
    """A pipeline that is itself a module, and will have a parametrization of its own."""

    top_k: int = copied()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.top_k = 5


@ray.remote
def told_of(scaled: Scaled) -> tuple[int, float]:
    return scaled.top_k, float(scaled.weight.sum())


def test_fields_of_a_parametrized_pipeline_keep_their_policies(publishings: list[int]) -> None:
    """A copied field arrives fresh, and the weights are shared, if the pipeline itself is a module with a parametrization."""
    scaled = nn.utils.parametrizations.weight_norm(Scaled(), "weight")
    assert ray.get(told_of.remote(scaled)) == (5, 16)
    scaled.top_k = 9
    assert ray.get(told_of.remote(scaled)) == (9, 16)
    assert len(publishings) == 1
    assert_zero_copy(zerocopy.publish(scaled).load())


def test_explicit_and_automatic_share_one_set(publishings: list[int]) -> None:
    """Publishing a pipeline explicitly and passing it, in either order, writes the weights once."""
    search = pipelines.search(width=64)
    publication = zerocopy.publish(search)
    ray.get(pipelines.plain_answer.remote(search, 1.0))
    other = pipelines.search(width=64)
    ray.get(pipelines.plain_answer.remote(other, 1.0))
    again = zerocopy.publish(other)
    assert len(publishings) == 2
    assert not publication.closed
    assert not again.closed


def test_a_loaded_pipeline_travels_as_what_it_came_from(publishings: list[int]) -> None:
    """Passing on a loaded pipeline writes nothing until one of its tensors changes."""
    publication = zerocopy.publish(pipelines.search(width=64))
    loaded = publication.load()
    loaded.top_k = 77
    assert ray.get(pipelines.plain_answer.remote(loaded, 1.0)) == loaded(1.0)
    part = publication.load(fields=["encoder"])
    assert ray.get(mean.remote(part)) == pytest.approx(float(part.encoder[0].weight.detach().mean()))
    assert len(publishings) == 1
    loaded.encoder.train(False)
    assert ray.get(pipelines.top_k_and_mode.remote(loaded)) == (77, False, True)
    with torch.no_grad():
        loaded.encoder[0].weight.add_(1)
    assert ray.get(pipelines.plain_answer.remote(loaded, 1.0)) == loaded(1.0)
    assert len(publishings) == 2


@ray.remote
def mean(search: pipelines.Search) -> float:
    assert_zero_copy(search)
    return float(search.encoder[0].weight.detach().mean())


@ray.remote
def pass_on(search: pipelines.Search) -> tuple[pipelines.Search, float]:
    return search, ray.get(pipelines.plain_answer.remote(search, 1.0))


def test_through_a_worker_and_back(publishings: list[int]) -> None:
    """A worker may pass a pipeline on, and return it."""
    search = pipelines.search(width=64)
    returned, inner = ray.get(pass_on.remote(search))
    assert inner == search(1.0) == returned(1.0)
    assert_zero_copy(returned)
    assert len(publishings) == 1


def test_inside_containers_and_stores() -> None:
    """A pipeline is zero-copy wherever Ray serializes it, also in lists and in objects of the store."""
    search = pipelines.search(width=64)
    first, second = ray.get(ray.put([search, {"again": search}]))
    assert first(1.0) == second["again"](1.0) == search(1.0)
    assert_zero_copy(first)


def test_plain_ray_actors() -> None:
    """An ordinary Ray actor also gets a pipeline loaded."""

    @ray.remote(num_cpus=0.1)
    class Plain:
        def __init__(self, search: pipelines.Search) -> None:
            assert_zero_copy(search)
            self.search = search

        def ask(self) -> float:
            return self.search(1.0)

    search = pipelines.search(width=64)
    assert ray.get(Plain.remote(search).ask.remote()) == search(1.0)


def test_references_inside_copied_fields() -> None:
    """Object references, actor handles and publications in copied fields arrive, and are counted by Ray."""
    search = pipelines.search(width=64)
    inner = zerocopy.publish(pipelines.search(width=32))
    search.settings = {"ref": ray.put("behind a reference"), "publication": inner}

    @ray.remote
    def look(search: pipelines.Search) -> tuple[str, int]:
        return ray.get(search.settings["ref"]), search.settings["publication"].load().index.shape[1]

    assert ray.get(look.remote(search)) == ("behind a reference", 32)


def test_plain_pickle_is_untouched() -> None:
    """`pickle` makes an ordinary private copy, also while Ray runs."""
    search = pipelines.search(width=64)
    back = pickle.loads(pickle.dumps(search))
    assert back(1.0) == search(1.0)
    with pytest.raises(AssertionError, match="is not a view of the object store"):
        assert_zero_copy(back)


def test_without_ray_pickling_is_ordinary() -> None:
    """Ray's pickler makes an ordinary copy if Ray is not running."""
    done = run_python(
        "import ray.cloudpickle, pipelines\n"
        "search = pipelines.search(width=8)\n"
        "back = ray.cloudpickle.loads(ray.cloudpickle.dumps(search))\n"
        "assert back(1.0) == search(1.0)\n"
        "assert not ray.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


def test_undecorated_subclasses_and_local_classes() -> None:
    """A subclass without the decorator, or a class defined inside a function, can be passed like any other."""

    @zerocopy.pipeline
    class Local:
        encoder: nn.Module = shared()
        top_k: int = copied(default=1)

    class Derived(Local):
        pass

    @ray.remote
    def check(pipeline: Any) -> tuple[str, str]:
        assert_zero_copy(pipeline)
        again = ray.get(ray.put(pipeline))
        assert_zero_copy(again)
        return type(pipeline).__name__, type(again).__name__

    for cls in (Local, Derived):
        assert ray.get(check.remote(cls(pipelines.encoder()))) == (cls.__name__, cls.__name__)
    assert ray.get(pipelines.plain_answer.remote(pipelines.search(width=64, cls=pipelines.Narrow), 1.0)) < 0


def test_errors_of_arguments_carry_our_text() -> None:
    """A call whose argument cannot be pickled raises an error with the path of the object."""
    search = pipelines.search(width=64)
    search.settings["stream"] = (number for number in range(3))
    with pytest.raises(TypeError, match=r"search.settings\['stream'\]"):
        pipelines.plain_answer.remote(search, 1.0)
