"""How do tests see the version of an answer? Every weight and a copied field of these pipelines are the version's number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared

WIDTH = 128


@zerocopy.pipeline
class Numbered:
    encoder: nn.Module = shared()
    table: torch.Tensor = shared()
    number: int = copied()

    @torch.no_grad()
    def __call__(self) -> int:
        """The number, if all weights and the copied field have it; -1 for a mixture."""
        tensors = [*self.encoder.parameters(), *self.encoder.buffers(), self.table]
        found = {float(value) for tensor in tensors for value in (tensor.min(), tensor.max())}
        return self.number if found == {float(self.number)} else -1


class Other(Numbered):
    """A pipeline of another class."""


def numbered(number: int, *, layers: int = 4, width: int = WIDTH, cls: type[Numbered] = Numbered) -> Numbered:
    encoder = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(number)
    return cls(encoder=encoder, table=torch.full((width, 8), float(number)), number=number)


def build_seven() -> Numbered:
    return numbered(7)


@zerocopy.actor(num_cpus=0.1, follow=True, max_restarts=2)
class Following:
    """A sync actor whose pipeline is replaced between calls."""

    def __init__(self, search: Numbered) -> None:
        self.search = search
        self.versions: list[int] = []

    def ask(self) -> int:
        first, second = self.search(), self.again()
        return first if first == second else -1

    def again(self) -> int:
        return self.search()

    def stream(self, count: int) -> Iterator[int]:
        for _ in range(count):
            time.sleep(0.02)
            yield self.search()

    def on_version(self, search: Numbered) -> None:
        self.versions.append(search.number)

    def heard_of(self) -> list[int]:
        return self.versions


@zerocopy.actor(num_cpus=0.1)
class Asked:
    """A sync or threaded actor that asks for the newest version."""

    def __init__(self, search: zerocopy.Live[Numbered]) -> None:
        self.search = search

    def ask(self) -> int:
        search = self.search.current()
        first = search()
        time.sleep(0.002)
        return first if first == search() else -1

    def stream(self, count: int) -> Iterator[int]:
        search = self.search.current()
        for _ in range(count):
            time.sleep(0.02)
            yield search()

    def version(self) -> Any:
        return zerocopy.version_of(self.search.current())


@zerocopy.actor(num_cpus=0.1)
class AskedAsync:
    """An async actor that asks for the newest version."""

    def __init__(self, search: zerocopy.Live[Numbered]) -> None:
        self.search = search

    async def ask(self) -> int:
        search = self.search.current()
        first = search()
        await asyncio.sleep(0.002)
        return first if first == search() else -1


@zerocopy.task(num_cpus=0.1)
def ask(search: Numbered) -> int:
    return search()


@zerocopy.task(num_cpus=0.1)
def ask_for_item(search: Numbered, item: int) -> int:
    time.sleep(0.05)
    return search()


@zerocopy.task(num_cpus=0.1)
def ask_live(search: zerocopy.Live[Numbered]) -> int:
    return search.current()()


@zerocopy.actor
class Batches:
    """For `map_batches`."""

    def __init__(self, search: zerocopy.Live[Numbered]) -> None:
        self.search = search

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.01)
        return {"answer": [self.search.current()()] * len(batch["id"])}
