"""How does a process follow a name? One thread waits for changes, and loads a new version before anybody asks for it.

It makes one call for all names. The registry answers this call when something has changed. If storages are lost, for example
because the registry was created anew, the answer also names the lost storages that this process holds and shall upload.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar

import ray
import torch

from zerocopy._cluster import client
from zerocopy._cluster.holding import Holdings
from zerocopy._cluster.registry import POLL_SECONDS
from zerocopy._compat.cpython import warn_caller
from zerocopy._declare.pipeline import is_same_class
from zerocopy._load.publication import Publication
from zerocopy._seeing import events
from zerocopy._store import object_store
from zerocopy._store.manifest import Manifest
from zerocopy._words import first_line
from zerocopy.errors import FollowWarning, NotExposedError, NotPublishedError, PublicationLostError, ZeroCopyError

T_co = TypeVar("T_co", covariant=True)

PAUSE_SECONDS = 0.5  # after a failure
PASSING = (
    client.RegistryLost,
    client.RegistryUnreachable,
    NotPublishedError,
    PublicationLostError,
    ray.exceptions.RayError,
)
NOT_AGREED = -1  # not the number of a version, so that the registry answers at once
WORTH_A_WARNING = 5  # failures in a row. A registry that was killed is created again after the first failure


class Live(Protocol[T_co]):
    """Annotates a parameter that receives a handle with `current()`, instead of a loaded pipeline.

    The argument may be a publication, a pipeline or a module. The handle follows the name of a publication that has one.
    """

    def current(self) -> T_co:
        """Return the newest version, loaded. A caller that keeps the object keeps its version."""
        ...


class _ToBeLoaded:
    """Base of the `Live` handles: raises an error that helps a user who uses the handle like the pipeline."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise NotExposedError(
            f"The handle that arrives for a zerocopy.Live[...] parameter has no attribute {name!r}.",
            hint=(
                f"its current() gives the newest version, loaded. For {name}() annotate the parameter as zerocopy.Publication."
                if name in ("load", "prefetch", "nodes", "close")
                else f"its current() gives the pipeline: write .current().{name}."
            ),
            attribute=name,
        )


class Fixed(_ToBeLoaded, Generic[T_co]):
    """A `Live` handle of a pipeline that has no other versions."""

    def __init__(self, pipeline: T_co) -> None:
        self._pipeline = pipeline

    def current(self) -> T_co:
        """The pipeline."""
        return self._pipeline

    def __repr__(self) -> str:
        return f"<zerocopy.Live {type(self._pipeline).__name__}, which has one version>"


class OnDevice(_ToBeLoaded):
    """A `Live` handle of a publication, on the device of an actor or a task."""

    def __init__(self, publication: Publication, device: str | None) -> None:
        self.publication = publication
        self.device = device

    def current(self) -> Any:
        """The newest version, loaded; see `Publication.current`."""
        return self.publication.current(self.device)

    def __repr__(self) -> str:
        return f"<zerocopy.Live {repr(self.publication).removeprefix('<zerocopy.')}"


class Key(NamedTuple):
    """What a process follows: an alias, or one version until it is removed."""

    name: str
    which: str | int
    device: torch.device | None


class Loaded(NamedTuple):
    """A version that this process has loaded or knows, and a handle of exactly this version if there is one."""

    number: int
    pipeline: Any
    handle: Publication | None


class Followed:
    """The newest version of one name, alias and device in this process. It lives as long as a handle uses it.

    Attributes:
        seen: the version number that the registry reported last, 0 for none.
    """

    def __init__(self, key: Key, load: Callable[[], Loaded], loaded: Loaded | None = None) -> None:
        """Follow an alias.

        Args:
            load: loads the version that the alias points at.
            loaded: the version that is already loaded, if any. In that case, the caller must call `start`.
        """
        self.key = key
        self.session = object_store.session()
        self.seen = 0 if loaded is None else loaded.number
        self._load = load
        self._lock = threading.Lock()
        self._loaded = loaded

    def start(self) -> None:
        """Load new versions in the background from now on."""
        WATCHER.follow(self)

    def current(self) -> Any:
        """The newest version that is loaded. The first call loads it."""
        return self.newest().pipeline

    def newest(self) -> Loaded:
        """Return the same version with its number and handle."""
        if _pending:
            _warn_of_pending()
        return self._newest()

    def _newest(self) -> Loaded:
        """Like `newest`, but without warnings: the thread uses it, and nobody would see a warning of the thread."""
        loaded = self._loaded
        if loaded is None:
            with self._lock:
                loaded = self._loaded = self._loaded or self._load()
                self.seen = loaded.number
            self.start()
        return loaded

    def replace(self, loaded: Loaded, pipeline: Any) -> None:
        """Use `pipeline` instead of the loaded pipeline, whose state it takes over."""
        with self._lock:
            if self._loaded is loaded:  # else the thread has loaded the next version
                self._loaded = Loaded(loaded.number, pipeline, loaded.handle)

    def look(self) -> None:
        """Ask the registry now which version the alias points at, instead of waiting for a change."""
        try:
            self._loaded = self._load()
            self.seen = self._loaded.number
        except ZeroCopyError:  # the name may be gone
            self._loaded = None

    def note(self, number: int) -> None:
        """Load the version that the alias points at, after the registry reported its `number`.

        Raises:
            One of `PASSING`: a later try may succeed.
        """
        if not number and self.key.device is None:
            self._loaded = None  # the next caller learns that the name is gone
        elif number and number != self._newest().number:
            try:
                self._take(self._load())
            except PASSING:
                raise
            except Exception as error:  # any error of that version's own code: it is not tried again
                warn_later(
                    f"Version {number} of {self.key.name!r} cannot be loaded, and this process goes on with version "
                    f"{self._newest().number}: {type(error).__name__}: {error}"
                )
        self.seen = number

    def _take(self, loaded: Loaded) -> None:
        mine = self._newest()
        if is_same_class(type(mine.pipeline), type(loaded.pipeline)):
            with self._lock:
                self._loaded = loaded
            if self.key.device is not None:
                events.refreshed(self.key.name)
            return
        theirs, ours = type(loaded.pipeline).__qualname__, type(mine.pipeline).__qualname__
        warn_later(
            f"Version {loaded.number} of {self.key.name!r} is a {theirs}, not a {ours}. This process goes on with "
            f"version {mine.number}. Publish other classes under other names."
        )


