"""Which process uploads what was lost? The first that holds it, unless nothing comes of it: then the next.

This file travels to the registry's process by value.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

CLAIM_SECONDS = 5.0  # without progress, after which another process is asked to upload the same


class Claims:
    """Storages that were asked of processes, by digest. Whatever is stored gives all of them more time.

    Attributes:
        progress: when something was stored, as `time.monotonic` tells.
    """

    def __init__(self) -> None:
        self.progress = 0.0
        self._made: dict[bytes, tuple[str, float]] = {}  # by whom, and when

    def note_progress(self) -> None:
        """Something was stored."""
        self.progress = time.monotonic()

    def make(self, digests: Iterable[bytes], who: str) -> list[bytes]:
        """Those storages that a process shall upload: which no other was asked for of late."""
        now = time.monotonic()
        made = [(digest, *self._made.get(digest, (who, now))) for digest in digests]
        claimed = [digest for digest, other, since in made if other == who or not self._is_fresh(since)]
        self._made.update(dict.fromkeys(claimed, (who, now)))
        return claimed

    def drop(self, digest: bytes) -> None:
        """It has come."""
        self._made.pop(digest, None)

    def cover(self, digests: Iterable[bytes]) -> bool:
        """Whether all these may still come."""
        made = [self._made.get(digest) for digest in digests]
        return all(claim is not None and self._is_fresh(claim[1]) for claim in made)

    def _is_fresh(self, since: float) -> bool:
        return max(since, self.progress) + CLAIM_SECONDS > time.monotonic()
