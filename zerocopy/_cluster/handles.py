"""How does a handle of a publication with a name work? Any process of the cluster can find its weights, also after a loss.

The pickle of the handle contains the name, and the number of a version or an alias. In an argument of a Ray call, it also
contains the object reference of the sender. Ray counts this reference, so the version stays until the call has ended.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import attrs
import ray
import torch

from zerocopy._cluster import client
from zerocopy._cluster.following import WATCHER, Followed, Key, Loaded
from zerocopy._cluster.keeping import RegistrysHolders
from zerocopy._cluster.names import LATEST
from zerocopy._compat.ray import is_serializing
from zerocopy._load import devices
from zerocopy._load.publication import Closed, Lease, Open, Publication, T_co
from zerocopy._nodes.prefetch import Keeper
from zerocopy._publish.passing import register_handle
from zerocopy._store import object_store
from zerocopy._store.manifest import Manifest, Outer, Versions
from zerocopy.errors import NotPublishedError, PublicationLostError

R = TypeVar("R")


@attrs.frozen
class Version:
    """One version of a name.

    Attributes:
        name: the name.
        number: its number; the first version has 1.
        digest: digest of its content, in hexadecimal digits. Equal content has equal digests, also under other names.
    """

    name: str
    number: int
    digest: str


ANSWER_SECONDS = 0.005  # how long the answer to a lookup can be used: enough for lookup(...).load()

# The versions that live pipelines were published as. A version is not looked up again until the registry reports that it is gone.
_found: weakref.WeakKeyDictionary[Tag, Followed] = weakref.WeakKeyDictionary()


@attrs.frozen
class Tag:
    """The version or the alias that a handle refers to.

    Attributes:
        number: number of the version. None for a handle that follows an alias and was not used yet.
        alias: the alias that `current()` follows; None for a handle of one fixed version.
        follows: whether the handle was created for the alias, and not for one version.
        digest: digest of the version, in hexadecimal digits; None if it is not known.
    """

    name: str
    number: int | None = None
    alias: str | None = None
    follows: bool = False
    digest: str | None = None

    def publication(
        self, manifest: ray.ObjectRef[Any], outer: Outer, *description: Any, **kwargs: Any
    ) -> NamedPublication:
        """Return a handle with this tag and its own outer skeleton; see `live.Tag`."""
        kind, shared_bytes, requires_isolation, versions = description
        return NamedPublication(Open(manifest, outer), kind, shared_bytes, requires_isolation, versions, self, **kwargs)

    def find(self) -> ray.ObjectRef[Any] | None:
        """Return the reference to the manifest. None if the version was removed, has other content, or lost its weights."""
        followed = _found.get(self)
        if followed is None or followed.session is not object_store.session():
            followed = _found[self] = followed_by(self.name, self.number or LATEST, None)
        try:
            handle: Any = followed.newest().handle
        except (NotPublishedError, PublicationLostError):
            return None
        reference: ray.ObjectRef[Any] = handle.reference
        return reference if handle.tag.digest == self.digest else None

    @property
    def version(self) -> Version | None:
        return None if self.number is None or self.digest is None else Version(self.name, self.number, self.digest)


@attrs.frozen
class Unresolved:
    """The state of a handle that must ask the registry.

    Attributes:
        outer: the outer skeleton, if the handle carries one of its own.
    """

    outer: Outer | None = None


class Answer(NamedTuple):
    """The registry's answer to a lookup.

    Attributes:
        until: the time until which it can be used, of `time.monotonic`.
        changes: how often this process had changed a name before the lookup.
    """

    told: dict[str, Any]
    until: float
    changes: int

    def is_good(self) -> bool:
        """Whether the answer can be used instead of another call of the registry."""
        is_told = self.told["reference"] is not None
        return is_told and time.monotonic() < self.until and self.changes == WATCHER.changes


class NamedPublication(Publication[T_co]):
    """A publication that has a name. `zerocopy.lookup` and `zerocopy.publish` return it."""

    _state: Open | Unresolved | Closed  # type: ignore[assignment]

    def __init__(
        self,
        state: Open | Unresolved | Closed,
        kind: str,
        shared_bytes: int,
        requires_isolation: bool,
        versions: Versions,
        tag: Tag,
        *,
        cls: type | None = None,
        lease: Lease | None = None,
    ) -> None:
        super().__init__(state, kind, shared_bytes, requires_isolation, versions, cls=cls, lease=lease)  # type: ignore[arg-type]
        self.tag = tag
        self._followed: Followed | None = None  # for `current`
        self._known: Followed | None = None  # for `for_call`
        self._answer: Answer | None = None

    @property
    def name(self) -> str:
        """The name of the publication."""
        return self.tag.name

    @property
    def alias(self) -> str | None:
        """The alias that `current()` follows; None for a handle of one fixed version."""
        return self.tag.alias

    @property
    def version(self) -> Version:
        """The version that `load()` returns now.

        Raises:
            As `load`, if there is no such version.
        """
        version = self.pinned().tag.version
        if version is None:
            raise RuntimeError("a pinned handle has a version")
        return version

    def pinned(self) -> NamedPublication[T_co]:
        """Return a handle of the current version. This handle stays at that version, unless it has only an alias."""
        found = self._found()
        if self.tag.number is not None:  # else the next use may find another version
            self._state, self.tag = found._state, found.tag
        return found

    def _found(self) -> NamedPublication[T_co]:
        self._check_open()
        if isinstance(self._state, Open) and self._state.session is object_store.session():
            return self
        object_store.check_running(f"The publication {self.name!r}")
        return self._resolved()

    def answered(self, told: dict[str, Any], changes: int) -> Self:
        """Return this handle with the registry's answer, for a load that follows at once. The first use drops the answer."""
        self._answer = Answer(told, time.monotonic() + ANSWER_SECONDS, changes)
        return self

    def _resolved(self) -> NamedPublication[T_co]:
        tag, answer, self._answer = self.tag, self._answer, None
        if answer is not None and answer.is_good():
            return self._of(answer.told)
        if tag.number is None:
            return self._of(resolve(tag.name, tag.alias or LATEST))
        try:
            return self._of(resolve(tag.name, tag.number))
        except (NotPublishedError, PublicationLostError):
            # An outer skeleton belongs to the weights of its own version.
            if not tag.follows or tag.alias is None or self._own_outer() is not None:
                raise
            return self._of(resolve(tag.name, tag.alias))

    def _of(self, told: dict[str, Any]) -> NamedPublication[T_co]:
        """Return a handle like this one, of the version in the registry's answer."""
        tag, digest = self.tag, told["digest"].hex()
        if told["number"] == tag.number and tag.digest not in (None, digest):
            raise NotPublishedError(
                f"This publication comes from another cluster: here version {tag.number} of {tag.name!r} has other content.",
                hint=f"look it up in this cluster: zerocopy.lookup({tag.name!r}).",
                name=tag.name,
                versions=[told["number"]],
            )
        state = Open(told["reference"][0], self._own_outer())
        return handle_of(told, attrs.evolve(tag, number=told["number"], digest=digest), state)

    def _own_outer(self) -> Outer | None:
        return self._state.outer if isinstance(self._state, (Open, Unresolved)) else None

    def content(self) -> Open:
        """Return the open state of the current version; see `load`."""
        state: Any = self.pinned()._state  # a pinned handle is open
        found: Open = state
        return found

    def load(
        self, device: str | torch.device | None = None, fields: Sequence[str] | None = None, *, verify: bool = False
    ) -> T_co:
        """Load like `Publication.load`. A handle that follows an alias loads the version that the alias points at now.

        Args:
            device: as in `Publication.load`.
            fields: as in `Publication.load`.
            verify: compare the loaded bytes with the digests that were recorded when they were published. Reads all bytes.

        Raises:
            NotPublishedError: the version or the alias does not exist any more. The error lists the existing versions.
            CorruptedError: `verify` found other bytes.
            As `Publication.load`.
        """
        loaded: T_co = self._now(lambda handle: handle._load(device, fields, verify=verify))
        return loaded

    def _recovered(self) -> NamedPublication[T_co]:
        """Recover the weights, and return a handle of the same version. Other users of this handle get the weights, too."""
        found = self._of(client.ask("recover", self.name, self.tag.number))
        self._state = found._state
        return found

    def release(self) -> None:
        """Allow nodes to evict the weights of this name that `prefetch` keeps there."""
        client.ask("release", self.name)

    def _keeper(self) -> Keeper:
        which = (self.tag.alias if self.tag.follows else None) or self.tag.number
        return RegistrysHolders((self.name, which, self.tag.number))

    def _now(self, call: Callable[[NamedPublication[T_co]], R]) -> R:
        """Return the result of `call` for the current version. If its weights are lost, recover them and call again."""
        handle = self.pinned()
        try:
            return call(handle)
        except PublicationLostError:
            return call(handle._recovered())

    def note_load(self, pipeline: Any, manifest: Manifest, *how: Any) -> None:
        """Like `Publication.note_load`. It also remembers the mapped weights, which the registry may need."""
        super().note_load(pipeline, manifest, *how)
        WATCHER.hold(manifest)

    def _tag(self) -> Tag:
        return self.tag

    def current(self, device: str | torch.device | None = None) -> T_co:
        if self.tag.alias is None or self.closed:
            return super().current(device)
        self._answer = None
        followed, target = self._followed, devices.resolve(device)
        is_elsewhere = followed is not None and followed.session is not object_store.session()
        # Without a connection, the loaded version stays in use.
        if followed is None or followed.key.device != target or (is_elsewhere and object_store.is_running()):
            followed = self._followed = followed_by(self.name, self.tag.alias, target)
        current: T_co = followed.current()
        return current

    current.__doc__ = Publication.current.__doc__

    def close(self) -> None:
        """Release the weights. The name and its versions stay: to remove them, use `zerocopy.remove`."""
        super().close()
        self._followed = self._known = None

    def __copy__(self) -> NamedPublication[T_co]:
        """Return another handle of the same version, or of the same alias."""
        self._check_open()
        return NamedPublication(self._state, *self._description(), cls=self.cls, lease=self._lease)

    def for_call(self) -> NamedPublication[T_co]:
        """Return a handle for one call. If this handle follows an alias, the result has the newest version known here."""
        self._answer = None
        if self.tag.number is None and not self.closed:
            if self._known is None or self._known.session is not object_store.session():
                self._known = followed_by(self.name, self.tag.alias or LATEST, None)
            handle: Any = self._known.newest().handle
        else:
            handle = self._found()
        return NamedPublication(handle._state, *handle._description(), cls=self.cls, lease=self._lease)

    def __repr__(self) -> str:
        if self.closed:
            return f"<zerocopy.Publication {self.name!r}: closed>"
        return f"<zerocopy.Publication {self.name!r} of {self.kind}: {self._which()}, {self.shared_bytes:,} bytes>"

    def _told(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("name", "which"), (self.name, self._which())

    def _which(self) -> str:
        return f"version {self.tag.number}" if self.tag.number is not None else f"follows {self.tag.alias!r}"

    def _description(self) -> tuple[Any, ...]:
        return *super()._description(), self.tag

    def without_reference(self) -> NamedPublication[T_co]:
        rebuild, arguments = self.__reduce__()
        handle: NamedPublication = rebuild(*arguments)
        return handle

    def newest(self) -> NamedPublication[T_co]:
        """Return a handle of the version that the alias points at now; without an alias, this handle."""
        return self if self.tag.alias is None else newest(self.name, self.tag.alias)

    def travels_by_name(self) -> bool:
        """Whether the handle is pickled without a reference, because Ray would not count the reference here."""
        return isinstance(self._state, Closed) or not (object_store.is_running() and is_serializing())

    def reduce(self) -> tuple[Any, ...]:
        """Return the reduction of the handle for Ray's pickler."""
        return self.__reduce__() if self.travels_by_name() else super(NamedPublication, self.for_call()).reduce()

    def __reduce__(self) -> tuple[Any, ...]:
        state = self._state if isinstance(self._state, Closed) else Unresolved(self._own_outer())
        return NamedPublication, (state, *self._description())


_following: weakref.WeakValueDictionary[Key, Followed] = weakref.WeakValueDictionary()
_following_lock = threading.Lock()


def followed_by(name: str, which: str | int, target: torch.device | None) -> Followed:
    """Return the `Followed` of this process for an alias or a version on a device. Without a device, nothing is loaded."""
    key = Key(name, which, target)
    with _following_lock:
        followed = _following.get(key)
        if followed is None or followed.session is not object_store.session():
            followed = _following[key] = Followed(key, functools.partial(_load_newest, *key))
    return followed


def followed_for(pipeline: Any, tag: Tag, target: torch.device) -> Followed:
    """Return a `Followed` for one loaded pipeline. Newer versions are loaded only for it, and it takes over their state."""
    which = tag.alias or LATEST
    load = functools.partial(_load_apart, tag.name, which, target)
    return Followed(Key(tag.name, which, target), load, Loaded(tag.number or 0, pipeline, None))


def _load_apart(name: str, which: str | int, target: torch.device) -> Loaded:
    handle = newest(name, which)
    return Loaded(handle.version.number, handle.load(target), handle)


def _load_newest(name: str, which: str | int, target: torch.device | None) -> Loaded:
    """Load the version that an alias points at: one object per version and device in this process."""
    handle = newest(name, which)
    return Loaded(handle.version.number, None if target is None else handle._load_once(target), handle)


def resolve(name: str, which: int | str) -> dict[str, Any]:
    """Return the registry's answer about a version. If its weights are lost, recover them.

    Raises:
        NotPublishedError: the version does not exist.
        PublicationLostError: its weights cannot be recovered.
    """
    told: dict[str, Any] = client.ask("resolve", name, which)
    return told if told["reference"] is not None else client.ask("recover", name, told["number"])


def newest(name: str, which: str | int) -> NamedPublication:
    """Return a handle of the version that an alias points at now, or of one version.

    Raises:
        As `resolve`.
    """
    told = resolve(name, which)
    alias = which if isinstance(which, str) else None
    tag = Tag(name, told["number"], alias, follows=alias is not None, digest=told["digest"].hex())
    return handle_of(told, tag, Open(told["reference"][0], None))


def handle_of(told: dict[str, Any], tag: Tag, state: Open | Unresolved, cls: type | None = None) -> NamedPublication:
    """Create a handle from the registry's answer about its version."""
    versions = Versions(*told["versions"])
    return NamedPublication(
        state, told["kind"], told["shared_bytes"], told["requires_isolation"], versions, tag, cls=cls
    )


register_handle(NamedPublication)
