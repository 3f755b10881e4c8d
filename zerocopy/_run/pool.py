"""How are calls spread over several actors of one class, which share one copy of the weights?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, Generic, NoReturn, Self, TypeVar, overload

import ray

from zerocopy._compat.cpython import warn_caller
from zerocopy._compat.ray import has_process
from zerocopy._run.checks import check_in_flight, check_items
from zerocopy._run.methods import GENERATED, Handle
from zerocopy._run.results import in_order
from zerocopy._words import nearest
from zerocopy.errors import ArgumentError, NotExposedError

T = TypeVar("T")
R = TypeVar("R")
Item = TypeVar("Item")


class Pool(Generic[T]):
    """Actors of one class that share one copy of the weights. `.pool` returns it, and `close()` ends the actors."""

    def __init__(self, cls: type[T], actors: list[Handle[T]]) -> None:
        self._cls = cls
        self.actors = actors

    @overload
    def map(
        self, method: str, items: Iterable[Any], *, max_in_flight: int | None = ..., progress: bool = ...
    ) -> Iterator[Any]: ...
    @overload
    def map(
        self,
        method: Callable[[T, Item], Coroutine[Any, Any, R]],
        items: Iterable[Item],
        *,
        max_in_flight: int | None = ...,
        progress: bool = ...,
    ) -> Iterator[R]: ...
    @overload
    def map(
        self,
        method: Callable[[T, Item], R],
        items: Iterable[Item],
        *,
        max_in_flight: int | None = ...,
        progress: bool = ...,
    ) -> Iterator[R]: ...
    def map(
        self,
        method: str | Callable[..., Any],
        items: Iterable[Any],
        *,
        max_in_flight: int | None = None,
        progress: bool = True,
    ) -> Iterator[Any]:
        """Call a method for each of `items`, on one actor after the other. The items are iterated lazily.

        Yields the results in order. The first error cancels the calls in flight and is raised.

        Args:
            method: the name of the method, or the method of the class (`Worker.ask`). For the latter, type checkers check the
                items and the results.
            items: the arguments of the calls, one per call.
            max_in_flight: the maximum number of calls in flight. The default is two per actor.
            progress: whether to show a progress bar on a terminal or in a notebook.

        Raises:
            ArgumentError: the class has no such method, the pool is closed, `items` cannot be iterated or is a string, or
                `max_in_flight` is not a positive number.
        """
        if not self.actors:
            cls = self._cls.__name__
            raise ArgumentError(f"This pool of {cls} was closed.", hint=f"start another one with {cls}.pool(...).")
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        if not callable(getattr(self._cls, name, None)):
            methods = [one for one in dir(self._cls) if not one.startswith("_") and one not in GENERATED]
            raise ArgumentError(f"{self._cls.__name__} has no method {name!r}.", hint=nearest(name, methods))
        hint = f"pass a list, or any other iterable; for one call write pool[0].{name}.remote(...)."
        check_items(items, f"pool.map({name!r}, items) iterates `items`", hint)
        check_in_flight(max_in_flight)
        turns = itertools.cycle(self.actors)
        limit = max_in_flight or 2 * len(self.actors)

        def submit(item: Any) -> ray.ObjectRef[Any]:
            ref: ray.ObjectRef[Any] = getattr(next(turns), name).remote(item)
            return ref

        description = f"{self._cls.__name__}.{name}"
        return in_order(submit, items, limit, description, progress=progress, when_slow=self._warn_of_waiting)

    def _warn_of_waiting(self) -> None:
        """Warn of actors that the cluster has no room for. Calls to them wait, possibly forever."""
        waiting = sum(not has_process(actor) for actor in self.actors)
        if waiting:
            cls, resources = self._cls.__name__, ray.cluster_resources()
            total = ", ".join(f"{resources[one]:g} {one}" for one in ("CPU", "GPU") if one in resources)
            warn_caller(
                f"{waiting} of {len(self)} {cls} actors still wait for resources, and calls wait for these actors. The cluster "
                f"has {total}. Hint: make the pool smaller, or let each actor ask for less: "
                f"{cls}.options(num_cpus=0.5).pool({len(self)}, ...)."
            )

    def close(self) -> None:
        """End the actors. Closing twice is allowed."""
        actors, self.actors = self.actors, []
        for actor in actors:
            ray.kill(actor)

    def __len__(self) -> int:
        return len(self.actors)

    def __iter__(self) -> Iterator[Handle[T]]:
        return iter(self.actors)

    def __getitem__(self, position: int) -> Handle[T]:
        return self.actors[position]

    def __getattr__(self, name: str) -> NoReturn:
        cls = vars(self).get("_cls")
        if cls is None or not callable(getattr(cls, name, None)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise NotExposedError(
            f"A pool cannot call {name!r} of {cls.__name__} directly.",
            hint=f"write pool.map({name!r}, items), or pool[0].{name}.remote(...) for one actor.",
            attribute=name,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{len(self)} {self._cls.__name__} actors" if self.actors else f"{self._cls.__name__} actors: closed"
        return f"<zerocopy.Pool of {state}>"
