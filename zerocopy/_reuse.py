"""What does a worker process keep of the pipelines that it has loaded: calls of tasks reuse the shared part, one at a time.

What was loaded is reused if nobody has changed it: its tensors have the versions, its modules the members and modes that they
had, and nobody else refers to any of them. That is looked into between calls, while the process has nothing else to do.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from zerocopy import _devices, _paths, _publishing, _torchscript
from zerocopy._loading import Shared, collector_paused, is_separable, join, load_shared
from zerocopy._publication import Loaded, Publication, announce_load
from zerocopy._shards import Manifest, manifest_of
from zerocopy._slots import Hooks, has_slots, members_of
from zerocopy._snapshot import LoadedMarks

MOST_KEPT = 4  # publications
IDLE_SECONDS = 3.0  # a publication that is closed is freed by its workers so long after their last call
REPLY_SECONDS = 0.0004  # a call's result is on its way so long after the call has ended

_Key: TypeAlias = tuple[bytes, torch.device, object]


class Kept:
    """A loaded shared part, and how it was."""

    def __init__(self, manifest: Manifest, shared: Shared) -> None:
        self.manifest = manifest
        self.shared = shared
        self.last_used = 0.0
        self.marks = LoadedMarks(shared.tensors, shared.memory.mapped)
        self._modules = list(_paths.registered_below(_paths.modules_among(shared.roots)).values())
        self._tensors = _each_once([*shared.tensors.values(), *_tensors_of(self._modules)])
        self._owns = [vars(module) for module in self._modules if has_slots(module)]
        self._others = [module for module in self._modules if not has_slots(module)]
        self._hooks = Hooks(self._owns)
        self._members = [*self._owns, *members_of(self._owns)]
        self._noted = list(map(dict, self._members))
        self._references = self._count_references()
        self._state: object = None
        self._lock = threading.Lock()
        self._is_out = True
        self._was_untouched = False  # and so it is as long as nobody but us has it

    def lend(self) -> bool:
        """Whether this may be used again: if everything is as it was noted."""
        with self._lock:
            untouched = self._was_untouched or self._is_untouched()
            self._is_out, self._was_untouched = True, False
            return untouched

    def take_back(self) -> None:
        """A call that used this has ended."""
        self.last_used = time.monotonic()
        self._is_out = False

    def look_through(self) -> None:
        """Find out ahead of the next call what that would have to wait for."""
        with self._lock:
            if not (self._is_out or self._was_untouched):
                self._was_untouched = self._is_untouched()

    def note_state(self) -> None:
        """Note how everything is now, but for who refers to it: that was noted before anybody else could."""
        for members, noted in zip(self._members, self._noted, strict=True):
            noted.update(members)
        self._state = self._look()

    def _is_untouched(self) -> bool:
        try:
            # Of equal dicts with the same values, none of these is looked at.
            same = self._members == self._noted and self._hooks.are_same(self._owns)
            return same and self._look() == self._state and self._count_references() == self._references
        except Exception:  # members that are not the same were compared, as they like it
            return False

    def _look(self) -> object:
        return (
            [getattr(module, "training", None) for module in self._others],  # a frozen program has none
            [tensor._version for tensor in self._tensors],
            [tensor.requires_grad for tensor in self._tensors],
            [tensor.grad is None for tensor in self._tensors],
        )

    def _count_references(self) -> list[int]:
        return list(map(sys.getrefcount, (*self._modules, *self._tensors)))


def _each_once(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def _tensors_of(modules: Iterable[torch.nn.Module]) -> Iterable[torch.Tensor | None]:
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            yield from _torchscript.tensors_of(module)
        else:
            yield from module._parameters.values()
            yield from module._buffers.values()


_kept: dict[_Key, Kept] = {}
_lock = threading.Lock()


class Loans:
    """The shared parts that one call uses, given back at its end."""

    def __init__(self) -> None:
        self._taken: list[tuple[_Key, Kept]] = []

    def load(self, publication: Publication, device: str | None) -> Any:
        """As `publication.load(device)`, around a shared part that this process has already, if nothing tells against it."""
        reference, outer = publication.content()
        target = _devices.resolve(device)
        key = reference.binary(), target, publication.requires_isolation
        with _lock:
            kept = _kept.pop(key, None)
        if kept is None or not kept.lend():
            kept = None  # first: it may be the last that maps the weights
            manifest = manifest_of(reference)
            if not (manifest.is_reusable and is_separable(manifest, outer)):
                return publication.load(device)
            publication.require_agreement()
            with collector_paused():
                kept = Kept(manifest, load_shared(manifest, target, require_isolation=publication.requires_isolation))
                pipeline = join(manifest, outer, kept.shared, target)
                kept.note_state()
        elif is_separable(kept.manifest, outer):
            pipeline = join(kept.manifest, outer, kept.shared, target)
        else:
            return publication.load(device)
        announce_load(publication, Loaded(pipeline, reference, kept.marks))
        self._taken.append((key, kept))
        return pipeline

    def give_back(self) -> None:
        """Keep what was used for the next call."""
        for key, kept in self._taken:
            for root in kept.shared.roots:
                _publishing.forget(root)  # holds references that would keep the weights from being freed
            kept.take_back()
            with _lock:
                _kept.pop(key, None)
                _kept[key] = kept
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
            found = list(_kept.values())
        for kept in found:
            kept.look_through()

    def _drop_idle(self) -> bool:
        """Whether anything is left to take care of."""
        oldest = time.monotonic() - IDLE_SECONDS
        with _lock:
            idle = [_kept.pop(key) for key in [key for key, kept in _kept.items() if kept.last_used < oldest]]
            if not _kept:
                self._thread = None
            is_left = bool(_kept)
        del idle  # outside of the lock: whatever goes with it takes its time
        return is_left


_caretaker = _Caretaker()
