"""Does the logger "zerocopy" write one line for each publish and each load?"""

from __future__ import annotations

import logging
import re

import pytest
import ray
from conftest import run_python
from torch import nn

import zerocopy

WHAT = r"(?P<what>published|loaded) (?P<name>.*): (?P<bytes>\d+) bytes in (?P<seconds>\d+\.\d{6}) s, isolation (?P<isolation>.*)"


def lines_of(records: list[logging.LogRecord]) -> list[tuple[str, ...]]:
    """The content of the log lines, without the seconds."""
    matches = [re.fullmatch(WHAT, record.getMessage()) for record in records if record.name == "zerocopy"]
    assert all(match is not None and float(match["seconds"]) > 0 for match in matches)
    return [match.group("what", "name", "bytes", "isolation") for match in matches if match is not None]


@zerocopy.actor(num_cpus=0.1)
class Listener:
    def __init__(self, model: nn.Linear, *, isolated: bool) -> None:
        self.model = model
        self.records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = self.records.append  # type: ignore[method-assign]
        logging.getLogger("zerocopy").addHandler(handler)
        logging.getLogger("zerocopy").setLevel(logging.INFO)

    def load(self, publication: zerocopy.Publication) -> list[tuple[str, ...]]:
        publication.load()
        return lines_of(self.records)


def test_a_publish_and_a_load_are_one_line_each(cluster: None, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each line has the name or else the class, the version, bytes, seconds and isolation."""
    with caplog.at_level(logging.INFO, "zerocopy"):
        zerocopy.publish(nn.Linear(8, 8), name=name).load()
        zerocopy.publish(nn.Linear(4, 4, bias=False)).load()
    assert lines_of(caplog.records) == [
        ("published", f"{name!r} version 1 (Linear)", "288", "holds"),
        ("loaded", f"{name!r} version 1 (Linear)", "288", "holds"),
        ("published", "Linear (no name)", "64", "holds"),
        ("loaded", "Linear (no name)", "64", "holds"),
    ]


def test_what_is_passed_is_told_when_it_is_published(cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline that is published because it is passed has one log line, and no line when it is passed again."""
    from pipelines import search

    one = search()
    with caplog.at_level(logging.INFO, "zerocopy"):
        ray.get([ray.put(one), ray.put(one)])
    (line, *others) = [told for told in lines_of(caplog.records) if told[0] == "published"]
    assert (line[1], others) == ("Search (no name)", [])


def test_workers_tell_theirs(cluster: None, name: str) -> None:
    """A worker writes a log line for each of its loads."""
    publication = zerocopy.publish(nn.Linear(8, 8), name=name)
    listener = Listener.remote(publication, isolated=True)
    assert ray.get(listener.load.remote(publication))[-1:] == [
        ("loaded", f"{name!r} version 1 (Linear)", "288", "holds")
    ]


@zerocopy.task(num_cpus=0.1)
def told(model: nn.Linear) -> int:
    global _handler  # noqa: PLW0603
    if _handler is None:
        _handler = _Count()
        logging.getLogger("zerocopy").addHandler(_handler)
        logging.getLogger("zerocopy").setLevel(logging.INFO)
    return _handler.loads


class _Count(logging.Handler):
    loads = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.loads += record.getMessage().startswith("loaded")


_handler: _Count | None = None


def test_calls_that_reuse_a_load_tell_nothing(cluster: None) -> None:
    """Calls that reuse a load write no log line; a worker loads at most twice."""
    publication = zerocopy.publish(nn.Linear(8, 8))
    counts = [told(publication) for _ in range(20)]
    assert counts[-1] <= 4


@pytest.mark.long
def test_nothing_is_printed_by_default() -> None:
    """Without a logging configuration no line is printed."""
    done = run_python(
        "import ray, zerocopy\n"
        "from torch import nn\n"
        "ray.init('local', num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, logging_level='ERROR')\n"
        "zerocopy.publish(nn.Linear(4, 4)).load()\n"
    )
    assert done.returncode == 0, done.stderr
    assert "isolation" not in done.stdout + done.stderr
