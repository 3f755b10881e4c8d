"""References out of band: a closure may capture them in Ray's ordinary mode, and is refused by name where they are forbidden."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pipelines
import pytest
import ray
from conftest import run_python, wait_until

import zerocopy

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.alone
def test_closures_and_globals() -> None:
    """A pipeline or a publication captured by a function arrives as well; closing it releases what that pinned."""
    search = pipelines.search(width=64)
    publication = zerocopy.publish(search)

    @ray.remote
    def captured() -> tuple[float, float]:
        return search(1.0), publication.load()(1.0)

    assert ray.get(captured.remote()) == (search(1.0), search(1.0))


@pytest.mark.alone
def test_what_a_closure_pins_is_released_by_close(store_use: Callable[[], int]) -> None:
    """A publication captured by a function is pinned until it is closed."""
    publication = zerocopy.publish(pipelines.search(width=1024))

    def make() -> object:
        @ray.remote
        def captured() -> float:
            return publication.load()(1.0)

        return captured

    captured = make()
    ray.get(captured.remote())
    publication.close()
    assert wait_until(lambda: store_use() <= 0)


@pytest.mark.alone
def test_plain_pickles_of_a_handle_are_handles() -> None:
    """They are closed by themselves: closing the handle leaves what was made of its pickle, and the other way round."""
    search = pipelines.search(width=64)
    first, second = zerocopy.publish(search), zerocopy.publish(search)
    assert pickle.loads(pickle.dumps(first)).load()(1.0) == search(1.0)
    first.close()
    assert second.load()(1.0) == search(1.0)


FORBIDDEN = """
import pickle, sys
import ray
import pipelines, zerocopy, zerocopy.errors
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
search = pipelines.search(width=64)
publication = zerocopy.publish(search)

def refused(pickler, captured):
    try:
        pickler(captured)
    except zerocopy.errors.OutOfBandError as error:
        print(error)

for captured in (search, publication):
    @ray.remote
    def closure():
        return captured
    refused(lambda _: closure.remote(), captured)
    refused(ray.cloudpickle.dumps, captured)
refused(pickle.dumps, publication)
@ray.remote
def answer(search):
    return search(1.0)
print(ray.get(answer.remote(search)) == search(1.0) == ray.get(answer.remote(publication.load())))
"""


def test_captures_are_refused_in_our_words(address: str) -> None:
    """With references out of band forbidden, a capture is refused by name and with the way out; arguments work."""
    done = run_python(FORBIDDEN, "-", address, RAY_allow_out_of_band_object_ref_serialization="0")
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert all(line.startswith("A pipeline of class Search was captured by a closure") for line in lines[:2])
    assert all(line.startswith("A publication of Search was captured by a closure") for line in lines[2:5])
    assert all(line.endswith("Hint: pass it as an argument, or unset that variable.") for line in lines[:5])
    assert lines[5] == "True"
