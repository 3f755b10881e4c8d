"""How do weights get a name? They are stored shard by shard, so that the registry owns them, and one commit creates a version.

Until the commit, only this process refers to the shards. So if it ends before the commit, nothing is left.
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
    """The checked arguments of a call that publishes under a name.

    Attributes:
        aliases: the aliases that will point at the version, in addition to "latest".
        expect: number of the version that "latest" must point at, 0 for none; None for any.
        keep: how many versions stay, in addition to those that an alias points at; None for as before.
        job: id of the job. When the job ends, the name is removed. None if the name stays.
        source: a call that uploads missing storages of the version, pickled; or None.
        request: id of this commit.
    """

    name: str
    aliases: Sequence[str] = ()
    expect: int | None = None
    keep: int | None = None
    job: str | None = None
    source: bytes | None = None
    request: str = attrs.field(factory=lambda: uuid.uuid4().hex)


class Named:
    """The `Destination` of weights that get a name. It is for one try, with one registry."""

    def __init__(self, commit: Commit) -> None:
        self.commit = commit
        self.registry = client.registry()
        self.digests: list[bytes] = []
        self.found: Introspection | None = None

    def stored(self, found: Introspection) -> dict[object, Placement]:
        """Return the places of the storages that the registry has, by key."""
        return self.stored_of(Streamed(found))

    def stored_of(self, streamed: Streamed) -> dict[object, Placement]:
        """Like `stored`, for storages that are in memory only while they are read."""
        found = streamed.found
        self.found, self.digests = found, digests_of(streamed)
        shards, rows = client.ask_one(self.registry, "have", self.commit.name, self.content(), self.digests)
        places: dict[bytes, list[Placement]] = collections.defaultdict(list)
        for digest, shard, buffer, offset in rows:
            places[digest].append(Placement(shards[shard], buffer, offset))
        by_storage = zip(found.table.storages, self.digests, strict=True)
        # Two equal storages are different memory, so each gets its own place.
        return {
            storage.key: places[digest].pop() for storage, digest in by_storage if storage.nbytes and places[digest]
        }

    def storages(self) -> list[tuple[bytes, int]]:
        """Return digest and number of bytes of each storage."""
        return [(digest, s.nbytes) for digest, s in zip(self.digests, self._introspection.table.storages, strict=True)]

    def content(self) -> bytes:
        """The digest of the version."""
        found = self._introspection
        agreement = requires_isolation(), *Versions.here().essence()
        return digest_of_version(manifest_for(found), self.storages(), found.outer, agreement)

    @property
    def pipeline(self) -> Any:
        """The pipeline that is published."""
        return self._introspection.pipeline

    @property
    def _introspection(self) -> Introspection:
        if self.found is None:
            raise RuntimeError("`stored` comes first")
        return self.found

    def make_writer(self, *args: Any) -> Writer:
        """Create the object that writes the other storages, and commits."""
        return _Writer(self, *args)

    def commit_with(self, shards: Sequence[Given]) -> dict[str, Any]:
        """Create a version from the stored shards. Returns the registry's answer about it."""
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
    """Return the values that tables and handles show of a version, as builtin types."""
    return {
        "kind": type(found.pipeline).__name__,
        "shared_bytes": found.table.nbytes,
        "requires_isolation": requires_isolation(),
        "versions": attrs.astuple(Versions.here()),
        "created": time.time(),
        "node": node(),
    }


def digests_of(streamed: Streamed) -> list[bytes]:
    """Return the digest of each storage."""
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
    """Stores storages so that the registry owns them, and commits."""

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
        """Like `Writer.write_all`. The next shard is copied while a task of the registry stores the last one."""
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
            self._target.digests[index] = digest  # of the stored bytes: the storage may have been written to meanwhile
        self._given.append(given)
        return self._note(ref, {i: (buffer, offset) for i, (_, buffer, offset, _) in zip(shard, rows, strict=True)})

    def finish(self) -> ray.ObjectRef[Any]:
        """Commit. Returns the reference to the manifest, which the registry has created."""
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