class Watcher:
    """The thread that follows names. It runs as long as this process follows a name or holds storages.

    Attributes:
        changes: how often this process has changed a name.
    """

    def __init__(self) -> None:
        self._followed: weakref.WeakSet[Followed] = weakref.WeakSet()
        self._holdings = Holdings()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._session: object = None  # the session that the thread works in
        self._registry: Any = None  # the registry that the thread called last
        self._id = uuid.uuid4().hex
        self._woken: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.changes = 0

    def follow(self, followed: Followed) -> None:
        """Pass changes to `followed` from now on, as long as it lives."""
        with self._lock:
            self._followed.add(followed)
        self._start()

    def hold(self, manifest: Manifest) -> None:
        """Remember loaded weights as long as they are mapped: the registry may need them."""
        if self._holdings.note_loaded(manifest):
            self._start()

    def hold_pipeline(self, pipeline: Any, digests: Sequence[bytes], offer: Callable[[Any], None]) -> None:
        """Remember a live pipeline that this process published; see `Holdings.note_published`."""
        self._holdings.note_published(pipeline, digests, offer)
        self._start()

    def note_here(self, name: str) -> None:
        """Remember that this process has changed a name, so that its next call uses the new version."""
        self.changes += 1
        for one in list(self._followed):
            if one.key.name == name and one.key.device is None and one.session is object_store.session():
                one.look()

    def _start(self) -> None:
        session = object_store.session()
        with self._lock:
            if self._thread is None or not self._thread.is_alive() or self._session is not session:
                self._session = session
                self._thread = threading.Thread(target=self._run, args=[session], name="zerocopy-follow", daemon=True)
                self._thread.start()
            if not self._woken.done():
                self._woken.set_result(None)

    def _run(self, session: object) -> None:
        failures = 0
        while self._has_work(session):
            try:
                self._wait_once()
                failures = 0
            except Exception as error:  # also an error of a user's pipeline while it is uploaded
                failures += 1
                if failures == WORTH_A_WARNING and session is object_store.session():
                    reason = first_line(error)
                    warn_later(
                        f"zerocopy cannot ask for newer versions now. It tries again, and this process goes on with the versions "
                        f"that it has loaded: {reason}"
                    )
                time.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 (many shall not ask at one moment)

    def _has_work(self, session: object) -> bool:
        with self._lock:
            followed = [one for one in self._followed if one.session is session]
            is_connected = session is not None and session is object_store.session()
            if is_connected and (followed or self._holdings.digests()):
                return True
            if self._thread is threading.current_thread():
                self._thread = None
            return False

    def _wait_once(self) -> None:
        """Make one call to the registry, and handle its answer."""
        with self._lock:
            if self._woken.done():
                self._woken = concurrent.futures.Future()
            woken, known = self._woken, self._known()
        held = self._holdings.digests()
        registry = self._registry_now()
        reply = client.submit(registry, "poll", known, held, self._id).future()
        concurrent.futures.wait([reply, woken], 2 * POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
        if not reply.done():
            return
        changed, wanted = client.answer(registry, reply.result)
        with contextlib.ExitStack() as each:  # an error of one does not stop the others
            if wanted:
                each.callback(self._holdings.give_back, registry, node(), set(wanted))
            for one in list(self._followed):  # the thread keeps no reference to them while it waits
                number = changed.get((one.key.name, one.key.which), one.seen)
                if number != one.seen:
                    each.callback(one.note, number)

    def _known(self) -> dict[tuple[str, str | int], int]:
        """By name and alias or number, the version that its followers have seen, or `NOT_AGREED`. The caller holds the lock."""
        known: dict[tuple[str, str | int], int] = {}
        for one in self._followed:
            which = one.key.name, one.key.which
            known[which] = one.seen if known.get(which, one.seen) == one.seen else NOT_AGREED
        return known

    def _registry_now(self) -> Any:
        """Return the registry. If it is a new one, look up again the versions that are followed without a device.

        Only their references are used, and references of the last registry are dead.
        """
        object_store.check_running("Following publications")  # a thread must not start Ray
        registry = client.registry()
        if self._registry not in (None, registry):
            for one in list(self._followed):
                if one.key.device is None:
                    one.look()
        self._registry = registry
        return registry


WATCHER = Watcher()
_warned: set[str] = set()
_pending: list[str] = []  # warnings of the thread. The next call that asks for a version issues them


def warn_once(text: str) -> None:
    """Warn once of a problem that concerns this whole process."""
    if text not in _warned:
        _warned.add(text)
        warn_caller(text, FollowWarning)


def warn_later(text: str) -> None:
    """Warn once, at the user's next call that asks for a version: nobody would see a warning of the thread."""
    if text not in _warned:
        _pending.append(text)


def _warn_of_pending() -> None:
    while _pending:
        warn_once(_pending.pop())


def node() -> str:
    """Return the id of the node of this process."""
    found: str = ray.get_runtime_context().get_node_id()
    return found
