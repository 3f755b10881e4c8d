"""Which loads does a worker process keep, so that calls of tasks reuse the shared part of a pipeline?

Only one call at a time uses a load. After the call, the load is compared with its recorded state, before the next call and while
the process has nothing else to do. If the load is unchanged, the next call acquires it. Otherwise, it is dropped.
"""

from __future__ import annotations

import enum
import gc
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import attrs
import ray
import torch

from zerocopy._changes.kept import Kept
from zerocopy._compat.cpython import collector_paused
from zerocopy._load import devices, live
from zerocopy._load.load import SharedPart, is_separable, join, load_shared
from zerocopy._load.publication import Publication, unpacked
from zerocopy._run.short_calls import Name
from zerocopy._store.manifest import Manifest, Outer
from zerocopy._store.read import manifest_of
from zerocopy.errors import PublicationLostError


@attrs.frozen
class Limits:
    """How many loads a process keeps, and for how long.

    Attributes:
        publications: the number of publications whose loads are kept.
        copies: the number of loads of each publication. With two loads, one is compared while a call uses the other.
        idle_seconds: loads are evicted after this time without a call, because a worker is not informed when a publication is
            closed.
        reply_seconds: how long comparisons wait after a call, so that its result is sent first.
        breath_seconds: how long a comparison pauses after each part, for other threads.
    """

    publications: int = 4
    copies: int = 2
    idle_seconds: float = 3.0
    reply_seconds: float = 0.0004
    breath_seconds: float = 0.00002


class State(enum.Enum):
    """Which code has a load, and what is known about the load."""

    NEW = "a call has loaded it, and not joined it to a pipeline yet"
    IN_USE = "a call has it"
    UNCHECKED = "the cache has it: a call has used it since it was last compared"
    CHECKING = "it is being compared, and left to the thread that does so"
    UNCHANGED = "the cache has it: nobody has changed it, and nobody else refers to it"
    CHANGED = "it is not used again"


class Event(enum.Enum):
    """What happens to a load."""

    JOINED = enum.auto()
    RELEASED = enum.auto()
    CHECK_STARTED = enum.auto()
    FOUND_UNCHANGED = enum.auto()
    FOUND_CHANGED = enum.auto()
    ACQUIRED = enum.auto()


_NEXT = {
    (State.NEW, Event.JOINED): State.IN_USE,
    (State.IN_USE, Event.RELEASED): State.UNCHECKED,
    (State.UNCHECKED, Event.CHECK_STARTED): State.CHECKING,
    (State.CHECKING, Event.FOUND_UNCHANGED): State.UNCHANGED,
    (State.CHECKING, Event.FOUND_CHANGED): State.CHANGED,
    (State.UNCHANGED, Event.ACQUIRED): State.IN_USE,
}


