"""Where are storages: in which shard, in which buffer, at which offset? And which shards are needed?

This file is pickled by value for the registry's process, like `names.py`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

USED = 0.75  # the part of a version's shards that must be in use. Only earlier versions needed the rest of the bytes

Ref: TypeAlias = Any  # an ObjectRef
Row: TypeAlias = tuple[bytes, int, int, int]  # of a storage in a shard: digest, buffer, offset, bytes
Given: TypeAlias = tuple[list[Ref], list[Row]]  # a shard as an argument: in a list, so that Ray does not fetch it
Place: TypeAlias = tuple[bytes, int, int]  # id of a shard, buffer, offset
Storages: TypeAlias = Sequence[tuple[bytes, int]]  # digest and bytes of each storage of a version
Location: TypeAlias = tuple[int, int, int, int]  # number of a shard, buffer, offset, bytes: as in manifests


@dataclasses.dataclass
class Shard:
    """An object of the store that holds storages."""

    ref: Ref
    rows: list[Row]

    @property
    def nbytes(self) -> int:
        return sum(row[3] for row in self.rows)


class Shards:
    """The shards that the registry owns, by id. The references keep them in the store."""

    def __init__(self) -> None:
        self._shards: dict[bytes, Shard] = {}

    def __iter__(self) -> Any:
        return iter(self._shards)

    def add(self, given: Iterable[Given]) -> list[bytes]:
        """Add shards and the rows of their storages. Returns the ids of the shards."""
        for (ref,), rows in given:
            shard = self._shards.setdefault(ref.binary(), Shard(ref, []))
            shard.rows += [row for row in rows if row not in shard.rows]  # a publisher gives only the rows that it uses
        return [ref.binary() for (ref,), _ in given]

    def drop(self, ids: Iterable[bytes]) -> None:
        """Drop the references to these shards."""
        for key in ids:
            self._shards.pop(key, None)

    def keep_only(self, ids: Collection[bytes], digests: Collection[bytes]) -> None:
        """Drop all shards, except those with these ids and those that hold storages with these digests."""
        kept = set(digests)
        others = {key: shard for key, shard in self._shards.items() if key not in ids}
        self.drop(key for key, shard in others.items() if kept.isdisjoint(row[0] for row in shard.rows))

    def refs(self, ids: Iterable[bytes]) -> list[Ref]:
        """Return the references to these shards, in order."""
        return [self._shards[key].ref for key in ids]

    def places(self, among: Iterable[bytes]) -> dict[bytes, list[Place]]:
        """Return the places of storages in some shards, by digest. Equal storages of one version each need their own place."""
        places: dict[bytes, list[Place]] = collections.defaultdict(list)
        for key in among:
            for digest, buffer, offset, _ in self._shards[key].rows:
                places[digest].append((key, buffer, offset))
        return places

    def missing(self, storages: Storages) -> list[bytes]:
        """Return the digests of the storages for which no shard has a place."""
        places = self.places(self._shards)
        needed = collections.Counter(digest for digest, nbytes in storages if nbytes)
        return [digest for digest, count in needed.items() if count > len(places.get(digest, ()))]

    def locate(self, storages: Storages, among: Iterable[bytes]) -> tuple[list[Location], list[bytes]] | None:
        """Return the locations of a version's storages in some shards, and the ids of these shards; None if one is missing."""
        places = self.places(among)
        numbers: dict[bytes, int] = {}
        rows: list[Location] = []
        for digest, nbytes in storages:
            if not nbytes:
                rows.append((-1, 0, 0, 0))
            elif places[digest]:
                key, buffer, offset = places[digest].pop(0)
                rows.append((numbers.setdefault(key, len(numbers) + 1), buffer, offset, nbytes))
            else:
                return None
        return rows, list(numbers)

    def worth_keeping(self, wanted: Mapping[bytes, int], others: Collection[bytes]) -> list[bytes]:
        """Return the ids of the shards that a version keeps: first the most used ones, as long as enough of all is in use.

        If each shard were judged alone, a version that changes a little more than a quarter of a shard would write it all again.

        Args:
            wanted: how many storages of the version have each digest.
            others: digests of the storages that other names use.
        """

        def used(shard: Shard) -> int:
            return sum(row[3] for row in shard.rows if row[0] in wanted or row[0] in others)

        candidates = [item for item in self._shards.items() if any(row[0] in wanted for row in item[1].rows)]
        candidates.sort(key=lambda item: used(item[1]) / max(1, item[1].nbytes), reverse=True)
        kept: list[bytes] = []
        lacking, enough = collections.Counter(wanted), 0.0
        for key, shard in candidates:
            found = collections.Counter(row[0] for row in shard.rows) & lacking
            enough += sum(row[3] for row in shard.rows if row[0] in found or row[0] in others) - USED * shard.nbytes
            if enough < 0:
                break
            if found:
                kept.append(key)
            lacking -= found
        return kept
