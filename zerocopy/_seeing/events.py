"""What does zerocopy record of publishes, loads and refreshes? Metrics; of publishes and loads also a log line and notes.

The notes say which memory shows which publication. No error of this file reaches the call of a user. A load takes 20 to 25
microseconds longer because of it.
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

Used = Callable[[], Mapping[bytes, int]]  # returns the bytes in each shard, by its id


def loaded(key: bytes, about: About, used: Used, memory: Sequence[Any], seconds: float) -> None:
    """Record that a publication was loaded into new memory of this process.

    Args:
        key: id of its manifest.
        memory: the memory that was mapped for it.
        seconds: duration of the load.
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
    """Record that a pipeline was published. If it was adopted, `memory` shows its weights now. See `loaded` for the rest."""
    try:
        LEDGER.note(key, about, used, memory)
        if (found := metrics.of_session()) is not None:
            found.published(about.name, seconds)
        if LOGGER.isEnabledFor(logging.INFO):
            _log("published", about, seconds, is_isolation_possible())
    except Exception:
        LOGGER.debug("a publish could not be noted", exc_info=True)


def refreshed(name: str) -> None:
    """Record that a pipeline of this process became another version of its name."""
    try:
        if (found := metrics.of_session()) is not None:
            found.refreshed(name)
    except Exception:
        LOGGER.debug("a refresh could not be noted", exc_info=True)


def _log(what: str, about: About, seconds: float, is_isolated: bool) -> None:
    isolation = "holds" if is_isolated else "does not hold: writes reach every worker"
    LOGGER.info("%s %s: %d bytes in %.6f s, isolation %s", what, about, about.nbytes, seconds, isolation)
