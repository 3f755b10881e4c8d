"""Do objects of the old class still work after a notebook cell has defined the class again?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zerocopy
from zerocopy.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("cluster")

PIPELINES = """
class Encoder(nn.Linear):
    def forward(self, value):
        return super().forward(value) * NUMBER

@zerocopy.pipeline
class Search:
    encoder: nn.Module = zerocopy.shared()
    def ask(self):
        return NUMBER
    @zerocopy.task
    def ask_remotely(self):
        return self.ask()
"""
USERS = """
from __future__ import annotations
@zerocopy.task
def ask(search: Search):
    return search.ask(), NUMBER
@zerocopy.task
def encode(encoder: Encoder):
    return float(encoder(torch.ones(2)).sum().detach())
@zerocopy.actor(num_cpus=0.1)
class Worker:
    def __init__(self, search: Search):
        self.search = search
    def ask(self, _):
        return self.search.ask(), NUMBER
"""
SLOTTED = """
@zerocopy.pipeline
class Slotted:
    __slots__ = ("encoder", *NAMES, "__weakref__")
    encoder: nn.Module
    def __init__(self, encoder):
        self.encoder = encoder
"""


class Notebook:
    """Runs cells like a notebook, in one namespace that acts as `__main__`."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {"__name__": "__main__", "zerocopy": zerocopy, "nn": nn, "torch": torch}

    def run(self, *cells: str, **values: Any) -> SimpleNamespace:
        """Run cells, with words in capitals replaced by values, and return all definitions."""
        for cell in cells:
            for word, value in values.items():
                cell = cell.replace(word, repr(value))  # noqa: PLW2901
            exec(cell, self._names)  # noqa: S102 (that is what a notebook does)
        return SimpleNamespace(**{name: value for name, value in self._names.items() if name[0] != "_"})


def test_instances_and_publications_of_the_old_class_are_taken() -> None:
    """Old instances and publications keep their code and are accepted where an annotation names the new class, and vice versa."""
    notebook = Notebook()
    first = notebook.run(PIPELINES, USERS, NUMBER=1)
    old = first.Search(encoder=nn.Linear(2, 2))
    publication = zerocopy.publish(old)
    assert first.ask(old) == (1, 1)
    second = notebook.run(PIPELINES, USERS, NUMBER=2)
    new = second.Search(encoder=nn.Linear(2, 2))

    class Derived(first.Search):  # type: ignore[misc,name-defined]
        pass

    assert type(old) is not second.Search
    for given in (old, publication, Derived(encoder=nn.Linear(2, 2))):
        assert second.ask(given) == (1, 2)
    assert second.ask(new) == (2, 2)
    assert first.ask(new) == (2, 1)
    assert list(second.ask.map([old, new])) == [(1, 2), (2, 2)]
    assert (old.ask_remotely(), new.ask_remotely()) == (1, 2)
    with second.Worker.pool(1, old) as pool:
        assert list(pool.map(first.Worker.ask, [0])) == [(1, 2)]
    with pytest.raises(ArgumentError, match="expects Search for 'search', got 'Encoder'"):
        second.ask(first.Encoder(2, 2))


def test_an_object_that_got_the_new_class_has_its_code_everywhere() -> None:
    """If `%autoreload` assigns a new `__class__`, the new code runs everywhere, although no tensor has changed."""
    notebook = Notebook()
    first = notebook.run(PIPELINES, USERS, NUMBER=1)
    encoder = first.Encoder(2, 2)
    search = first.Search(encoder=encoder)
    once = first.encode(encoder)
    assert first.ask(search) == (1, 1)
    second = notebook.run(PIPELINES, USERS, NUMBER=2)
    assert second.encode(encoder) == once
    encoder.__class__, search.__class__ = second.Encoder, second.Search
    assert second.encode(encoder) == pytest.approx(2 * once)
    assert second.ask(search) == (2, 2)


def test_named_versions(name: str) -> None:
    """A changed class is a new version that `refresh` applies to loaded pipelines; an unchanged class is the same version."""
    notebook = Notebook()
    encoder = nn.Linear(2, 2)
    first = zerocopy.publish(notebook.run(PIPELINES, NUMBER=1).Search(encoder=encoder), name=name)
    loaded = zerocopy.lookup(name).load()
    same = zerocopy.publish(notebook.run(PIPELINES, NUMBER=1).Search(encoder=encoder), name=name)
    assert same.version == first.version
    second = notebook.run(PIPELINES, NUMBER=2)
    assert zerocopy.publish(second.Search(encoder=encoder), name=name).version.number == 2
    assert loaded.ask() == 1
    assert zerocopy.refresh(loaded)
    assert loaded.ask() == 2
    assert isinstance(loaded, second.Search)


def test_what_cannot_become_the_new_class_says_so(name: str) -> None:
    """If the new class has other slots, `refresh` raises an error and leaves the object unchanged."""
    notebook = Notebook()
    zerocopy.publish(notebook.run(SLOTTED, NAMES=()).Slotted(nn.Linear(2, 2)), name=name)
    loaded = zerocopy.lookup(name).load()
    zerocopy.publish(notebook.run(SLOTTED, NAMES=("more",)).Slotted(nn.Linear(3, 3)), name=name)
    with pytest.raises(ArgumentError, match="Slotted was defined again, and objects of the old class cannot"):
        zerocopy.refresh(loaded)
    assert loaded.encoder.weight.shape == (2, 2)
