"""Who owns named weights, and knows where they are? The registry, a detached actor of which each cluster has one.

It holds no bytes of weights: they are return values of tasks that it submits (`store`), on the node of the publisher. So they
outlive the publisher, and need no room where the registry runs. A name changes by one write to the key-value store of Ray's
control plane. All methods run in one event loop, and what changes the state does not await: so each change is atomic.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import mmap
import os
import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zerocopy._cluster.names import LATEST, Name, Refused, Version
from zerocopy._compat.ray import ended_jobs, have_copies, nodes_with, records_in_control_plane, write_to_control_plane
from zerocopy._store.object_store import put_plainly

STORING = 4  # store tasks at a time
STORE_TRIES = 3  # of each: its process may be killed, and Ray's own retries made a lost one hang
LEAST_STORED = 128 << 10  # bytes: Ray keeps smaller results in the heap of their owner, where nothing can map them
NONCE_BYTES = 16  # what is unique to a shard comes first
POLL_SECONDS = 30.0
JOB_SECONDS = 2.0  # between two looks at whether jobs have ended
HOLDER_SECONDS = 8.0  # that recovery waits for processes which still hold what is lost
USED = 0.75  # of the bytes of all shards that a version rests on: the rest is what only earlier versions needed
CLAIM_SECONDS = 30.0  # that one process has to upload what it was asked for

Ref: TypeAlias = Any  # an ObjectRef
Row: TypeAlias = tuple[bytes, int, int, int]  # of a storage in a shard: digest, buffer, offset, bytes
Given: TypeAlias = tuple[list[Ref], list[Row]]  # a shard, as it is given: in a list, so that Ray does not fetch it
Source: TypeAlias = list[Ref] | tuple[str, int]  # a shard in the store, or memory at a path of its node, and bytes
Place: TypeAlias = tuple[bytes, int, int]  # id of a shard, buffer, offset
Key: TypeAlias = tuple[str, int]  # a name and a number


@dataclasses.dataclass
class Shard:
    """An object of the store that holds storages."""

    ref: Ref
    rows: list[Row]

    @property
    def nbytes(self) -> int:
        return sum(row[3] for row in self.rows)


@dataclasses.dataclass
class Placed:
    """Where the bytes of a version are.

    Attributes:
        reference: to its manifest.
        shards: ids of its shards.
    """

    reference: Ref
    shards: set[bytes]


class Packed:
    """Something pickled that is unpickled where it is read."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.content,)


def store(source: Source, rows: Sequence[tuple[int, int, int]]) -> tuple[Any, list[bytes]]:
    """What a store task runs: it returns a shard as a value of its own, and the digests of its storages, read there.

    Args:
        source: the shard. A reference stands in a list: as an argument of its own it would wait for room beside the arguments
            of other tasks.
        rows: buffer, offset and bytes of each storage.
    """
    import xxhash

    buffers = _buffers_of(source)
    views = [memoryview(buffer) for buffer in buffers]
    digests = [xxhash.xxh3_128_digest(views[buffer][offset : offset + nbytes]) for buffer, offset, nbytes in rows]
    missing = max(0, LEAST_STORED - sum(map(len, views)))
    padding = [pickle.PickleBuffer(bytes(missing))] if missing else []
    return ([*map(pickle.PickleBuffer, buffers), *padding], None), digests


def _buffers_of(source: Source) -> list[Any]:
    if isinstance(source, list):
        buffers: list[Any] = ray.get(source[0])[0]
        return buffers
    path, nbytes = source
    with open(path, "rb") as file:  # noqa: PTH123
        return [os.urandom(NONCE_BYTES), mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ)]


def run_source(call: bytes) -> Any:
    """What a recovery runs: the source of a version."""
    return pickle.loads(call)()


