"""Who owns named weights, and knows where they are? The registry: one detached actor per cluster.

The registry holds no bytes of weights. The weights are return values of tasks that it submits to the node of the publisher. So
they outlive the publisher, and take no memory on the registry's node. A name changes by one write to the key-value store of Ray's
control plane. All methods run in one event loop, and code that changes the state does not await, so each change is atomic.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zerocopy._cluster.claims import CLAIM_SECONDS, Claims
from zerocopy._cluster.names import LATEST, Name, Refused, Version
from zerocopy._cluster.shards import Given, Ref, Shards
from zerocopy._cluster.stored import Packed, Source, nonce, run_source, store
from zerocopy._compat.owners import (
    ended_jobs,
    have_copies,
    nodes_with,
    records_in_control_plane,
    write_to_control_plane,
)
from zerocopy._nodes.holder import Holders
from zerocopy._store.object_store import put_plainly

STORING = 4  # store tasks at a time on each node
STORE_TRIES = 3  # of each store task, whose process may be killed. With Ray's own retries, a lost task hung
POLL_SECONDS = 30.0
JOB_SECONDS = 2.0  # between two checks for ended jobs
# Recovery waits for processes that still hold lost storages. Their call of `poll` is always open, so they react at once. But
# after a registry has ended, they must first find the new one.
HOLDER_SECONDS = 3.0
FIRST_SECONDS = 8.0  # from the start of this registry

Key: TypeAlias = tuple[str, int]  # a name and a number
Followed: TypeAlias = tuple[str, str | int]  # a name, and an alias or a number


@dataclasses.dataclass
class Placed:
    """Where the bytes of a version are.

    Attributes:
        reference: reference to its manifest.
        shards: ids of its shards.
    """

    reference: Ref
    shards: set[bytes]


class Registry:
    """The registry. Clients call only `answer`, which calls the method with the given name."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._names: dict[str, Name] = {name: _restored(record) for name, record in records_in_control_plane().items()}
        self._shards = Shards()
        self._placed: dict[Key, Placed] = {}
        self._recoveries: dict[Key, asyncio.Task[None]] = {}
        self._claims = Claims()
        self._lacked: set[bytes] | None = None  # digests of storages that versions lack; None if not computed
        self._changed = asyncio.Event()
        self._holders = Holders()
        self._held: set[tuple[str, str | int, int]] = set()  # on nodes: name, alias or number, number
        # By node, so that a node that hangs does not delay the store tasks of other nodes.
        self._storing: dict[str, asyncio.Semaphore] = collections.defaultdict(lambda: asyncio.Semaphore(STORING))
        self._jobs: asyncio.Task[None] | None = None

    async def answer(self, method: str, *args: Any) -> tuple[str, Any]:
        """Return "done" and the result of a method; or the reason of a refusal, and values for the error message."""
        if self._jobs is None:
            self._jobs = asyncio.get_running_loop().create_task(self.end_with_jobs())
        try:
            return "done", await getattr(self, method)(*args)
        except Refused as refusal:
            return refusal.why, {"name": args[0], **refusal.told}

    # Methods for publishers.

    async def have(
        self, name: str, content: bytes, digests: Sequence[bytes]
    ) -> tuple[list[Ref], list[tuple[bytes, int, int, int]]]:
        """Return the places of storages that the store has: shards; and digest, index of the shard, buffer and offset of each.

        Shards that are not worth keeping for this version are left out, unless a version with this `content` exists already.
        """
        wanted = collections.Counter(digests)
        same = self._names.get(name, Name()).with_content(content)
        worthy = list(self._shards)
        if same is None or (name, same.number) not in self._placed:
            others = {digest for other in self._placed if other[0] != name for digest in self._digests_of(other)}
            worthy = self._shards.worth_keeping(wanted, others)
        shards: dict[bytes, int] = {}
        rows = []
        places = self._shards.places(worthy)
        for digest, count in wanted.items():
            for key, buffer, offset in places.get(digest, [])[:count]:
                rows.append((digest, shards.setdefault(key, len(shards)), buffer, offset))
        return self._shards.refs(shards), rows

    async def store(self, node: str, source: Source, rows: list[tuple[int, int, int]]) -> tuple[list[Ref], Any]:
        """Store a shard on the node that has its bytes, so that the registry owns it. Only the caller gets a reference."""
        remote: Any = ray.remote(num_cpus=0, max_retries=0, num_returns=2)(store)
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        async with self._storing[node]:
            tries = 0
            while True:
                stored, receipt = remote.options(scheduling_strategy=on_node, name="zerocopy.store").remote(
                    source, rows
                )
                try:
                    digests = await receipt
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                    tries += 1
                    if tries == STORE_TRIES:
                        raise
                else:
                    self._claims.note_progress()
                    return [stored], digests

    async def commit(
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
        version = repeated = known.made_by(content["request"])
        if version is None:
            known.check_expected(expect)
            version = known.with_content(content["digest"])
        if version is not None and content["source"] is not None:
            version = dataclasses.replace(version, source=content["source"], runtime_env=content["runtime_env"])
        placed = None
        if version is None or (name, version.number) not in self._placed:
            number = known.next_number if version is None else version.number
            version = Version(number=number, **content) if version is None else version
            placed = self._place(version, self._shards.add(shards))
        changed = known.changed(
            next_number=max(known.next_number, version.number + 1),
            keep=known.keep if keep is None else keep,
            job=job,
            versions={**known.versions, version.number: version},
            # A commit is repeated if its answer was lost. Another process may have published in the meantime.
            aliases=known.aliases
            if repeated
            else {**known.aliases, **dict.fromkeys([LATEST, *aliases], version.number)},
        )
        try:
            self._write(name, changed, {} if placed is None else {(name, version.number): placed})
        finally:
            self._forget_unused()
        return self._told(name, version)

    async def lacks(self, digests: Sequence[bytes]) -> list[bytes]:
        """Return the digests of those storages that a version lacks."""
        return self._lacking(digests)

    async def offer(self, shards: Sequence[Given]) -> None:
        """Add shards with storages that versions lack."""
        self._shards.add(shards)
        for name, known in self._names.items():
            for version in known.versions.values():
                if (name, version.number) not in self._placed and not self._missing(version):
                    self._placed[name, version.number] = self._place(version, self._shards)
        for _, rows in shards:
            for digest, *_ in rows:
                self._claims.drop(digest)
        self._forget_unused()
        self._announce()

    # Methods for other callers.

    async def resolve(self, name: str, which: int | str) -> dict[str, Any]:
        """Return the facts about a version, and the reference to its manifest."""
        return self._told(name, self._find(name).find(which))

    async def listed(self) -> dict[str, dict[str, Any]]:
        """Return the facts about all names and their versions."""
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

    async def hold(self, name: str, which: str | int, number: int, node: str, refs: list[Ref]) -> Exception | None:
        """Let a node hold objects of a version until the version is superseded. Returns the error, if any."""
        self._find(name).find(number)
        key = name, which, number
        self._held.add(key)
        holder = self._holders.on(node)
        try:
            await holder.hold.remote(key, refs)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.ActorDiedError):
                self._holders.forget(holder)
            return error
        finally:
            self._release_superseded()
        return None

    async def release(self, name: str) -> None:
        """Let all nodes release the objects that they hold for a name."""
        self._release({key for key in self._held if key[0] == name})

    async def point(self, name: str, alias: str, which: int | str) -> dict[str, Any]:
        """Let an alias point at another version."""
        known = self._find(name)
        version = known.find(which)
        self._write(name, known.changed(aliases={**known.aliases, alias: version.number}), {})
        self._forget_unused()
        return self._told(name, version)

    async def remove(self, name: str, number: int | None) -> None:
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

    async def poll(
        self, known: Mapping[Followed, int], held: Sequence[bytes], who: str
    ) -> tuple[dict[Followed, int], list[bytes]]:
        """Wait until an alias points at another version than the caller knows, or a storage that it holds is wanted.

        Args:
            who: id of the process. With it, the process keeps the claims of an earlier call that it gave up.

        Returns:
            The numbers that have changed (0 for an alias or a version that is gone), and digests of the storages to upload.
        """
        end = time.monotonic() + POLL_SECONDS
        while True:
            numbers = {key: self._number_of(*key) for key in known}
            changed = {key: number for key, number in numbers.items() if number != known[key]}
            wanted = self._claims.make(self._lacking(held), who)
            remaining = end - time.monotonic()
            if changed or wanted or remaining <= 0:
                return changed, wanted
            event = self._changed
            try:
                await asyncio.wait_for(event.wait(), remaining)
            except TimeoutError:
                continue

    async def recover(self, name: str, number: int) -> dict[str, Any]:
        """Get the lost bytes of a version back: from its source, or from processes that hold them.

        Raises:
            Refused: the bytes cannot be recovered.
        """
        key = name, number
        version = self._find(name).find(number)
        if key not in self._placed or self._is_lost(self._placed[key]):
            if key not in self._recoveries:
                self._recoveries[key] = asyncio.get_running_loop().create_task(self.recover_once(name, version))
            recovery = self._recoveries[key]
            try:
                await asyncio.shield(recovery)
            finally:
                if self._recoveries.get(key) is recovery:
                    del self._recoveries[key]
        return self._told(name, version)

    # Helpers of these methods.

    def _find(self, name: str) -> Name:
        known = self._names.get(name)
        if known is None or not known.versions:
            raise Refused("unknown name", names=sorted(name for name, known in self._names.items() if known.versions))
        return known

    def _number_of(self, name: str, which: str | int) -> int:
        known = self._names.get(name, Name())
        if isinstance(which, str):
            return known.aliases.get(which, 0)
        return which if which in known.versions else 0

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
        """Return the ids of the nodes that have all shards of a version."""
        placed = self._placed.get((name, number))
        if placed is None:
            return []
        nodes = nodes_with(self._shards.refs(placed.shards))
        return sorted(set.intersection(*nodes)) if nodes else []

    def _digests_of(self, key: Key) -> list[bytes]:
        name, number = key
        return [digest for digest, _ in self._names[name].versions[number].storages]

    def _missing(self, version: Version) -> list[bytes]:
        return self._shards.missing(version.storages)

    def _place(self, version: Version, among: Iterable[bytes]) -> Placed:
        """Put a manifest with the locations of a version's storages. Only the shards in `among` are used."""
        located = self._shards.locate(version.storages, among)
        if located is None:
            raise Refused("lost", number=version.number, reason="some of its storages are not in the store")
        rows, shards = located
        digests = [digest for digest, _ in version.storages]
        parts = Packed(version.description), rows, self._shards.refs(shards), Packed(version.outer), digests
        return Placed(put_plainly(([pickle.PickleBuffer(nonce())], parts)), set(shards))

    def _write(self, name: str, changed: Name, placed: Mapping[Key, Placed]) -> None:
        """Commit a change by one write. Before the write, no part of the change is visible; after it, the whole change is."""
        write_to_control_plane(name, pickle.dumps(_record(changed)))
        self._names[name] = changed
        self._placed.update(placed)
        self._release_superseded()
        self._announce()

    def _release_superseded(self) -> None:
        self._release({key for key in self._held if self._number_of(*key[:2]) != key[2]})

    def _release(self, keys: set[tuple[str, str | int, int]]) -> None:
        for key in keys:
            self._holders.release(key)
        self._held -= keys

    def _announce(self) -> None:
        self._lacked = None
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _forget_unused(self) -> None:
        """Drop the places of versions that are gone, and the shards that no version needs."""
        for name, number in list(self._placed):
            if number not in self._names[name].versions:
                del self._placed[name, number]
        needed: set[bytes] = set().union(*(placed.shards for placed in self._placed.values()))
        self._shards.keep_only(needed, {digest for _, version in self._unplaced() for digest, _ in version.storages})

    def _unplaced(self) -> list[tuple[str, Version]]:
        return [
            (name, version)
            for name, known in self._names.items()
            for number, version in known.versions.items()
            if (name, number) not in self._placed
        ]

    def _lacking(self, digests: Iterable[bytes]) -> list[bytes]:
        if self._lacked is None:
            self._lacked = {digest for _, version in self._unplaced() for digest in self._missing(version)}
        return [digest for digest in digests if digest in self._lacked]

    def _is_lost(self, placed: Placed) -> bool:
        """Whether a shard of a version has no copy in the store. Lost shards are forgotten, also in other versions."""
        shards = list(placed.shards)
        there = have_copies(self._shards.refs(shards))
        lost = {shard for shard, is_there in zip(shards, there, strict=True) if not is_there}
        self._shards.drop(lost)
        self._placed = {key: other for key, other in self._placed.items() if other.shards.isdisjoint(lost)}
        if lost:
            self._announce()  # processes may hold these storages
        return bool(lost)

    async def recover_once(self, name: str, version: Version) -> None:
        missing = self._missing(version)
        problem = "it has no source, and no process that runs holds all of its weights"
        if missing and version.source is not None:
            problem = await self.run_source(version)
        if self._missing(version):
            await self.wait_for_holders(version)
        if self._missing(version):
            raise Refused("lost", number=version.number, reason=problem)
        is_there = version.number in self._names[name].versions  # it may have been removed meanwhile
        if is_there and (name, version.number) not in self._placed:
            self._placed[name, version.number] = self._place(version, self._shards)
            self._announce()

    async def run_source(self, version: Version) -> str:
        """Run the source of a version, which uploads missing storages. Returns the reason to report if some are still missing."""
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(run_source)
        options = {"runtime_env": version.runtime_env} if version.runtime_env else {}
        try:
            await remote.options(name="zerocopy.recover", **options).remote(version.source)
        except ray.exceptions.RayTaskError as error:  # whatever the user's code raises
            return f"its source failed: {type(error.cause).__name__}: {error.cause}"
        except ray.exceptions.RayError as error:
            return f"its source failed: {error}"
        return "its source gave other weights than those that were published"

    async def wait_for_holders(self, version: Version) -> None:
        start = time.monotonic()
        least = max(start + HOLDER_SECONDS, self._since + FIRST_SECONDS)
        while self._missing(version):
            is_claimed = self._claims.cover(self._missing(version))
            end = max(start, self._claims.progress) + CLAIM_SECONDS + HOLDER_SECONDS if is_claimed else least
            if time.monotonic() > max(end, least):
                break
            self._announce()  # a process with lost storages may be new, and a process with a claim may have ended
            event = self._changed
            try:
                await asyncio.wait_for(event.wait(), 0.5)
            except TimeoutError:
                continue

    async def end_with_jobs(self) -> None:
        """Remove the names of jobs that have ended."""
        ended: set[str] = set()
        while True:
            await asyncio.sleep(JOB_SECONDS)
            tied = {name: known.job for name, known in self._names.items() if known.job is not None and known.versions}
            with contextlib.suppress(Exception):  # any error of the control plane: it is asked again
                ended = ended_jobs() if tied else set()
            for name, job in tied.items():
                if job in ended:
                    await self.remove(name, None)


def _record(name: Name) -> dict[str, Any]:
    return dataclasses.asdict(name)


def _restored(record: bytes) -> Name:
    told = pickle.loads(record)
    versions = {number: Version(**version) for number, version in told.pop("versions").items()}
    return Name(versions=versions, **told)
