"""How do weights get a name? They are written shard by shard, each is made the registry's own, and one commit makes a version.

Until the commit only this process refers to them. So if it ends before, nothing is left.
"""

from __future__ import annotations

import collections
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import ray
import ray.cloudpickle

from zerocopy._cluster import client
from zerocopy._cluster.digests import digest_of_version
from zerocopy._cluster.following import node
from zerocopy._cluster.handles import Tag
from zerocopy._cluster.names import LATEST
from zerocopy._cluster.shards import Given, Row
from zerocopy._cluster.storing import store_all
from zerocopy._publish.publish import requires_isolation
from zerocopy._publish.weights import Streamed, manifest_for
from zerocopy._split.introspect import Introspection
from zerocopy._store import object_store
from zerocopy._store.manifest import Placement, Versions
from zerocopy._store.storages import Storage, digest_of_bytes
from zerocopy._store.write import STREAMED, Placements, Writer, layout


@attrs.frozen(kw_only=True)
class Commit:
    """What a user asks for when publishing under a name.

    Attributes:
        aliases: shall point at the version, beside "latest".
        expect: number of the version that "latest" is expected to point at, 0 for none; None for any.
        keep: how many versions stay that no alias points at; None for as before.
        job: the job that the name ends with, or None.
        source: a call that offers what is missing of the version, pickled; or None.
        request: tells this commit from all others.
    """

    name: str
    aliases: Sequence[str] = ()
    expect: int | None = None
    keep: int | None = None
    job: str | None = None
    source: bytes | None = None
    request: str = attrs.field(factory=lambda: uuid.uuid4().hex)


class Named:
    """Where weights are written that get a name: a `Destination`. It serves one try, with one registry."""

    def __init__(self, commit: Commit) -> None:
        self.commit = commit
        self.registry = client.registry()
        self.digests: list[bytes] = []
        self.found: Introspection | None = None

    def stored(self, found: Introspection) -> dict[object, Placement]:
        """Where those storages are that the registry has, by key."""
        return self.stored_of(Streamed(found))

    def stored_of(self, streamed: Streamed) -> dict[object, Placement]:
        """The same of what is in memory only while it is read."""
        found = streamed.found
        self.found, self.digests = found, digests_of(streamed)
        shards, rows = client.ask_one(self.registry, "have", self.commit.name, self.content(), self.digests)
        places: dict[bytes, list[Placement]] = collections.defaultdict(list)
        for digest, shard, buffer, offset in rows:
            places[digest].append(Placement(shards[shard], buffer, offset))
        by_storage = zip(found.table.storages, self.digests, strict=True)
        # Two equal storages are different memory: each has a place of its own.
        return {
            storage.key: places[digest].pop() for storage, digest in by_storage if storage.nbytes and places[digest]
        }

    def storages(self) -> list[tuple[bytes, int]]:
        """Digest and bytes of each storage."""
        return [(digest, s.nbytes) for digest, s in zip(self.digests, self._introspection.table.storages, strict=True)]

    def content(self) -> bytes:
        """The digest of the version."""
        found = self._introspection
        agreement = requires_isolation(), *Versions.here().essence()
        return digest_of_version(manifest_for(found), self.storages(), found.outer, agreement)

    @property
    def pipeline(self) -> Any:
        """What is published."""
        return self._introspection.pipeline

    @property
    def _introspection(self) -> Introspection:
        if self.found is None:
            raise RuntimeError("`stored` comes first")
        return self.found

    def make_writer(self, *args: Any) -> Writer:
        """What writes the other storages, and commits."""
        return _Writer(self, *args)

    def commit_with(self, shards: Sequence[Given]) -> dict[str, Any]:
        """Make what was written a version. Returns what the registry tells of it."""
        found, commit = self._introspection, self.commit
        content = {
            "digest": self.content(),
            "request": commit.request,
            "storages": self.storages(),
            "description": ray.cloudpickle.dumps(manifest_for(found).description()),
            "outer": ray.cloudpickle.dumps(found.outer),
            "told": _told(found),
            "source": commit.source,
            "runtime_env": dict(ray.get_runtime_context().runtime_env) if commit.source is not None else {},
        }
        told: dict[str, Any] = client.ask_one(
            self.registry,
            "commit",
            commit.name,
            content,
            shards,
            commit.aliases,
            commit.expect,
            commit.keep,
            commit.job,
        )
        return told


def _told(found: Introspection) -> dict[str, Any]:
    """What tables and handles say of a version, in builtins."""
    return {
        "kind": type(found.pipeline).__name__,
        "shared_bytes": found.table.nbytes,
        "requires_isolation": requires_isolation(),
        "versions": attrs.astuple(Versions.here()),
        "created": time.time(),
        "node": node(),
    }


def digests_of(streamed: Streamed) -> list[bytes]:
    """The digest of each storage."""
    storages = streamed.found.table.storages
    digests = [digest_of_bytes(b"")] * len(storages)
    for shard in layout([storage.nbytes for storage in storages], streamed.found.root_ends, STREAMED):
        sources = [storages[index] for index in shard]
        streamed.fill(sources)
        for index, source in zip(shard, sources, strict=True):
            digests[index] = digest_of_bytes(source.to_bytes())
        streamed.drop(sources)
    return digests


class _Writer(Writer):
    """Writes storages, makes them the registry's own, and commits."""

    def __init__(self, target: Named, *args: Any) -> None:
        super().__init__(*args)
        self._target = target
        self._given: list[Given] = []
        needed = sum(self._storages[index].nbytes for shard in self.shards for index in shard)
        if needed:
            object_store.warn_of_little_room(needed, type(target.pipeline).__name__)

    @property
    def borrowed(self) -> list[ray.ObjectRef[Any]]:
        return list({place.shard: None for place in self.placements.values()})

    def write_all(self, fill: Callable[[Sequence[Storage]], None] = lambda _: None) -> Iterator[Placements]:
        """As `Writer.write_all`. The next shard is written while the registry's task stores the last one."""
        shards = iter(self.shards)

        def sources() -> Iterator[list[Storage]]:
            for shard in self.shards:
                storages = [self._storages[index] for index in shard]
                fill(storages)
                yield storages

        for shard, given in zip(shards, store_all(self._target.registry, sources()), strict=True):
            yield self._stored(shard, given)

    def _stored(self, shard: Sequence[int], given: Given) -> Placements:
        (ref,), rows = given
        for index, (digest, *_) in zip(shard, rows, strict=True):
            self._target.digests[index] = digest  # of what was written, though somebody may have written meanwhile
        self._given.append(given)
        return self._note(ref, {i: (buffer, offset) for i, (_, buffer, offset, _) in zip(shard, rows, strict=True)})

    def finish(self) -> ray.ObjectRef[Any]:
        """Commit. Returns the reference to the manifest, which the registry makes."""
        commit = self._target.commit
        told = self._target.commit_with([*self._given, *self._reused()])
        alias = next(iter(commit.aliases), LATEST)
        self.tag = Tag(commit.name, told["number"], alias, digest=told["digest"].hex())
        reference: ray.ObjectRef[Any] = told["reference"][0]
        return reference

    def _reused(self) -> list[Given]:
        rows: dict[ray.ObjectRef[Any], list[Row]] = collections.defaultdict(list)
        for placed in self.stored:
            for index, place in placed.items():
                row = (self._target.digests[index], place.buffer, place.offset, self._storages[index].nbytes)
                rows[place.shard].append(row)
        return [([shard], found) for shard, found in rows.items()]
