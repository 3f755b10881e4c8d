"""Which weights does this process hold for a registry that lost them? Mapped shards, and live pipelines that it has published.

A new registry asks for them. Shards are uploaded from the bytes in the store, because a pipeline may have written to its memory.
"""

from __future__ import annotations

import pickle
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zerocopy._cluster import client
from zerocopy._cluster.shards import Row
from zerocopy._store import object_store, windows
from zerocopy._store.manifest import BESIDE, Manifest


class Held:
    """The known storages of a shard that this process has mapped. Versions use different parts of a shard.

    Attributes:
        rows: its storages.
        versions: ids of the manifests that contain these storages.
    """

    def __init__(self) -> None:
        self.rows: set[Row] = set()
        self.versions: set[bytes] = set()


class Living(NamedTuple):
    """A live pipeline that this process published, its digests at that time, and a function that uploads its weights."""

    pipeline: Callable[[], Any]
    digests: Sequence[bytes]
    offer: Callable[[Any], None]


class Holdings:
    """All shards and live pipelines that this process holds."""

    def __init__(self) -> None:
        self._shards: dict[bytes, Held] = {}  # by id
        self._living: list[Living] = []
        self._lock = threading.Lock()

    def note_loaded(self, manifest: Manifest) -> bool:
        """Remember which storages of mapped shards belong to a version. Returns whether this is new."""
        shards = [shard.binary() for shard in manifest.shards]
        version = manifest.shard(BESIDE).binary()
        if all(version in self._shards.get(shard, _NOTHING).versions for shard in shards):
            return False
        rows: dict[bytes, set[Row]] = defaultdict(set)
        for digest, (shard, buffer, offset, nbytes) in zip(manifest.digests, manifest.location_rows, strict=True):
            if shard > 0:
                rows[shards[shard - 1]].add((digest, buffer, offset, nbytes))
        with self._lock:
            for key, found in rows.items():
                held = self._shards.setdefault(key, Held())
                held.rows |= found
                held.versions.add(version)
        return True

    def note_published(self, pipeline: Any, digests: Sequence[bytes], offer: Callable[[Any], None]) -> None:
        """Remember a live pipeline. As long as it lives, `offer` uploads its weights for the registry."""
        if not type(pipeline).__weakrefoffset__:
            return
        with self._lock:
            others = [one for one in self._living if all(one.pipeline() is not other for other in (None, pipeline))]
            self._living = [*others, Living(weakref.ref(pipeline), digests, offer)]

    def digests(self) -> list[bytes]:
        """Return the digests of all storages that this process still holds."""
        mapped = windows.by_shard()
        with self._lock:
            self._shards = {shard: held for shard, held in self._shards.items() if shard in mapped}
            self._living = [one for one in self._living if one.pipeline() is not None]
            held = {row[0] for shard in self._shards.values() for row in shard.rows}
            return list(held.union(*(one.digests for one in self._living)))

    def give_back(self, registry: Any, node: str, wanted: set[bytes]) -> None:
        """Upload the storages that the registry wants, so that the registry owns them."""
        for shard, window in windows.by_shard().items():
            rows = list(self._shards.get(shard, _NOTHING).rows)
            if any(row[0] in wanted for row in rows):
                # From Ray's mapping: this process may have written to its own.
                buffers = list(map(pickle.PickleBuffer, window.pin.buffers))
                own = object_store.put((buffers, None))
                stored, digests = client.ask_one(registry, "store", node, [own], [row[1:] for row in rows])
                same = [row for row, digest in zip(rows, digests, strict=True) if row[0] == digest]
                client.ask_one(registry, "offer", [(stored, same)])
                wanted -= {row[0] for row in same}
        for living in [one for one in self._living if not wanted.isdisjoint(one.digests)]:
            pipeline = living.pipeline()
            if pipeline is not None:
                living.offer(pipeline)
            if client.ask_one(registry, "lacks", living.digests):  # it has changed: the registry would ask again
                with self._lock:
                    self._living = [one for one in self._living if one is not living]


_NOTHING = Held()
