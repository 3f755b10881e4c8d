"""What happens when a worker is killed? Each row of Ray Data comes once, actors and pools continue, and tasks run again."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import wait_until
from reliability import fault
from versions import Numbered, numbered

import zerocopy

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]
KIND = "Workers"
STARTING = (
    60.0  # seconds if a new process starts: on a busy machine the import of torch takes longer than everything else
)


def end_once(mark: Path) -> None:
    """Kill this process, unless the file `mark` exists: then one was killed before. The file holds the time of the kill."""
    if not mark.exists():
        mark.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)


@zerocopy.actor
class Batches:
    """For `map_batches`: one of its processes is killed during a batch."""

    def __init__(self, search: Numbered, mark: str) -> None:
        self.search, self.mark = search, Path(mark)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if 30 in batch["id"]:
            end_once(self.mark)
        return {"id": batch["id"], "answer": [self.search()] * len(batch["id"])}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray"
)  # Ray Data warns about its own settings
def test_a_worker_of_map_batches(tmp_path: Path) -> None:
    """If a worker of `map_batches` is killed, another worker gets its batch, and each row comes once with the right answer."""
    mark = tmp_path / "mark"
    rows = ray.data.range(64, override_num_blocks=8).map_batches(
        Batches,
        fn_constructor_kwargs={"search": numbered(3), "mark": str(mark)},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=4,
        num_cpus=0.5,
    )
    with fault(KIND, "A worker of `map_batches` is killed in the middle of a batch", bound=STARTING) as told:
        found = rows.take_all()
        told.happened_at(float(mark.read_text()))
        told.result = "each row once, with the right answer"
    assert Counter(row["id"] for row in found) == Counter(range(64))
    assert {row["answer"] for row in found} == {3}


@zerocopy.actor(num_cpus=0.1, max_restarts=1, max_task_retries=1)
class Retried:
    """Is killed during a call, if the call asks for it."""

    def __init__(self, search: Numbered) -> None:
        self.search = search

    def ask(self, item: int, mark: str | None = None) -> tuple[int, int]:
        if mark is not None:
            end_once(Path(mark))
        return item, self.search()

    def pid(self) -> int:
        return os.getpid()


def test_an_actor_in_the_midst_of_a_call(tmp_path: Path) -> None:
    """With `max_task_retries` the restarted actor repeats the call, and has its weights although their handle was closed."""
    with zerocopy.publish(numbered(4)) as publication:
        actor = Retried.remote(publication)
    ray.get(actor.pid.remote())
    with fault(
        KIND, "An actor (`max_restarts=1, max_task_retries=1`) is killed in the middle of a call", bound=STARTING
    ) as told:
        assert ray.get(actor.ask.remote(1, str(tmp_path / "mark"))) == (1, 4)
        told.result = "the right answer, from the restarted actor"


def test_an_actor_that_is_not_restarted(tmp_path: Path) -> None:
    """Its caller gets Ray's own error, and other actors continue to work."""
    publication = zerocopy.publish(numbered(4))
    actor, other = (Retried.options(max_restarts=0, max_task_retries=0).remote(publication) for _ in range(2))
    ray.get(actor.pid.remote())
    with fault(KIND, "An actor without restarts is killed in the middle of a call") as told:
        with pytest.raises(ray.exceptions.ActorDiedError):
            ray.get(actor.ask.remote(1, str(tmp_path / "mark")))
        told.result = "`ray.exceptions.ActorDiedError`; other actors that use the weights go on"
    assert ray.get(other.ask.remote(2)) == (2, 4)


def test_a_pool(tmp_path: Path) -> None:
    """`map` over a pool continues after one actor was killed, and returns each answer once and in order."""
    pool = Retried.pool(2, numbered(5))
    pids = ray.get([actor.pid.remote() for actor in pool])
    with fault(
        KIND, "An actor of a pool (`max_restarts=1, max_task_retries=1`) is killed during `pool.map`", bound=STARTING
    ) as told:
        answers = []
        for answer in pool.map("ask", range(40), max_in_flight=4):
            answers.append(answer)
            if len(answers) == 10:
                os.kill(pids[0], signal.SIGKILL)
        told.result = "all answers, once and in order"
    assert answers == [(item, 5) for item in range(40)]


@zerocopy.task(num_cpus=0.1, max_retries=1)
def ask_and_end(search: Numbered, mark: str) -> int:
    end_once(Path(mark))
    return search()


def test_a_task(tmp_path: Path) -> None:
    """A task whose process is killed runs again in another process."""
    search = numbered(6)
    with fault(KIND, "The process of a task (`max_retries=1`) is killed", bound=STARTING) as told:
        assert ask_and_end(search, str(tmp_path / "mark")) == 6
        told.result = "the right answer, from another process"
    assert ask_and_end(search, str(tmp_path / "mark")) == 6


def test_a_worker_that_is_stopped(tmp_path: Path) -> None:
    """While a worker is stopped, others load and answer; the stopped worker answers when it runs again."""
    publication = zerocopy.publish(numbered(7))
    stopped, other = Retried.remote(publication), Retried.remote(publication)
    pid = ray.get([stopped.pid.remote(), other.pid.remote()])[0]
    os.kill(pid, signal.SIGSTOP)
    try:
        with fault(KIND, "A worker that has loaded is stopped (SIGSTOP)") as told:
            waiting = stopped.ask.remote(1)
            assert ray.get([other.ask.remote(2), Retried.remote(publication).ask.remote(3)]) == [(2, 7), (3, 7)]
            assert publication.load()() == 7
            told.result = "other workers load and answer; the stopped worker answers when it runs again"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ray.get(waiting) == (1, 7)
    assert wait_until(lambda: ray.get(stopped.pid.remote()) == pid, 5)
