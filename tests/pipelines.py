"""Which pipelines, tasks and actors do many tests use? Workers import this module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy.testing import assert_zero_copy

if TYPE_CHECKING:
    from nowhere import OnlyForTypeCheckers


def encoder(width: int = 256, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


@zerocopy.pipeline
class Search:
    encoder: nn.Module = shared()
    index: torch.Tensor = shared()
    settings: dict[str, Any] = copied()
    top_k: int = copied(default=5)

    @torch.no_grad()
    def __call__(self, query: float) -> float:
        return float(self.encoder(self.index * query).sum()) + self.top_k

    @zerocopy.task
    def rank(self, query: float, scale: float = 1.0) -> float:
        """Rank remotely."""
        return self(query) * scale

    @zerocopy.task
    def where(self) -> tuple[int, int]:
        return os.getpid(), self.unwrapped()

    def unwrapped(self) -> int:
        return os.getpid()


class Narrow(Search):
    """An undecorated subclass."""

    def __call__(self, query: float) -> float:
        return -super().__call__(query)

    @zerocopy.task
    def rank(self, query: float) -> float:  # type: ignore[override]
        return super().rank(query)


@ray.remote
def plain_answer(search: Search, query: float) -> float:
    """A plain remote function, whose pipeline arrives loaded."""
    assert_zero_copy(search)
    return search(query)


@ray.remote
def top_k_and_mode(search: Search) -> tuple[int, bool, bool]:
    return search.top_k, search.encoder.training, search.encoder[0].weight.requires_grad


def search(width: int = 256, cls: type[Search] = Search, **changes: Any) -> Search:
    parts = {"encoder": encoder(width), "index": torch.ones(2, width), "settings": {"mode": "exact"}}
    return cls(**{**parts, **changes})


@zerocopy.pipeline
class Assistant:
    """A pipeline with its own `__init__`: undeclared attributes follow the automatic rule."""

    def __init__(self, width: int = 64) -> None:
        self.models = {"draft": encoder(width, 1), "final": [encoder(width, 2)]}
        self._hidden = encoder(width, 3)
        self.history: list[str] = []
        self.table = torch.arange(4.0)


@zerocopy.task(num_cpus=1)
def answer(pipeline: Search, query: float) -> float:
    """Answer a query."""
    return pipeline(query)


@zerocopy.task
def factorial(number: int) -> int:
    return 1 if number < 2 else number * factorial(number - 1)


@zerocopy.task
def stream(pipeline: Search, count: int) -> Iterator[float]:
    for number in range(count):
        yield pipeline(number)


@zerocopy.task
def annotated_for_type_checkers(pipeline: OnlyForTypeCheckers, module: nn.Module) -> str:
    return type(module).__name__


@zerocopy.actor(num_cpus=0.1, max_restarts=1)
class Worker:
    def __init__(self, pipeline: Search, limit: int = 10) -> None:
        self.pipeline = pipeline
        self.limit = limit

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"answer": [self.pipeline(float(query)) for query in batch["query"]]}

    def ask(self, query: float) -> float:
        return self.pipeline(query)

    async def ask_async(self, query: float) -> float:
        return self.pipeline(query)

    def stream(self, count: int) -> Iterator[float]:
        for number in range(count):
            yield self.pipeline(number)

    def bias(self, add: float = 0.0) -> float:
        with torch.no_grad():
            self.pipeline.encoder[0].bias.add_(add)
        return float(self.pipeline.encoder[0].bias.sum())

    def pid(self) -> int:
        return os.getpid()

    def fail(self, message: str) -> None:
        raise ValueError(message)


@zerocopy.actor(num_cpus=0.1)
class Annotated:
    """An actor without an `__init__`."""

    pipeline: Search
    limit: int = 3

    def ask(self, query: float) -> float:
        return self.pipeline(query) + self.limit


class Typed(zerocopy.Actor):
    """An actor that derives from `zerocopy.Actor`, which type checkers understand."""

    def __init__(self, pipeline: Search) -> None:
        self.pipeline = pipeline

    def ask(self, query: float) -> float:
        return self.pipeline(query)


class Louder(Worker):
    """An undecorated subclass with its own `__init__`."""

    def __init__(self, pipeline: Search) -> None:
        self.seen = type(pipeline).__name__
        super().__init__(pipeline, limit=99)

    def told(self) -> tuple[str, int]:
        return self.seen, self.limit
