"""Which process uploads lost storages? The first process that holds them. If it makes no progress, the next process does it.

This file is pickled by value for the registry's process.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

CLAIM_SECONDS = 5.0  # without progress. After that, another process is asked to upload the same storages


class Claims:
    """Which process was asked to upload which storage, by digest. Each shard that is stored gives all claims more time.

    Attributes:
        progress: the time at which the last shard was stored, of `time.monotonic`.
    """

    def __init__(self) -> None:
        self.progress = 0.0
        self._made: dict[bytes, tuple[str, float]] = {}  # by digest: the process, and the time of the claim

    def note_progress(self) -> None:
        """Note that a shard was stored."""
        self.progress = time.monotonic()

    def make(self, digests: Iterable[bytes], who: str) -> list[bytes]:
        """Return the digests that the process `who` shall upload: those on which no other process has a recent claim."""
        now = time.monotonic()
        made = [(digest, *self._made.get(digest, (who, now))) for digest in digests]
        claimed = [digest for digest, other, since in made if other == who or not self._is_fresh(since)]
        self._made.update(dict.fromkeys(claimed, (who, now)))
        return claimed

    def drop(self, digest: bytes) -> None:
        """Remove the claim on a storage that was uploaded."""
        self._made.pop(digest, None)

    def cover(self, digests: Iterable[bytes]) -> bool:
        """Whether all these storages have recent claims, so that they may still be uploaded."""
        made = [self._made.get(digest) for digest in digests]
        return all(claim is not None and self._is_fresh(claim[1]) for claim in made)

    def _is_fresh(self, since: float) -> bool:
        return max(since, self.progress) + CLAIM_SECONDS > time.monotonic()
