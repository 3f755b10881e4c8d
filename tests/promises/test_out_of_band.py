"""May a closure capture weights? In Ray's ordinary mode yes; if references out of band are forbidden, an error names them."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable

import pipelines
import psutil
import pytest
import ray
from conftest import run_python, wait_until

import zerocopy
from zerocopy.errors import CannotTravelError, OutOfBandError

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.alone
def test_closures_and_globals() -> None:
    """A function may capture a pipeline or a publication, which then work in its worker."""
    search = pipelines.search(width=64)
    publication = zerocopy.publish(search)

    @ray.remote
    def captured() -> tuple[float, float]:
        return search(1.0), publication.load()(1.0)

    assert ray.get(captured.remote()) == (search(1.0), search(1.0))


@pytest.mark.alone
def test_what_a_closure_pins_is_released_by_close(store_use: Callable[[], int]) -> None:
    """A publication that a function has captured is pinned in the store only until it is closed."""
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


@ray.remote(num_cpus=0)
class Capturing:
    def use(self, given: list[zerocopy.Publication[pipelines.Search]]) -> float:
        """Give the publication to a function that captures it, and close it."""
        (publication,) = given

        def make() -> object:
            @ray.remote(num_cpus=0.1)
            def captured() -> float:
                return publication.load()(1.0)

            return captured

        answer: float = ray.get(make().remote())
        publication.close()
        return answer


@pytest.mark.alone
def test_a_process_that_received_a_publication_releases_it_by_close(store_use: Callable[[], int]) -> None:
    """What a closure pins in such a process is released as in the process that published."""
    search = pipelines.search(width=1024)
    publication, other = zerocopy.publish(search), Capturing.remote()
    assert ray.get(other.use.remote([publication])) == search(1.0)
    publication.close()
    assert wait_until(lambda: store_use() <= 0)
    ray.kill(other)


@pytest.mark.alone
def test_plain_pickles_of_a_handle_are_handles() -> None:
    """A handle and a handle from its pickle are closed separately; closing one does not affect the other."""
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
    """If references out of band are forbidden, a capture raises an error with a name and a hint; arguments still work."""
    done = run_python(FORBIDDEN, "-", address, RAY_allow_out_of_band_object_ref_serialization="0")
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert all(line.startswith("A pipeline of class Search was captured by a closure") for line in lines[:2])
    assert all(line.startswith("A publication of Search was captured by a closure") for line in lines[2:5])
    assert all(line.endswith("Hint: pass it as an argument, or unset that variable.") for line in lines[:5])
    assert lines[5] == "True"


@ray.remote(num_cpus=0.1, max_calls=1)
def pickle_briefly(given: list[zerocopy.Publication], loaded: pipelines.Search) -> tuple[int, list[str], list[bytes]]:
    """The errors and the results of pickling in a process that ends with this task."""
    search = pipelines.search(width=64)
    stuck = pipelines.search(width=64, settings={"lock": threading.Lock()})
    publication = zerocopy.publish(search)
    errors: list[str] = []
    for dumps, value in (
        (ray.cloudpickle.dumps, search),
        (ray.cloudpickle.dumps, publication),
        (pickle.dumps, publication),
        (ray.cloudpickle.dumps, publication.load()),
        (ray.cloudpickle.dumps, stuck),
    ):
        with pytest.raises((OutOfBandError, CannotTravelError)) as refused:
            dumps(value)
        errors.append(f"{refused.type.__name__}: {refused.value}")
    assert ray.get(pipelines.plain_answer.remote(search, 1.0)) == search(1.0)  # as an argument
    made = []
    if given:
        made = [ray.cloudpickle.dumps(loaded), ray.cloudpickle.dumps(given[0]), pickle.dumps(given[0])]
    return os.getpid(), errors, made


def test_a_process_that_ends_soon_pickles_nothing_that_ends_with_it() -> None:
    """In a task with `max_calls=1`, such as Serve's builder, pickling weights that would end with it raises a hint to `name=`."""
    _, errors, _ = ray.get(pickle_briefly.remote([], pipelines.search(width=8)))
    assert errors[0].startswith("OutOfBandError: A pipeline of class Search was pickled")
    assert all(error.startswith("OutOfBandError: A publication of Search was pickled") for error in errors[1:3])
    assert errors[3].startswith("OutOfBandError: A pipeline of class Search was pickled")
    assert all("in a task with max_calls=1" in error for error in errors[:4])
    assert all("zerocopy.publish(pipeline, name=...)" in error for error in errors[:4])
    assert errors[4].startswith("CannotTravelError")


@pytest.mark.long
@pytest.mark.alone
def test_it_pickles_what_others_own() -> None:
    """Such a process can pickle weights that other processes own, and these still work after it ended."""
    search = pipelines.search(width=64)
    publication = zerocopy.publish(search)
    # This task gets its own worker: Ray never ends a worker where a function captured nested references, as in other tests here.
    of_its_own = pickle_briefly.options(runtime_env={"env_vars": {"A_WORKER_OF_ITS_OWN": "1"}})
    pid, _, made = ray.get(of_its_own.remote([publication], search))
    assert wait_until(lambda: not psutil.pid_exists(pid))
    assert ray.cloudpickle.loads(made[0])(1.0) == search(1.0)
    assert [ray.cloudpickle.loads(one).load()(1.0) for one in made[1:]] == [search(1.0)] * 2


ON_A_GPU = """
import ray
import pipelines, zerocopy
ray.init("local", num_cpus=2, num_gpus=1, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)

@ray.remote(num_gpus=1)
def outer():
    search = pipelines.search(width=64)

    @ray.remote
    def inner():
        return search(1.0)

    return ray.get(inner.remote()) == search(1.0)

print(ray.get(outer.remote()))
"""


@pytest.mark.long
@pytest.mark.alone
def test_tasks_with_gpus_capture_as_others_do() -> None:
    """A task with a GPU may capture a pipeline, although Ray gives such tasks `max_calls=1` by default."""
    done = run_python(ON_A_GPU)
    assert done.stdout.strip() == "True", done.stderr
