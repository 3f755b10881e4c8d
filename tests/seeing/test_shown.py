"""What does a user see when objects are printed, or shown in a notebook?"""

from __future__ import annotations

import re
import socket

import pipelines
import pytest
from conftest import run_python
from torch import nn

import zerocopy
from zerocopy._cluster.following import Fixed
from zerocopy._cluster.listing import Publications

pytestmark = pytest.mark.usefixtures("cluster")


class Plain:
    def __init__(self) -> None:
        self.encoder = nn.Linear(1, 1)


def test_reprs_say_what_matters() -> None:
    """The `repr` of each object is one short line without memory addresses."""
    search = pipelines.search(width=8)
    shown = {
        repr(pipelines.answer): "<zerocopy.Task answer(pipeline: 'Search', query: 'float') -> 'float', num_cpus=1>",
        repr(
            pipelines.answer.options(num_cpus=2)
        ): "<zerocopy.Task answer(pipeline: 'Search', query: 'float') -> 'float', num_cpus=2>",
        repr(
            search.rank
        ): "<zerocopy.Task Search.rank(self, query: 'float', scale: 'float' = 1.0) -> 'float', bound to a Search>",
        repr(pipelines.Worker.options(num_cpus=2)): "<zerocopy.Launcher of Worker, num_cpus=2>",
        repr(zerocopy.Pool(pipelines.Worker, [])): "<zerocopy.Pool of Worker actors: closed>",
        repr(Fixed(search)): "<zerocopy.Live Search, which has one version>",
        repr(zerocopy.TaskWrapper(Plain())): "<zerocopy.TaskWrapper of Plain>",
        repr(zerocopy.Version("search", 2, "1f")): "Version(name='search', number=2, digest='1f')",
    }
    assert list(shown) == list(shown.values())


def test_publications_show_as_a_table_in_notebooks(name: str) -> None:
    """Publications show as a table, also named and closed ones; an empty list shows a text."""
    publication = zerocopy.publish(nn.Linear(8, 8))
    named = zerocopy.publish(nn.Linear(8, 8), name=name)
    cells = [re.findall("<td.*?>(.*?)</td>", one._repr_html_()) for one in (publication, named, zerocopy.lookup(name))]
    assert cells == [
        ["Linear", "288 bytes"],
        [name, "version 1", "Linear", "288 bytes"],
        [name, "follows &#x27;latest&#x27;", "Linear", "288 bytes"],
    ]
    publication.close()
    assert "closed" in publication._repr_html_()
    assert "0x" not in repr(named) + repr(zerocopy.lookup(name)) + repr(publication)
    assert Publications(())._repr_html_() == "<p>No publication has a name.</p>"


def test_it_says_that_it_has_started_ray(address: str) -> None:
    """One message says that zerocopy has started Ray, and how to start it yourself."""
    program = (
        "from torch import nn\nimport zerocopy\nzerocopy.publish(nn.Linear(2, 2))\nzerocopy.publish(nn.Linear(2, 2))\n"
    )
    done = run_python(program, RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("zerocopy has called ray.init()") == 1
    assert address in done.stderr
    assert "Call ray.init(...) first" in done.stderr


def test_lookups_start_no_ray() -> None:
    """Lookups join a cluster but never start one; if none runs they fail at once, also if RAY_ADDRESS names an ended one."""
    program = (
        "import ray, zerocopy\n"
        "for call in (zerocopy.publications, lambda: zerocopy.lookup('a'), lambda: zerocopy.remove('a')):\n"
        "    try:\n        call()\n"
        "    except zerocopy.errors.ZeroCopyError as error:\n        print(error, ray.is_initialized())\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as ended:
        port = ended.getsockname()[1]
    done = run_python(program, RAY_ADDRESS=f"127.0.0.1:{port}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("no Ray cluster runs on this machine" in line and line.endswith("False") for line in lines)