class Registry:
    """The registry. Clients call `answer` alone; see the methods that start with an underscore for what they can ask."""

    def __init__(self) -> None:
        self._names: dict[str, Name] = {name: _restored(record) for name, record in records_in_control_plane().items()}
        self._shards: dict[bytes, Shard] = {}
        self._placed: dict[Key, Placed] = {}
        self._recoveries: dict[Key, asyncio.Task[None]] = {}
        self._claims: dict[bytes, float] = {}  # digests that some process uploads, and until when
        self._changed = asyncio.Event()
        self._storing: asyncio.Semaphore = asyncio.Semaphore(STORING)
        self._jobs: asyncio.Task[None] | None = None

    async def answer(self, method: str, *args: Any) -> tuple[str, Any]:
        """The result of a method, after the word "done"; or why it is refused, and what the error will tell."""
        if self._jobs is None:
            self._jobs = asyncio.get_running_loop().create_task(self._end_with_jobs())
        try:
            return "done", await getattr(self, f"_{method}")(*args)
        except Refused as refusal:
            return refusal.why, {"name": args[0], **refusal.told}

    # What publishers ask.

    async def _have(
        self, name: str, content: bytes, digests: Sequence[bytes]
    ) -> tuple[list[Ref], list[tuple[bytes, int, int, int]]]:
        """Where those storages are that the store has: shards, and digest, position of the shard, buffer and offset.

        Shards are left out that are not worth keeping for this version, unless there is a version of this `content` already.
        """
        wanted = collections.Counter(digests)
        same = self._names.get(name, Name()).with_content(content)
        worthy = list(self._shards)
        if same is None or (name, same.number) not in self._placed:
            others = {digest for other in self._placed if other[0] != name for digest in self._digests_of(other)}
            worthy = _worth_keeping(self._shards, wanted, others)
        shards: dict[bytes, int] = {}
        rows = []
        places = self._places(worthy)
        for digest, count in wanted.items():
            for key, buffer, offset in places.get(digest, [])[:count]:
                rows.append((digest, shards.setdefault(key, len(shards)), buffer, offset))
        return [self._shards[key].ref for key in shards], rows

    async def _store(self, node: str, source: Source, rows: list[tuple[int, int, int]]) -> tuple[list[Ref], Any]:
        """Make a shard the registry's own, on the node that has it. Only the caller refers to the result."""
        remote: Any = ray.remote(num_cpus=0, max_retries=0, num_returns=2)(store)
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        async with self._storing:
            tries = 0
            while True:
                stored, receipt = remote.options(scheduling_strategy=on_node, name="zerocopy.store").remote(
                    source, rows
                )
                try:
                    return [stored], await receipt
                except ray.exceptions.WorkerCrashedError:
                    tries += 1
                    if tries == STORE_TRIES:
                        raise

    async def _commit(
        self,
        name: str,
        content: Mapping[str, Any],
        shards: Sequence[Given],
        aliases: Sequence[str],
        expect: int | None,
        keep: int | None,
        job: str | None,
    ) -> dict[str, Any]:
        """Add a version, or find the one with the same content, and point "latest" and the `aliases` at it."""
        known = self._names.get(name, Name())
        version = known.made_by(content["request"])
        if version is None:
            known.check_expected(expect)
            version = known.with_content(content["digest"])
        placed = None
        if version is None or (name, version.number) not in self._placed:
            number = known.next_number if version is None else version.number
            version = Version(number=number, **content) if version is None else version
            placed = self._place(version, self._add(shards))
        changed = known.changed(
            next_number=max(known.next_number, version.number + 1),
            keep=known.keep if keep is None else keep,
            job=job,
            versions={**known.versions, version.number: version},
            aliases={**known.aliases, **dict.fromkeys([LATEST, *aliases], version.number)},
        )
        try:
            self._write(name, changed, {} if placed is None else {(name, version.number): placed})
        finally:
            self._forget_unused()
        return self._told(name, version)

    async def _lacks(self, digests: Sequence[bytes]) -> list[bytes]:
        """Those storages that a version lacks."""
        return self._lacking(digests)

    async def _offer(self, shards: Sequence[Given]) -> None:
        """Take shards with storages that versions lack."""
        self._add(shards)
        for name, known in self._names.items():
            for version in known.versions.values():
                if (name, version.number) not in self._placed and not self._missing(version):
                    self._placed[name, version.number] = self._place(version, self._shards)
        for _, rows in shards:
            for digest, *_ in rows:
                self._claims.pop(digest, None)
        self._forget_unused()
        self._announce()

    # What readers ask.

    async def _resolve(self, name: str, which: int | str) -> dict[str, Any]:
        """What is known of a version, and the reference to its manifest."""
        return self._told(name, self._find(name).find(which))

    async def _list(self) -> dict[str, dict[str, Any]]:
        """What is known of all names."""
        return {
            name: {
                "aliases": known.aliases,
                "versions": [
                    {**self._told(name, known.versions[number]), "nodes": self._nodes_of(name, number)}
                    for number in sorted(known.versions)
                ],
            }
            for name, known in sorted(self._names.items())
            if known.versions
        }

    async def _point(self, name: str, alias: str, which: int | str) -> dict[str, Any]:
        """Let an alias point at another version."""
        known = self._find(name)
        version = known.find(which)
        self._write(name, known.changed(aliases={**known.aliases, alias: version.number}), {})
        self._forget_unused()
        return self._told(name, version)

    async def _remove(self, name: str, number: int | None) -> None:
        """Remove a name, or one version of it."""
        known = self._find(name)
        if number is None:
            changed = known.changed(versions={}, aliases={})
        else:
            known.find(number)
            aliases = sorted(alias for alias, pointed_at in known.aliases.items() if pointed_at == number)
            if aliases:
                raise Refused("aliased", number=number, aliases=aliases, versions=sorted(known.versions))
            changed = known.changed(versions={n: v for n, v in known.versions.items() if n != number})
        self._write(name, changed, {})
        self._forget_unused()

    async def _poll(
        self, known: Mapping[tuple[str, str], int], held: Sequence[bytes]
    ) -> tuple[dict[tuple[str, str], int], list[bytes]]:
        """Wait until an alias points at another version than the caller knows, or a storage that it holds is wanted.

        Returns:
            The numbers that have changed, 0 for an alias that is gone, and digests of the storages to upload.
        """
        end = time.monotonic() + POLL_SECONDS
        while True:
            numbers = {key: self._number_of(*key) for key in known}
            changed = {key: number for key, number in numbers.items() if number != known[key]}
            wanted = self._claim(held)
            remaining = end - time.monotonic()
            if changed or wanted or remaining <= 0:
                return changed, wanted
            event = self._changed
            try:
                await asyncio.wait_for(event.wait(), remaining)
            except TimeoutError:
                continue

    async def _recover(self, name: str, number: int) -> dict[str, Any]:
        """Find the bytes of a version again: by its source, or in processes that hold them.

        Raises:
            Refused: they are lost.
        """
        key = name, number
        version = self._find(name).find(number)
        if key not in self._placed or self._is_lost(self._placed[key]):
            if key not in self._recoveries:
                self._recoveries[key] = asyncio.get_running_loop().create_task(self._recover_once(name, version))
            try:
                await asyncio.shield(self._recoveries[key])
            finally:
                self._recoveries.pop(key, None)
        return self._told(name, version)

    # How that is done.

    def _find(self, name: str) -> Name:
        known = self._names.get(name)
        if known is None or not known.versions:
            raise Refused("unknown name", names=sorted(name for name, known in self._names.items() if known.versions))
        return known

    def _number_of(self, name: str, alias: str) -> int:
        return self._names.get(name, Name()).aliases.get(alias, 0)

    def _told(self, name: str, version: Version) -> dict[str, Any]:
        placed = self._placed.get((name, version.number))
        return {
            **version.told,
            "name": name,
            "number": version.number,
            "digest": version.digest,
            "has_source": version.source is not None,
            "reference": None if placed is None else [placed.reference],
        }

    def _nodes_of(self, name: str, number: int) -> list[str]:
        """The nodes that have all shards of a version."""
        placed = self._placed.get((name, number))
        if placed is None:
            return []
        nodes = nodes_with([self._shards[key].ref for key in placed.shards])
        return sorted(set.intersection(*nodes)) if nodes else []

    def _digests_of(self, key: Key) -> list[bytes]:
        name, number = key
        return [digest for digest, _ in self._names[name].versions[number].storages]

    def _places(self, shards: Iterable[bytes]) -> dict[bytes, list[Place]]:
        """Where storages are in some shards, by digest. Several storages of one version may be equal: each needs a place."""
        places: dict[bytes, list[Place]] = collections.defaultdict(list)
        for key in shards:
            for digest, buffer, offset, _ in self._shards[key].rows:
                places[digest].append((key, buffer, offset))
        return places

    def _missing(self, version: Version) -> list[bytes]:
        """Digests of the storages of a version for which no shard has a place."""
        places = self._places(self._shards)
        needed = collections.Counter(digest for digest, nbytes in version.storages if nbytes)
        return [digest for digest, count in needed.items() if count > len(places.get(digest, ()))]

    def _add(self, shards: Iterable[Given]) -> list[bytes]:
        """Know shards, and what is in them. Returns their ids."""
        for (ref,), rows in shards:
            self._shards.setdefault(ref.binary(), Shard(ref, rows))
        return [ref.binary() for (ref,), _ in shards]

    def _place(self, version: Version, among: Iterable[bytes]) -> Placed:
        """Put a manifest that tells where the storages of a version are, among some shards."""
        places = self._places(among)
        shards: dict[bytes, int] = {}
        rows = []
        for digest, nbytes in version.storages:
            if not nbytes:
                rows.append((-1, 0, 0, 0))
                continue
            if not places[digest]:
                raise Refused("lost", number=version.number, reason="some of its storages are not in the store")
            key, buffer, offset = places[digest].pop(0)
            rows.append((shards.setdefault(key, len(shards) + 1), buffer, offset, nbytes))
        refs = [self._shards[key].ref for key in shards]
        digests = [digest for digest, _ in version.storages]
        parts = Packed(version.description), rows, refs, Packed(version.outer), digests
        return Placed(put_plainly(([pickle.PickleBuffer(os.urandom(NONCE_BYTES))], parts)), set(shards))

    def _write(self, name: str, changed: Name, placed: Mapping[Key, Placed]) -> None:
        """The commit: one write. Before it, nothing can be seen; after it, all."""
        write_to_control_plane(name, pickle.dumps(_record(changed)))
        self._names[name] = changed
        self._placed.update(placed)
        self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _forget_unused(self) -> None:
        """Drop the places of versions that are gone, and the shards that no version needs."""
        for name, number in list(self._placed):
            if number not in self._names[name].versions:
                del self._placed[name, number]
        wanted = {digest for _, version in self._unplaced() for digest, _ in version.storages}
        needed = set().union(*(placed.shards for placed in self._placed.values()))
        for key, shard in list(self._shards.items()):
            if key not in needed and wanted.isdisjoint(row[0] for row in shard.rows):
                del self._shards[key]

    def _unplaced(self) -> list[tuple[str, Version]]:
        return [
            (name, version)
            for name, known in self._names.items()
            for number, version in known.versions.items()
            if (name, number) not in self._placed
        ]

    def _lacking(self, digests: Iterable[bytes]) -> list[bytes]:
        lacking = {digest for _, version in self._unplaced() for digest in self._missing(version)}
        return [digest for digest in digests if digest in lacking]

    def _claim(self, held: Sequence[bytes]) -> list[bytes]:
        """Which of the storages that a process holds it shall upload."""
        now = time.monotonic()
        claimed = [digest for digest in self._lacking(held) if self._claims.get(digest, 0) < now]
        self._claims.update(dict.fromkeys(claimed, now + CLAIM_SECONDS))
        return claimed

    def _is_lost(self, placed: Placed) -> bool:
        """Whether the store has no copy of something that a version needs. It is not known any more."""
        keys = list(placed.shards)
        there = have_copies([self._shards[key].ref for key in keys])
        lost = {key for key, is_there in zip(keys, there, strict=True) if not is_there}
        for key in lost:
            del self._shards[key]
        self._placed = {key: other for key, other in self._placed.items() if other.shards.isdisjoint(lost)}
        return bool(lost)

    async def _recover_once(self, name: str, version: Version) -> None:
        missing = self._missing(version)
        problem = "it has no source, and no process that runs holds all of its weights"
        if missing and version.source is not None:
            problem = await self._run_source(version)
        elif missing:
            self._announce()
            await self._wait_for_holders(version)
        if self._missing(version):
            raise Refused("lost", number=version.number, reason=problem)
        if (name, version.number) not in self._placed:
            self._placed[name, version.number] = self._place(version, self._shards)
            self._announce()

    async def _run_source(self, version: Version) -> str:
        """Run a source. It offers what is missing. Returns what is wrong if that was not all."""
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(run_source)
        options = {"runtime_env": version.runtime_env} if version.runtime_env else {}
        try:
            await remote.options(name="zerocopy.recover", **options).remote(version.source)
        except ray.exceptions.RayTaskError as error:  # whatever the user's code raises
            return f"its source failed: {type(error.cause).__name__}: {error.cause}"
        except ray.exceptions.RayError as error:
            return f"its source failed: {error}"
        return "its source gave other weights than those that were published"

    async def _wait_for_holders(self, version: Version) -> None:
        end = time.monotonic() + HOLDER_SECONDS
        while self._missing(version) and (time.monotonic() < end or self._is_claimed(version)):
            event = self._changed
            try:
                await asyncio.wait_for(event.wait(), 0.5)
            except TimeoutError:
                continue

    def _is_claimed(self, version: Version) -> bool:
        now = time.monotonic()
        return all(self._claims.get(digest, 0) > now for digest in self._missing(version))

    async def _end_with_jobs(self) -> None:
        """Remove the names of jobs that have ended."""
        while True:
            await asyncio.sleep(JOB_SECONDS)
            tied = {name: known.job for name, known in self._names.items() if known.job is not None and known.versions}
            ended = ended_jobs() if tied else ()
            for name, job in tied.items():
                if job in ended:
                    await self._remove(name, None)


