"""What does a worker process keep of the pipelines that it has loaded: calls of tasks reuse the shared part, one at a time.

What was loaded is reused if nobody has changed it: its tensors have the versions, its modules the members and modes that they
had, and nobody else refers to any of them. That is looked into between calls, while the process has nothing else to do.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import ray
import torch

from zerocopy._changes.slots import HeldSlots, has_slots
from zerocopy._changes.snapshot import LoadedMarks
from zerocopy._compat.cpython import collector_paused, reference_counts
from zerocopy._compat.torch import version_of
from zerocopy._load import devices
from zerocopy._load.load import Shared, is_separable, join, load_shared
from zerocopy._load.publication import Loaded, Publication, announce_load, unpacked
from zerocopy._publish import publish
from zerocopy._run.short_calls import Name
from zerocopy._split import paths, programs
from zerocopy._split.introspect import Outer
from zerocopy._store.write import Manifest, manifest_of

MOST_KEPT = 4  # publications
COPIES = 2  # of each: one is looked through while a call uses the other
IDLE_SECONDS = 3.0  # a publication that is closed is freed by its workers so long after their last call
REPLY_SECONDS = 0.0004  # a call's result is on its way so long after the call has ended
BREATH_SECONDS = 0.00002

_Key: TypeAlias = tuple[bytes, torch.device, bool]  # of a manifest its id, where it was loaded, whether in isolation


class Kept:
    """A loaded shared part, and how it was."""

    def __init__(self, reference: ray.ObjectRef[Any], manifest: Manifest, shared: Shared) -> None:
        self.reference = reference
        self.manifest = manifest
        self.shared = shared
        self.last_used = 0.0
        self.marks = LoadedMarks(shared.tensors, shared.memory.mapped)
        self._modules = list(paths.registered_below(paths.modules_among(shared.roots)).values())
        self._tensors = _each_once([*shared.tensors.values(), *_tensors_of(self._modules)])
        self._slots = HeldSlots([vars(module) for module in self._modules if has_slots(module)])
        self._others = [module for module in self._modules if not has_slots(module)]
        self._references = self._count_references()
        self._state: object = None
        self._lock = threading.Lock()
        self._is_out = True
        self._was_untouched = False  # and so it is as long as nobody but us has it

    @property
    def is_ready(self) -> bool:
        """Whether it is known already that this may be used again."""
        return self._was_untouched

    def lend(self) -> bool:
        """Whether this may be used again: if everything is as it was noted."""
        with self._lock:
            untouched = self._was_untouched or self._is_untouched(0)
            self._is_out, self._was_untouched = True, False
            return untouched

    def take_back(self) -> None:
        """A call that used this has ended."""
        self.last_used = time.monotonic()
        self._is_out = False

    def look_through(self) -> bool:
        """Find out ahead of the next call what that would have to wait for; whether this is worth keeping."""
        with self._lock:
            if not (self._is_out or self._was_untouched):
                self._was_untouched = self._is_untouched(BREATH_SECONDS)
            return self._is_out or self._was_untouched

    def note_state_once(self) -> None:
        """Note how everything is, but for who refers to it: that was noted before anybody else could."""
        if self._state is not None:
            return
        self._slots.note_modes()
        self._state = self._look()

    def _is_untouched(self, breath: float) -> bool:
        """`breath`: seconds for other threads between parts of this. The interpreter itself would make them wait for longer."""
        try:
            for is_same in self._comparisons():
                if not is_same:
                    return False
                if breath:
                    time.sleep(breath)
        except Exception:  # members that are not the same were compared, as they like it
            return False
        return True

    def _comparisons(self) -> Iterator[bool]:
        yield from self._slots.are_same()
        yield self._look() == self._state
        yield self._count_references() == self._references

    def _look(self) -> object:
        return (
            [getattr(module, "training", None) for module in self._others],  # a frozen program has none
            list(map(version_of, self._tensors)),
            [(tensor.requires_grad, tensor.grad is None) for tensor in self._tensors],
        )

    def _count_references(self) -> list[int]:
        return reference_counts((*self._modules, *self._tensors))


def _each_once(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def _tensors_of(modules: Iterable[torch.nn.Module]) -> Iterable[torch.Tensor | None]:
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            yield from programs.tensors_of(module)
        else:
            yield from module._parameters.values()
            yield from module._buffers.values()


_kept: dict[_Key, list[Kept]] = {}
_lock = threading.Lock()


class NotKept(Exception):
    """This process has not kept what a call needs."""


def _borrow(key: _Key) -> Kept | None:
    """What is kept under `key`, for the caller alone: one that nobody has changed, or a new one like it."""
    with _lock:
        copies = _kept.get(key, [])
        found = next((kept for kept in copies if kept.is_ready or len(copies) == COPIES), None)
        if found is not None:
            copies.remove(found)
        elif copies:
            model = copies[0].reference, copies[0].manifest
        else:
            return None
    if found is not None:
        return found if found.lend() else None
    return _new(key, *model)


def _new(key: _Key, reference: ray.ObjectRef[Any], manifest: Manifest) -> Kept:
    _, target, requires_isolation = key
    imported = len(sys.modules)
    with collector_paused():
        shared = load_shared(manifest, target, require_isolation=requires_isolation)
        if len(sys.modules) > imported:
            gc.collect(0)  # what failed during an import may refer to this call, and so to all that was loaded
        return Kept(reference, manifest, shared)


class Loans:
    """The shared parts that one call uses, given back at its end."""

    def __init__(self) -> None:
        self._taken: list[tuple[_Key, Kept]] = []

    def load(self, publication: Publication, device: str | None) -> Any:
        """As `publication.load(device)`, around a shared part that this process has already, if nothing tells against it."""
        reference, outer = publication.content()
        key = reference.binary(), devices.resolve(device), publication.requires_isolation
        kept = _borrow(key)
        if kept is None:
            manifest = manifest_of(reference)
            if not (manifest.is_reusable and is_separable(manifest, outer)):
                return publication.load(device)
            publication.require_agreement()
            kept = _new(key, reference, manifest)
        return (
            self._around(kept, key, publication, outer)
            if is_separable(kept.manifest, outer)
            else publication.load(device)
        )

    def load_kept(self, name: Name, device: str | None) -> Any:
        """The same of a publication that is told by its name.

        Raises:
            NotKept: this process has not got it, or somebody changed it.
        """
        manifest, requires_isolation, packed = name
        key = manifest, devices.resolve(device), requires_isolation
        kept = _borrow(key)
        if kept is None:
            raise NotKept
        publication = unpacked(kept.reference, packed)
        _, outer = publication.content()
        if not is_separable(kept.manifest, outer):
            raise NotKept
        return self._around(kept, key, publication, outer)

    def _around(self, kept: Kept, key: _Key, publication: Publication, outer: Outer) -> Any:
        pipeline = join(kept.manifest, outer, kept.shared, key[1])
        kept.note_state_once()
        announce_load(publication, Loaded(pipeline, kept.reference, kept.marks))
        self._taken.append((key, kept))
        return pipeline

    def give_back(self) -> None:
        """Keep what was used for the next call."""
        for key, kept in self._taken:
            for root in kept.shared.roots:
                publish.forget(root)  # holds references that would keep the weights from being freed
            kept.take_back()
            with _lock:
                copies = _kept.pop(key, [])
                _kept[key] = [*copies, kept][-COPIES:]
                while len(_kept) > MOST_KEPT:
                    del _kept[next(iter(_kept))]
        if self._taken:
            _caretaker.wake()
        self._taken = []


class _Caretaker:
    """A thread that looks through what was given back, and drops what was not used for a while: nobody tells a worker that a
    publication was closed. It ends when nothing is kept.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._given_back = threading.Event()

    def wake(self) -> None:
        self._given_back.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="zerocopy-reuse", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while self._drop_idle():
            if self._given_back.wait(IDLE_SECONDS / 4):
                self._given_back.clear()
                time.sleep(REPLY_SECONDS)
                self._look_through()

    def _look_through(self) -> None:
        with _lock:
            found = [(key, kept) for key, copies in _kept.items() for kept in copies]
        for key, kept in found:
            if not kept.look_through():
                _drop(key, kept)

    def _drop_idle(self) -> bool:
        """Whether anything is left to take care of."""
        oldest = time.monotonic() - IDLE_SECONDS
        with _lock:
            idle = [key for key, copies in _kept.items() if all(kept.last_used < oldest for kept in copies)]
            dropped = [_kept.pop(key) for key in idle]
            if not _kept:
                self._thread = None
            is_left = bool(_kept)
        del dropped  # outside of the lock: whatever goes with it takes its time
        return is_left


def _drop(key: _Key, kept: Kept) -> None:
    with _lock:
        if kept in (copies := _kept.get(key, [])):
            copies.remove(kept)


_caretaker = _Caretaker()
