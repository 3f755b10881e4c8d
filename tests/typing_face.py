"""Are the types of all public names right? mypy and pyright check this file; it is not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, assert_type

import ray
import torch
from torch import nn

import zerocopy
from zerocopy import Copied, Shared, copied, shared
from zerocopy.testing import assert_zero_copy, shares_memory


@zerocopy.pipeline
class Search:
    encoder: nn.Module = shared()
    index: torch.Tensor = shared(device="auto")
    head: Shared[nn.Linear] = shared(kw_only=True)
    config: Copied[dict[str, int]] = copied(factory=dict)
    label: Annotated[str, copied()] = copied(default="a")
    top_k: int = copied(default=5)

    def __call__(self, query: str) -> list[str]:
        return [query] * self.top_k

    @zerocopy.task
    def rank(self, query: str, *, limit: int = 3) -> list[str]:
        return self(query)[:limit]


@zerocopy.pipeline(kw_only=True)
class Other:
    encoder: nn.Module = shared()


@zerocopy.task
def answer(search: Search, query: str) -> list[str]:
    return search(query)


@zerocopy.task(num_cpus=2, device="auto")
def answer_with_options(search: Search, query: str) -> list[str]:
    return search(query)


@zerocopy.actor(num_cpus=1, max_restarts=2, device="cuda")
class Worker:
    def __init__(self, search: Search, limit: int = 10) -> None:
        self.search = search
        self.limit = limit

    def ask(self, query: str) -> list[str]:
        return self.search(query)


@zerocopy.actor
class Bare:
    search: Search


class Typed(zerocopy.Actor):
    def __init__(self, search: Search, limit: int = 10) -> None:
        self.search = search

    def ask(self, query: str) -> list[str]:
        return self.search(query)


def declaring(encoder: nn.Module, linear: nn.Linear) -> Search:
    search = Search(encoder=encoder, index=torch.ones(1), head=linear)
    assert_type(search.top_k, int)
    assert_type(search.encoder, nn.Module)
    assert_type(zerocopy.fields(Search)["encoder"].policy, zerocopy.Policy)
    Other(encoder=encoder)
    return search


def looking(search: Search) -> int:
    plan = zerocopy.plan(search)
    assert_type(plan, zerocopy.SharePlan)
    assert_type(plan.entries, tuple[zerocopy.PlanEntry, ...])
    print(plan, plan.copied_bytes, zerocopy.memory_report().total)
    verified = zerocopy.plan(search, verify=True)
    assert_type(verified.view_bytes, int | None)
    assert_type(verified.written_bytes, int | None)
    assert_type(verified.entries[0].views, int | None)
    assert_type(verified.entries[0].copied, int | None)
    assert_type(verified.entries[0].pickled, int)
    return plan.shared_bytes


def publishing(search: Search) -> Any:
    with zerocopy.publish(search) as publication:
        assert_type(publication, zerocopy.Publication[Search])
        assert_type(publication.current("cuda"), Search)
        loaded = publication.load(device="cpu", fields=["encoder"])
    assert_type(loaded, Search)
    publication.close()
    zerocopy.unshare(loaded)
    assert_zero_copy(loaded)
    assert_type(shares_memory(loaded, search), bool)
    return loaded


def tasks(search: Search) -> None:
    assert_type(answer(search, "q"), list[str])
    assert_type(answer.remote(search, "q"), ray.ObjectRef[list[str]])
    assert_type(answer.options(num_cpus=2)(search, query="q"), list[str])
    assert_type(answer.map(search, ["q"], max_in_flight=3), Iterator[list[str]])
    assert_type(answer.local(search, "q"), list[str])
    assert_type(answer_with_options(search, "q"), list[str])
    assert_type(search.rank("q", limit=2), list[str])
    assert_type(search.rank.local("q"), list[str])
    assert_type(search.rank.options(num_cpus=1)("q"), list[str])
    search.rank.remote("q")
    answer(search, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    search.rank()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


class Marked(zerocopy.Actor):
    def ask(self, query: str, limit: int = 3) -> list[str]:
        return [query] * limit

    async def later(self, query: str) -> int:
        return len(query)

    @zerocopy.method
    def rank(self, query: str, *, limit: int = 3) -> list[str]:
        return [query] * limit

    @zerocopy.method
    async def soon(self, query: str) -> int:
        return len(query)

    @zerocopy.method
    def stream(self, query: str) -> Iterator[str]:
        yield query

    @zerocopy.method(concurrency_group="io")
    def grouped(self, query: str) -> bytes:
        return query.encode()

    @ray.method
    def rays(self, query: str) -> int:
        return len(query)


def actors(search: Search) -> None:
    Worker(search).ask("q")
    assert_type(Typed.remote(search, limit=3), zerocopy.Handle[Typed])
    assert_type(Typed.options(num_cpus=2).remote(search), zerocopy.Handle[Typed])
    assert_type(Typed.pool(4, search), zerocopy.Pool[Typed])
    with Typed.pool(4, search) as pool:
        for result in pool.map("ask", ["q"]):
            print(result)
    Typed.remote("search")  # pyright: ignore[reportArgumentType]


def handles() -> None:
    worker = Marked.remote()
    assert_type(worker.ask.remote("q"), ray.ObjectRef[Any])
    assert_type(worker.ask.options(num_returns=1).remote("q"), ray.ObjectRef[Any])
    assert_type(ray.get(worker.ask.remote("q")), Any)
    ray.kill(worker)
    known = zerocopy.typed(worker)
    assert_type(known.rank.remote("q", limit=2), ray.ObjectRef[list[str]])
    assert_type(known.rank.options(num_returns=1).remote("q"), ray.ObjectRef[list[str]])
    assert_type(known.soon.remote("q"), ray.ObjectRef[int])
    assert_type(known.stream.remote("q"), ray.ObjectRefGenerator)
    assert_type(known.grouped.remote("q"), ray.ObjectRef[bytes])
    assert_type(known.rays.remote("q"), ray.ObjectRef[int])
    assert_type(Marked().rank("q", limit=2), list[str])
    known.rank.remote(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    known.rank.remote("q", most=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    known.rays.remote(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    known.nothing.remote("q")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    known.ask.remote("q")  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]
    Marked().rank(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def pools() -> None:
    pool = Marked.pool(2)
    assert_type(pool[0], zerocopy.Handle[Marked])
    assert_type([worker.ask.remote("q") for worker in pool], list[ray.ObjectRef[Any]])
    assert_type(pool.map("ask", ["q"], progress=False), Iterator[Any])
    assert_type(pool.map(Marked.ask, ["q"]), Iterator[list[str]])
    assert_type(pool.map(Marked.later, ["q"], max_in_flight=2), Iterator[int])
    assert_type(pool.map(Marked.rank, ["q"]), Iterator[list[str]])
    assert_type(pool.map(Marked.soon, ["q"]), Iterator[int])
    pool.map(Marked.ask, [3])  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    pool.map(Marked.rank, [3])  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    pool.map(Typed.ask, ["q"])  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]


@zerocopy.actor(follow=True, num_cpus=1)
class Following:
    def __init__(self, search: Search) -> None:
        self.search = search

    def on_version(self, search: Search) -> None:
        search.encoder.eval()


class Newest(zerocopy.Actor):
    def __init__(self, search: zerocopy.Live[Search]) -> None:
        self.search = search

    def ask(self, query: str) -> list[str]:
        search = self.search.current()
        assert_type(search, Search)
        return search(query)


@zerocopy.task
def newest(search: zerocopy.Live[Search], query: str) -> list[str]:
    return search.current()(query)


def build() -> Search:
    raise NotImplementedError


def naming(search: Search) -> None:
    publication = zerocopy.publish(
        search, name="search", alias="canary", source=build, expect=0, keep=3, lifetime="job", adopt=True
    )
    assert_type(publication, zerocopy.NamedPublication[Search])
    assert_type(publication.load(verify=True), Search)
    assert_type(zerocopy.publish(search, name="search").version.number, int)
    assert_type(zerocopy.publish(search, adopt=True), zerocopy.Publication[Search])
    files = zerocopy.publish_checkpoint(build, "dir/*.safetensors", dtype=torch.bfloat16, name="search", keep=1)
    assert_type(files, zerocopy.NamedPublication[Search])
    assert_type(zerocopy.publish_checkpoint(build, ["file"]), zerocopy.Publication[Search])
    zerocopy.publish_checkpoint(
        build, {"encoder": "dir"}, strict=False, ignore="*.bias", rename={"bert.": ""}, train=True
    )
    zerocopy.publish_checkpoint(build, "last.ckpt", key="ema", rename=lambda name: name or None)
    zerocopy.publish(search, name="search", lifetime="for ever")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def looking_up() -> None:
    handle = zerocopy.lookup("search")
    assert_type(handle, zerocopy.NamedPublication)
    assert_type(zerocopy.lookup("search", alias="canary").alias, str | None)
    assert_type(zerocopy.lookup("search", version=1).version, zerocopy.Version)
    assert_type(zerocopy.set_alias("search", "latest", version=1).digest, str)
    zerocopy.set_alias("search", "latest", to="canary")
    for published in zerocopy.publications():
        assert_type(published.version.name, str)
        assert_type(published.aliases, tuple[str, ...])
    assert_type(zerocopy.publications().names, list[str])
    # Only the cluster knows the class of a named pipeline, so an annotation declares it.
    search: Search = handle.load(fields=["encoder"], verify=True)
    current: Search = handle.current("auto")
    assert_type(zerocopy.version_of(search), zerocopy.Version | None)
    assert_type(zerocopy.refresh(current), bool)
    zerocopy.remove("search")
    zerocopy.remove("search", version=1)


def following(search: Search, handle: zerocopy.Publication) -> None:
    Following(search).search("q")
    # At run time each argument is converted to what its parameter declares, but type checkers do not know this conversion.
    Newest.remote(handle)
    newest(handle, "q")
    Typed.remote(handle)  # pyright: ignore[reportArgumentType]
    answer(handle, "q")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Newest.remote(search)  # pyright: ignore[reportArgumentType]
    newest(search, "q")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def errors() -> tuple[type[Exception], ...]:
    return zerocopy.errors.ZeroCopyError, zerocopy.errors.CannotTravelError


def categories() -> tuple[type[Warning], ...]:
    return zerocopy.errors.CopyWarning, zerocopy.errors.IsolationWarning
