"""Are all answers right under heavy load? Many actors load at once, many calls run, drivers publish at the same time.

`python tests/load_held.py` measures it, and with `--output` writes the table into a page. Every weight and a copied field of a
pipeline contain the number of its version, so each answer shows whether it was right.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import ray
import torch
from pages import renew
from versions import Asked, Following, Numbered, ask, ask_for_item, numbered

import zerocopy

HEADING = "## Load held"
WIDTH = 512  # 4 MB of weights, 1 MB per layer


@attrs.frozen
class Outcome:
    """The result of one measurement.

    Attributes:
        what: its description.
        count: the number of loads, calls or answers.
        wrong: how many of them were wrong or failed.
        figures: other measured figures.
    """

    what: str
    count: int
    wrong: int
    seconds: float
    figures: str = ""


@zerocopy.actor(num_cpus=0)
class Reader:
    """Loads the pipeline when it is created."""

    def __init__(self, search: Numbered) -> None:
        self.search = search

    def ask(self) -> int:
        return self.search()


@zerocopy.task(num_cpus=1)
def answer(search: Numbered) -> int:
    """The number of the version."""
    return search()


@zerocopy.task(num_cpus=1)
def double(search: Numbered, item: int) -> int:
    """The number of the version, and the item."""
    return 1000 * search() + item


def actors_at_once(count: int) -> Outcome:
    """Create many actors at once."""
    search = numbered(1, width=WIDTH)
    publication = zerocopy.publish(search)
    start = time.monotonic()
    actors = [Reader.remote(publication) for _ in range(count)]
    answers = ray.get([actor.ask.remote() for actor in actors])
    seconds = time.monotonic() - start
    report = zerocopy.memory_report()
    shared = next(one.shared for one in report.publications if one.loads >= count)
    wrong = sum(answer != 1 for answer in answers)
    for actor in actors:
        ray.kill(actor)
    copies = shared / publication.shared_bytes
    return Outcome(
        f"{count} actors load at once",
        count,
        wrong,
        seconds,
        f"{copies:.2f} copies in the store; this is the time to start the processes",
    )


def calls_in_flight(count: int) -> Outcome:
    """Submit all calls before the first result is requested."""
    search = numbered(2, width=64)
    start = time.monotonic()
    refs = [answer.remote(search) for _ in range(count)]
    submitted = time.monotonic() - start
    wrong = sum(answer != 2 for answer in ray.get(refs))
    return Outcome(
        f"{count:,} calls in flight", count, wrong, time.monotonic() - start, f"submitted in {submitted:.1f} s"
    )


def through_map(count: int) -> Outcome:
    """Pass items through `map`, which returns results in order."""
    search = numbered(3, width=64)
    start = time.monotonic()
    found = list(double.map(search, range(count)))
    wrong = sum(answer != 3000 + item for item, answer in enumerate(found))
    return Outcome(f"{count:,} items through `map`", count, wrong + abs(count - len(found)), time.monotonic() - start)


RIVAL = """
import sys, ray, zerocopy
from versions import numbered
ray.init(sys.argv[1], log_to_driver=False)
for turn in range(int(sys.argv[4])):
    number = 100 * (turn + 1) + int(sys.argv[3])
    version = zerocopy.publish(numbered(number, width=64), name=sys.argv[2], keep=1000).version
    print(version.number, number, flush=True)
