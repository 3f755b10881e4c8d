"""What is said of a publish, a load and a refresh: one log line each, metrics, and a note of what memory shows which publication.

Nothing here raises into the call of a user. A load pays for it 20 to 25 microseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from zerocopy._seeing import metrics
from zerocopy._seeing.ledger import LEDGER, About
from zerocopy._store.mapping import PrivateMap, is_isolation_possible

LOGGER = logging.getLogger("zerocopy")
LOGGER.addHandler(logging.NullHandler())

Used = Callable[[], Mapping[bytes, int]]  # gives the bytes in each shard, by its id


def loaded(key: bytes, about: About, used: Used, memory: Sequence[Any], seconds: float) -> None:
    """A publication was loaded into new memory of this process.

    Args:
        key: id of its manifest.
        memory: what was mapped for it.
        seconds: that it took.
    """
    try:
        is_isolated = all(isinstance(one, PrivateMap) for one in memory)
        LEDGER.note(key, about, used, memory)
        if (found := metrics.of_session()) is not None:
            found.loaded(about.name, seconds, is_isolated)
        if LOGGER.isEnabledFor(logging.INFO):
            _log("loaded", about, seconds, is_isolated)
    except Exception:
        LOGGER.debug("a load could not be noted", exc_info=True)


def published(key: bytes, about: About, used: Used, memory: Iterable[Any], seconds: float) -> None:
    """A pipeline was published. `memory` shows its weights now, if it was adopted; else as `loaded`."""
    try:
        LEDGER.note(key, about, used, memory)
        if (found := metrics.of_session()) is not None:
            found.published(about.name, seconds)
        if LOGGER.isEnabledFor(logging.INFO):
            _log("published", about, seconds, is_isolation_possible())
    except Exception:
        LOGGER.debug("a publish could not be noted", exc_info=True)


def refreshed(name: str) -> None:
    """A pipeline of this process became another version of its name."""
    try:
        if (found := metrics.of_session()) is not None:
            found.refreshed(name)
    except Exception:
        LOGGER.debug("a refresh could not be noted", exc_info=True)


def _log(what: str, about: About, seconds: float, is_isolated: bool) -> None:
    isolation = "holds" if is_isolated else "does not hold: writes reach every worker"
    LOGGER.info("%s %s: %d bytes in %.6f s, isolation %s", what, about, about.nbytes, seconds, isolation)
