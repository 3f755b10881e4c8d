"""What does a worker process keep of the pipelines that it has loaded: calls of tasks reuse the shared part, one at a time.

What was loaded is reused if nobody has changed it: its tensors have the versions, its modules the members and modes that they
had, and nobody else refers to any of them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from zerocopy import _devices, _paths, _publishing, _store, _torchscript
from zerocopy._loading import Shared, is_separable, join, load_shared
from zerocopy._publication import Loaded, Publication, announce_load
from zerocopy._shards import Manifest

MOST_KEPT = 4  # publications
IDLE_SECONDS = 3.0  # a publication that is closed is freed by its workers so long after their last call

_Key: TypeAlias = tuple[bytes, torch.device, object]


class Kept:
    """A loaded shared part, and how it was."""

    def __init__(self, manifest: Manifest, shared: Shared) -> None:
        self.manifest = manifest
        self.shared = shared
        self.last_used = 0.0
        self._modules = [part for root in shared.roots if _paths.is_module(root) for part in root.modules()]
        self._tensors = _each_once([*shared.tensors.values(), *_tensors_of(self._modules)])
        dicts = [members for module in self._modules for members in _member_dicts(module)]
        self._empty = [members for members in dicts if not members]
        self._members = [(members, dict(members)) for members in dicts if members]
        self._references = self._count_references()
        self._state: object = None

    def note_state(self) -> None:
        """Note how everything is now, but for who refers to it: that was noted before anybody else could."""
        for members, noted in self._members:
            noted.update(members)
        self._state = self._look()

    def is_untouched(self) -> bool:
        """Whether everything is as it was noted."""
        try:
            # Of equal dicts with the same values, none of these is looked at.
            same = not any(self._empty) and all(members == noted for members, noted in self._members)
            return same and self._look() == self._state and self._count_references() == self._references
        except Exception:  # members that are not the same were compared, as they like it
            return False

    def _look(self) -> object:
        return (
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


def _member_dicts(module: torch.nn.Module) -> Iterable[dict[str, Any]]:
    own = vars(module)
    yield own
    yield from (value for name, value in own.items() if name.startswith("_") and isinstance(value, dict))


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
        if kept is None or not kept.is_untouched():
            kept = None  # first: it may be the last that maps the weights
            manifest: Manifest = _store.get(reference)
            if not (manifest.is_reusable and is_separable(manifest, outer)):
                return publication.load(device)
            publication.require_agreement()
            shared = load_shared(manifest, target, require_isolation=publication.requires_isolation)
            kept = Kept(manifest, shared)
            del shared
            pipeline = join(manifest, outer, kept.shared, target)
            kept.note_state()
        elif is_separable(kept.manifest, outer):
            pipeline = join(kept.manifest, outer, kept.shared, target)
        else:
            return publication.load(device)
        announce_load(publication, Loaded(pipeline, reference, kept.shared.tensors, kept.shared.memory.mapped))
        self._taken.append((key, kept))
        return pipeline

    def give_back(self) -> None:
        """Keep what was used for the next call."""
        for key, kept in self._taken:
            for root in kept.shared.roots:
                _publishing.forget(root)  # holds references that would keep the weights from being freed
            kept.last_used = time.monotonic()
            with _lock:
                _kept.pop(key, None)
                _kept[key] = kept
                while len(_kept) > MOST_KEPT:
                    del _kept[next(iter(_kept))]
        if self._taken:
            _watch()
        self._taken = []


_watcher: list[threading.Thread] = []


def _watch() -> None:
    if not (_watcher and _watcher[0].is_alive()):
        _watcher[:] = [threading.Thread(target=_drop_idle, name="zerocopy-reuse", daemon=True)]
        _watcher[0].start()


def _drop_idle() -> None:
    """Drop what was not used for a while, until nothing is left: nobody tells a worker that a publication was closed."""
    while True:
        time.sleep(IDLE_SECONDS / 4)
        oldest = time.monotonic() - IDLE_SECONDS
        with _lock:
            idle = [_kept.pop(key) for key in [key for key, kept in _kept.items() if kept.last_used < oldest]]
            if not _kept:
                _watcher.clear()
                return
        del idle