"""


def rivals(turns: int) -> Outcome:
    """Let two drivers publish under one name, as fast as they can."""
    from conftest import run_python

    name, address, done = "rivals", ray.get_runtime_context().gcs_address, []

    def publish(who: int) -> None:
        done.append(run_python(RIVAL, "-", address, name, str(who), str(turns)))

    start = time.monotonic()
    threads = [threading.Thread(target=publish, args=[who]) for who in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    told = [tuple(map(int, line.split())) for one in done for line in one.stdout.splitlines()]
    wrong = 2 * turns - len({version for version, _ in told})  # each publication must have its own version
    wrong += sum(zerocopy.lookup(name, version=version).load()() != number for version, number in told)
    zerocopy.remove(name)
    return Outcome("two drivers publish under one name", 2 * turns, wrong, seconds)


class Churn:
    """The state that callers, writers and a publisher share until the time is over."""

    def __init__(self, seconds: float) -> None:
        self.seen: Counter[str] = Counter()
        self.failures: list[str] = []
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._published = 1

    def loop(self, call: Callable[[], list[int]]) -> None:
        """Call until the end. An answer is right if it is the number of a published version."""
        while time.monotonic() < self._end:
            try:
                answers = call()
            except Exception as error:  # each failure counts
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            with self._lock:
                self.seen["answers"] += len(answers)
                self.seen["wrong"] += sum(not 1 <= answer <= self._published + 1 for answer in answers)

    def publish(self, name: str) -> None:
        """Publish new versions, half of them adopted, and set "latest" again after every fifth."""
        while time.monotonic() < self._end:
            number = self._published + 1
            search = numbered(number, width=WIDTH, layers=random.choice((3, 4)))
            zerocopy.publish(search, name=name, adopt=bool(number % 2))
            self._published = number
            if number % 5 == 0:
                zerocopy.set_alias(name, "latest", version=zerocopy.lookup(name).version.number)
            time.sleep(0.3)
        self.seen["versions"] = self._published


def write(search: Numbered) -> list[int]:
    """Overwrite all weights of a loaded pipeline, which no other process may see. This pipeline then answers -1."""
    with torch.no_grad():
        for tensor in (*search.encoder.parameters(), search.table):
            tensor.fill_(-7)
    return [] if search() == -1 else [0]


@ray.remote(num_cpus=0.1)
class Writer:
    """Loads the newest version and overwrites it."""

    def write(self, name: str) -> list[int]:
        search = zerocopy.lookup(name).load()
        first = search()
        return [first, *write(search)]


def churn(seconds: float) -> Outcome:
    """Run readers, followers, tasks and writers while versions are published."""
    name = "churn"
    zerocopy.publish(numbered(1, width=WIDTH), name=name)
    latest, state = zerocopy.lookup(name), Churn(seconds)
    following, asked, writers = Following.remote(latest), Asked.remote(latest), [Writer.remote() for _ in range(2)]
    callers: list[Callable[[], list[int]]] = [
        lambda: ray.get([following.ask.remote(), asked.ask.remote()]),
        lambda: [latest.current()(), zerocopy.lookup(name).load()()],
        lambda: [ray.get(ask.remote(latest))],
        lambda: list(ask_for_item.map(latest, range(4))),
        *[lambda writer=writer: ray.get(writer.write.remote(name)) for writer in writers],
    ]
    threads = [threading.Thread(target=state.loop, args=[call]) for call in callers]
    threads.append(threading.Thread(target=state.publish, args=[name]))
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.monotonic() - start
    for failure in sorted(set(state.failures))[:5]:
        print(failure, file=sys.stderr)
    zerocopy.remove(name)
    wrong = state.seen["wrong"] + len(state.failures)
    return Outcome(
        f"{seconds:.0f} s of churn", state.seen["answers"], wrong, taken, f"{state.seen['versions']} versions published"
    )


def outcomes(actors: int, calls: int, items: int, turns: int, seconds: float) -> Iterator[Outcome]:
    """Run the measurements one after the other."""
    yield actors_at_once(actors)
    yield calls_in_flight(calls)
    yield through_map(items)
    yield rivals(turns)
    yield churn(seconds)


def section(found: list[Outcome]) -> str:
    """The section of the page."""
    rows = [f"| {one.what} | {one.count:,} | {one.wrong} | {one.seconds:.1f} | {one.figures} |" for one in found]
    words = (
        f"`nox -s soak` writes this table, measured on {os.cpu_count()} cores with Ray {ray.__version__}. "
        "During the churn, tasks, followers, `map` and two actors use a publication, while new versions are published as fast as "
        "possible. The two actors overwrite everything that they load."
    )
    return "\n".join(
        [
            HEADING,
            "",
            textwrap.fill(words, 128),
            "",
            "| what | loads, calls or answers | wrong or failed | seconds | details |",
            "| --- | ---: | ---: | ---: | --- |",
            *rows,
        ]
    )


def main() -> int:
    """Measure, print, write the page, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, help="the page to write the section into")
    options = parser.parse_args()
    ray.init("local", num_cpus=8, object_store_memory=1_000_000_000, include_dashboard=False, log_to_driver=False)
    found = []
    for outcome in outcomes(32, 1000, 5000, 10, options.seconds):
        print(outcome, flush=True)
        found.append(outcome)
    if options.output:
        renew(options.output, section(found))
    return int(any(one.wrong for one in found))


if __name__ == "__main__":
    sys.exit(main())