def _worth_keeping(
    shards: Mapping[bytes, Shard], wanted: collections.Counter[bytes], others: set[bytes]
) -> list[bytes]:
    """Ids of the shards that a version rests on: those of which most is used, as long as enough of them all is.

    Were each judged by itself, a version that changes a little more than a third of a shard would write all of it anew.

    Args:
        wanted: digests of the storages of the version.
        others: of those that other names use.
    """

    def used(shard: Shard) -> int:
        return sum(row[3] for row in shard.rows if row[0] in wanted or row[0] in others)

    candidates = [item for item in shards.items() if any(row[0] in wanted for row in item[1].rows)]
    candidates.sort(key=lambda item: used(item[1]) / max(1, item[1].nbytes), reverse=True)
    kept: list[bytes] = []
    lacking, enough = wanted.copy(), 0.0
    for key, shard in candidates:
        found = collections.Counter(row[0] for row in shard.rows) & lacking
        enough += sum(row[3] for row in shard.rows if row[0] in found or row[0] in others) - USED * shard.nbytes
        if enough < 0:
            break
        if found:
            kept.append(key)
        lacking -= found
    return kept


def _record(name: Name) -> dict[str, Any]:
    return dataclasses.asdict(name)


def _restored(record: bytes) -> Name:
    told = pickle.loads(record)
    versions = {number: Version(**version) for number, version in told.pop("versions").items()}
    return Name(versions=versions, **told)
