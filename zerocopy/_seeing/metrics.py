"""Which metrics about publishes, loads and written pages does this process report to Ray's dashboard and Prometheus endpoint?

A thread reports them to Ray every few seconds, as long as the connection lasts. There are two reasons: gauges show state that
changes without a call, such as written pages; and if a load reported at once, it would take several microseconds longer.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections import defaultdict, deque

from ray.util.metrics import Counter, Gauge, Histogram

from zerocopy._seeing.ledger import LEDGER
from zerocopy._store import object_store, windows

SECONDS = 5.0  # between two reports to Ray, which exports every 10 seconds
BOUNDARIES = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]  # seconds
_KEYS = ("publication",)


class Metrics:
    """The metrics of one connection to Ray. Each has the tag `publication`: the name, empty without one."""

    def __init__(self) -> None:
        self._loads = Counter("zerocopy_loads", "Loads of publications into new memory.", _KEYS)
        self._load_seconds = Histogram("zerocopy_load_seconds", "Seconds that a load took.", BOUNDARIES, _KEYS)
        self._publishes = Counter("zerocopy_publishes", "Pipelines published.", _KEYS)
        self._publish_seconds = Histogram("zerocopy_publish_seconds", "Seconds that it took.", BOUNDARIES, _KEYS)
        self._refreshes = Counter("zerocopy_refreshes", "Pipelines that became a newer version.", _KEYS)
        self._fallbacks = Counter("zerocopy_fallbacks", "Loads that share Ray's own, writable mapping.", _KEYS)
        self._gauges = (
            Gauge("zerocopy_shared_bytes", "Bytes of the store that the process shows as weights.", _KEYS),
            Gauge("zerocopy_dirtied_bytes", "Bytes of these that it has written since, and has as its own.", _KEYS),
            Gauge("zerocopy_publications", "Publications of which it shows weights.", _KEYS),
            Gauge("zerocopy_versions", "Versions of a name of which it shows weights.", _KEYS),
        )
        self._pending: deque[tuple[Counter, Histogram | None, str, float]] = deque()
        self._set: set[str] = set()  # names for which gauges are not zero

    def loaded(self, name: str, seconds: float, is_isolated: bool) -> None:
        """Count one load."""
        self._pending.append((self._loads, self._load_seconds, name, seconds))
        if not is_isolated:
            self._pending.append((self._fallbacks, None, name, 0.0))

    def published(self, name: str, seconds: float) -> None:
        """Count one publish."""
        self._pending.append((self._publishes, self._publish_seconds, name, seconds))

    def refreshed(self, name: str) -> None:
        """Count one pipeline that became another version."""
        self._pending.append((self._refreshes, None, name, 0.0))

    def flush(self) -> None:
        """Report the counted events to Ray."""
        while self._pending:
            counter, histogram, name, seconds = self._pending.popleft()
            tags = {"publication": name}
            counter.inc(1, tags)
            if histogram is not None:
                histogram.observe(seconds, tags)

    def set_gauges(self) -> None:
        """Set the gauges to the present state of this process."""
        figures = _figures()
        for name in self._set | figures.keys():
            for gauge, figure in zip(self._gauges, figures.get(name, (0, 0, 0, 0)), strict=True):
                gauge.set(figure, {"publication": name})
        self._set = set(figures)


def _figures() -> dict[str, tuple[int, int, int, int]]:
    """Return for each name: bytes shown, written bytes among these, number of publications, number of versions."""
    by_name: dict[str, list[windows.Window]] = defaultdict(list)
    for window in windows.known():
        about = LEDGER.about(window.publication)
        if about is not None:
            by_name[about.name].append(window)
    return {name: _figures_of(name, found) for name, found in by_name.items()}


def _figures_of(name: str, shown: list[windows.Window]) -> tuple[int, int, int, int]:
    nbytes = sum(window.end - window.start for window in shown)
    dirtied = sum(end - start for window in shown for start, end in window.own_pages())
    publications = len({window.publication for window in shown})
    return nbytes, dirtied, 1 if name else publications, publications if name else 0


class _Updater(threading.Thread):
    """Reports to Ray, until the connection ends."""

    def __init__(self, session: object, metrics: Metrics) -> None:
        super().__init__(name="zerocopy-metrics", daemon=True)
        self._session = session
        self._metrics = metrics
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SECONDS) and self._session is object_store.session():
            with contextlib.suppress(Exception):  # the connection may end meanwhile
                self._metrics.flush()
                LEDGER.drop_gone()
                self._metrics.set_gauges()


_lock = threading.Lock()
_known: tuple[object, Metrics, _Updater] | None = None


def of_session() -> Metrics | None:
    """Return the metrics of this process' connection, created when they are first needed; None without a connection."""
    session = object_store.session()
    if session is None:
        return None
    known = _known
    return known[1] if known is not None and known[0] is session else _made(session)


def _made(session: object) -> Metrics:
    global _known  # noqa: PLW0603
    with _lock:
        if _known is None or _known[0] is not session:
            _stop()
            metrics = Metrics()
            updater = _Updater(session, metrics)
            _known = session, metrics, updater
            updater.start()
        return _known[1]


def _stop() -> None:
    if _known is not None:
        _known[2].ended.set()


def _flush_at_exit() -> None:
    """Report the last events. It runs before Ray disconnects at exit, because Ray was imported earlier."""
    _stop()
    if _known is not None and _known[0] is object_store.session():
        with contextlib.suppress(Exception):
            _known[1].flush()


def _after_fork() -> None:
    global _known, _lock
    _known, _lock = None, threading.Lock()


atexit.register(_flush_at_exit)
os.register_at_fork(after_in_child=_after_fork)