def next_state(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        RuntimeError: the event cannot happen in this state.
    """
    following = _NEXT.get((state, event))
    if following is None:
        raise RuntimeError(f"a load that is {state.name} cannot be {event.name}")
    return following


class Key(NamedTuple):
    """Loads with equal keys can replace each other. `manifest` is the id of its reference."""

    manifest: bytes
    device: torch.device
    requires_isolation: bool


class Entry:
    """A loaded shared part, and its state."""

    def __init__(self, key: Key, reference: ray.ObjectRef[Any], manifest: Manifest, shared: SharedPart) -> None:
        self.key = key
        self.reference = reference
        self.manifest = manifest
        self.shared = shared
        self.kept = Kept(shared.roots, shared.tensors.values(), shared.memory.mapped_memory())
        self.seconds = 0.0  # how long the load took
        self.state = State.NEW
        self.last_used = 0.0

    @classmethod
    def load(cls, key: Key, reference: ray.ObjectRef[Any], manifest: Manifest) -> Self:
        """Load the shared part of a publication."""
        started, imported = time.perf_counter(), len(sys.modules)
        with collector_paused():
            shared = load_shared(manifest, key.device, require_isolation=key.requires_isolation)
            if len(sys.modules) > imported:
                gc.collect(0)  # an error during an import may refer to this call, and so to everything that was loaded
            entry = cls(key, reference, manifest, shared)
            entry.seconds = time.perf_counter() - started
            return entry

    def note(self, event: Event) -> None:
        """Change to the state after `event`."""
        self.state = next_state(self.state, event)

    def check(self, breath: float = 0.0) -> bool:
        """Whether the load is unchanged; see `Kept.is_unchanged`."""
        is_unchanged = self.kept.is_unchanged(breath)
        self.note(Event.FOUND_UNCHANGED if is_unchanged else Event.FOUND_CHANGED)
        return is_unchanged


class LoadCache:
    """The loads that a process keeps, except those that calls are using."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._entries: dict[Key, list[Entry]] = {}  # keys and copies in the order of their last release
        self._lock = threading.Lock()
        self._evictor: _Evictor | None = None

    def acquire(self, key: Key) -> Entry | None:
        """An unchanged load for the caller only: a kept one, or a new one of the same publication. None if none is usable."""
        with self._lock:
            copies = self._entries.get(key)
            if not copies:
                return None
            entry = self._best_of(copies)
            if entry is None:
                reference, manifest = copies[0].reference, copies[0].manifest
            else:
                copies.remove(entry)
        if entry is None:
            return Entry.load(key, reference, manifest)
        if entry.state is State.UNCHECKED:
            entry.note(Event.CHECK_STARTED)
            if not entry.check():
                return None
        entry.note(Event.ACQUIRED)
        return entry

    def _best_of(self, copies: list[Entry]) -> Entry | None:
        """An unchanged copy. If the limit allows no new copy, also an unchecked one. None if there is no such copy."""
        is_full = len(copies) >= self.limits.copies
        for state in (State.UNCHANGED, State.UNCHECKED) if is_full else (State.UNCHANGED,):
            for entry in copies:
                if entry.state is state:
                    return entry
        return None

    def release(self, entries: Iterable[Entry]) -> None:
        """Keep the loads that a call has used, within the limits."""
        evicted = []  # freed outside of the lock: it takes a while
        with self._lock:
            for entry in entries:
                entry.note(Event.RELEASED)
                entry.last_used = time.monotonic()
                copies = [*self._entries.pop(entry.key, []), entry]
                evicted.append(copies[: -self.limits.copies])
                self._entries[entry.key] = copies[-self.limits.copies :]
            while len(self._entries) > self.limits.publications:
                evicted.append(self._entries.pop(next(iter(self._entries))))
            if self._evictor is None or not self._evictor.is_alive():
                self._evictor = _Evictor(self)
                self._evictor.start()
            self._evictor.released.set()

    def validate(self) -> None:
        """Compare the released loads, so that the next call need not do it, and drop the changed ones."""
        with self._lock:
            entries = [entry for copies in self._entries.values() for entry in copies]
        for entry in entries:
            with self._lock:
                if entry.state is not State.UNCHECKED or entry not in self._entries.get(entry.key, ()):
                    continue
                entry.note(Event.CHECK_STARTED)
            if not entry.check(self.limits.breath_seconds):
                with self._lock:
                    if entry in (copies := self._entries.get(entry.key, [])):
                        copies.remove(entry)

    def evict_idle(self) -> bool:
        """Drop the loads of publications that no call used recently. Returns whether any is left; if not, the evictor ends."""
        oldest = time.monotonic() - self.limits.idle_seconds
        with self._lock:
            idle = [key for key, copies in self._entries.items() if all(entry.last_used < oldest for entry in copies)]
            evicted = [self._entries.pop(key) for key in idle]
            is_left = bool(self._entries)
            if not is_left:
                self._evictor = None
        del evicted  # outside of the lock: it takes a while
        if any(key.device.type == "cuda" for key in idle):
            torch.cuda.empty_cache()  # else torch would keep memory that other processes on the GPU need
        return is_left


class _Evictor(threading.Thread):
    """Validates released loads, and evicts idle ones, until no load is kept."""

    def __init__(self, cache: LoadCache) -> None:
        super().__init__(name="zerocopy-reuse", daemon=True)
        self.released = threading.Event()
        self._cache = cache

    def run(self) -> None:
        limits = self._cache.limits
        while self._cache.evict_idle():
            if self.released.wait(limits.idle_seconds / 4):
                self.released.clear()
                time.sleep(limits.reply_seconds)
                self._cache.validate()


CACHE = LoadCache()


class NotCached(Exception):
    """This process keeps no unchanged load of the publication that a call names."""


class CallLoads:
    """The loads that one call uses. They are released at its end, unless it failed."""

    def __init__(self, cache: LoadCache = CACHE) -> None:
        self._cache = cache
        self._entries: list[Entry] = []

    def load(self, publication: Publication, device: str | None) -> Any:
        """Like `publication.load(device)`, but with a shared part that this process keeps, if it can be reused."""
        try:
            return self._load(publication, device)
        except PublicationLostError:  # a publication with a name may find it again
            return publication.load(device)

    def _load(self, publication: Publication, device: str | None) -> Any:
        content = publication.content()
        reference = content.reference
        key = Key(reference.binary(), devices.resolve(device), publication.requires_isolation)
        entry = self._cache.acquire(key)
        if entry is None:
            manifest = manifest_of(reference)
            if manifest.is_reusable and is_separable(manifest, manifest.outer_of(content.outer)):
                publication.check_agreement()
                entry = Entry.load(key, reference, manifest)
        outer = None if entry is None else entry.manifest.outer_of(content.outer)
        if entry is None or outer is None or not is_separable(entry.manifest, outer):
            return publication.load(device)
        return self._join(entry, publication, outer)

    def load_named(self, name: Name, device: str | None) -> Any:
        """The same for a publication that is given by its name.

        Raises:
            NotCached: this process keeps no load that can be used for it.
        """
        manifest, requires_isolation, packed = name
        entry = self._cache.acquire(Key(manifest, devices.resolve(device), requires_isolation))
        if entry is None:
            raise NotCached
        publication = unpacked(entry.reference, packed)
        outer = entry.manifest.outer_of(publication.content().outer)
        if not is_separable(entry.manifest, outer):
            raise NotCached
        return self._join(entry, publication, outer)

    def _join(self, entry: Entry, publication: Publication, outer: Outer) -> Any:
        started = time.perf_counter()
        pipeline = join(entry.manifest, outer, entry.shared, entry.key.device)
        memory = entry.shared.memory.mapped_memory()
        if entry.state is State.NEW:
            publication.tell_of_load(entry.manifest, outer, memory, entry.seconds + time.perf_counter() - started)
            entry.kept.record()  # after the join, which may put modules into eval mode
            entry.note(Event.JOINED)
        publication.note_load(pipeline, entry.manifest, memory, entry.key.device)
        self._entries.append(entry)
        return pipeline

    def release(self) -> None:
        """Give the loads back to the cache, for later calls. Nothing may refer to the pipelines any more."""
        if not self._entries:
            return
        for entry in self._entries:
            for root in entry.shared.roots:
                live.forget(root)  # its entry keeps the weights in the store
        self._cache.release(self._entries)
        self._entries = []
