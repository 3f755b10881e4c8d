"""Does a live update work under load? Versions are rolled out and back during calls of actors, tasks, Ray Data and Serve.

Every weight and a copied field of a pipeline contain the number of its version. So each answer shows which version gave it, or
that it came from a mixture of two versions. The program prints its observations as JSON.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import ray
import ray.data
from ray import serve
from ray._private import internal_api, state

HERE = Path(__file__).parent
NAME = "live"
PAUSE = 0.01  # seconds after a call, so that the callers do not take all cores


@attrs.define
class Seen:
    """The observations of one kind of caller."""

    calls: int = 0
    failed: list[str] = attrs.field(factory=list)
    mixed: int = 0
    versions: collections.Counter[int] = attrs.field(factory=collections.Counter)
    slowest: float = 0.0
    last: int = 0

    def note(self, answers: list[int], seconds: float) -> None:
        """Count the answers of one call, which must all come from one version."""
        self.calls += 1
        self.mixed += len(set(answers)) != 1 or answers[0] < 1
        self.versions.update(answers)
        self.slowest = max(self.slowest, seconds)
        self.last = answers[-1]


class Callers:
    """Threads that make calls until they are stopped."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, kind: str, call: Callable[[], list[int]]) -> None:
        """Add a kind of caller, and call once so that everything is loaded."""
        call()
        seen = self.seen[kind] = Seen()

        def run() -> None:
            while not self._stopped.is_set():
                start = time.monotonic()
                try:
                    seen.note(call(), time.monotonic() - start)
                except Exception:
                    seen.failed.append(traceback.format_exc())
                time.sleep(PAUSE)

        self._threads.append(threading.Thread(target=run))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._threads = []  # drops the objects that they call as well: Ray Data keeps blocks in the store

    def all_answer(self, number: int, seconds: float = 60) -> bool:
        """Return whether all callers get answers of this version in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if all(seen.last == number for seen in self.seen.values()):
                return True
            time.sleep(0.02)
        return False


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=8)
class App:
    """A plain deployment, which gets a handle with `current()`."""

    def __init__(self, search: Any) -> None:
        self.search = search

    def __call__(self, _: Any) -> str:
        search = self.search.current()
        answers = {search(), search()}
        return str(answers.pop() if len(answers) == 1 else -1)


def store_bytes() -> int:
    return int(internal_api.get_memory_info_reply(state.state).store_stats.object_store_bytes_used)


def settled(limit: float, seconds: float = 30) -> int:
    """Wait until the store has at most `limit` bytes, and return how many it has then or when the time is over."""
    end = time.monotonic() + seconds
    while store_bytes() > limit and time.monotonic() < end:
        time.sleep(0.1)
    return store_bytes()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def add_callers(callers: Callers, port: int) -> None:
    """Add two following actors, an async and a threaded actor, a stream, tasks, `map_batches` and a deployment."""
    from versions import Asked, AskedAsync, Following, ask, ask_for_item

    import zerocopy

    handle = zerocopy.lookup(NAME)
    following = [Following.remote(handle) for _ in range(2)]
    concurrent, threaded = AskedAsync.remote(handle), Asked.options(max_concurrency=8).remote(handle)
    for number, actor in enumerate(following):
        callers.add(f"following {number}", lambda actor=actor: [ray.get(actor.ask.remote())])
    callers.add("async", lambda: newest_of(ray.get([concurrent.ask.remote() for _ in range(8)])))
    callers.add("threaded", lambda: newest_of(ray.get([threaded.ask.remote() for _ in range(8)])))
    streamed = threaded.stream.options(num_returns="streaming")
    callers.add("stream", lambda: list(map(ray.get, streamed.remote(10))))
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(App.bind(handle), name="app", route_prefix="/")

    def request() -> list[int]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as reply:
            return [int(reply.read())]

    callers.add("serve", request)
    batches = in_batches(handle)
    callers.add("map_batches", lambda: [int(answer) for answer in next(batches)["answer"]])
    # These are last, because Ray ends idle worker processes of tasks.
    callers.add("map", lambda: list(ask_for_item.map(handle, range(4), max_in_flight=1)))
    callers.add("task", lambda: [ask(handle)])


def newest_of(answers: list[int]) -> list[int]:
    """The newest version among several calls, which may differ; -1 if one answer was a mixture."""
    return [max(answers) if min(answers) > 0 else -1]


def in_batches(handle: Any) -> Iterator[dict[str, Any]]:
    """An endless stream of answers from one actor of Ray Data."""
    from versions import Batches

    ray.data.DataContext.get_current().execution_options.resource_limits = ray.data.ExecutionResources(cpu=1)
    while True:
        data = ray.data.range(20_000, override_num_blocks=400)
        kwargs = {"search": handle}
        options = {"compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 0.1}
        mapped = data.map_batches(Batches, fn_constructor_kwargs=kwargs, batch_size=50, **options)
        yield from mapped.iter_batches(batch_size=50, prefetch_batches=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two versions")
    parser.add_argument("--quiet", type=float, default=3.0, help="seconds before the first one")
    parser.add_argument("--width", type=int, default=512)
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    os.environ.update(PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1")
    ray.init("local", num_cpus=6, object_store_memory=1_000_000_000, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    from versions import numbered

    import zerocopy

    before = store_bytes()
    one = zerocopy.publish(numbered(1, width=given.width), name=NAME).shared_bytes
    callers = Callers()
    add_callers(callers, free_port())
    callers.start()
    time.sleep(given.quiet)
    quiet = {kind: seen.slowest for kind, seen in callers.seen.items()}
    publishing, following = [], []
    for number in [*range(2, given.versions + 2), given.versions, given.versions - 1]:
        start = time.monotonic()
        if number in {version.version.number for version in zerocopy.publications()}:
            zerocopy.set_alias(NAME, "latest", version=number)
        else:
            zerocopy.publish(numbered(number, width=given.width, layers=3 + number % 3), name=NAME)
        committed = time.monotonic()
        publishing.append(committed - start)
        time.sleep(given.pause)
    is_final = callers.all_answer(given.versions - 1)
    following.append(time.monotonic() - committed)
    callers.stop()
    kept = len(zerocopy.publications())
    report = {
        "kinds": {
            kind: {
                "calls": seen.calls,
                "failed": len(seen.failed),
                "mixed": seen.mixed,
                "versions": len(seen.versions),
                "slowest": round(seen.slowest, 3),
                "slowest before": round(quiet[kind], 3),
            }
            for kind, seen in callers.seen.items()
        },
        "failures": [text for seen in callers.seen.values() for text in seen.failed][:3],
        "all answer the last version": is_final,
        "seconds until all do": round(following[-1], 3),
        "slowest publication": round(max(publishing), 3),
        "versions kept": kept,
        "store over what is kept": round((settled(before + 1.3 * kept * one) - before) / (kept * one), 3),
    }
    print(json.dumps(report, indent=2))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
