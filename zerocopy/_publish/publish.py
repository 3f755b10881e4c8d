"""How is a live pipeline published? It is introspected and compared with the store, and the missing bytes are written."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import attrs
import ray

from zerocopy._changes.snapshot import Snapshot
from zerocopy._compat.cpython import collector_paused
from zerocopy._compat.ray import is_own
from zerocopy._load import live
from zerocopy._load.publication import Open, Publication
from zerocopy._publish.adoption import Adoption
from zerocopy._publish.weights import (
    ForeignWeights,
    OwnWeights,
    Streamed,
    Weights,
    put,
    put_and_adopt,
    put_streaming,
)
from zerocopy._seeing import events
from zerocopy._split.introspect import Introspection, Subject, check_pipeline, introspect
from zerocopy._store import mapping, object_store, windows
from zerocopy._store.manifest import Outer, Placement, Versions
from zerocopy._store.write import Writer, without_aliases

_lock = threading.RLock()


class Lease:
    """Shared by the explicit publications of one pipeline. While one of them lives, this process remembers the weights."""

    def close(self, manifest: ray.ObjectRef[Any]) -> None:
        """Also stop automatic publishing from keeping these weights, and release the pins of closures."""
        if not object_store.is_running():  # in a forked child, a thread of the parent may hold the lock forever
            return
        with _lock:
            for entry in live.entries():
                published: _Published | None = entry.published
                if published is not None and published.weights.manifest == manifest:
                    published.automatic = False
                    _forget_unless_needed(entry)
        object_store.unpin(manifest)


@attrs.define(eq=False)
class _Published:
    """The weights of a live pipeline. They are remembered while a publication holds the lease; if `automatic`, always."""

    weights: Weights
    automatic: bool = False
    lease: Callable[[], Lease | None] = lambda: None


# The last handle of a pipeline may be dropped at any time, in any thread. Then `entry.published` becomes None, without the lock.
# So each function reads it once.


def _weights_of(entry: live.Entry) -> Weights | None:
    published: _Published | None = entry.published
    return None if published is None else published.weights


def _remember(entry: live.Entry, weights: Weights) -> None:
    """Remember weights that were published automatically, as long as the pipeline lives."""
    published: _Published = entry.published or _Published(weights)
    published.weights, published.automatic, entry.published = weights, True, published
    _forget_unless_needed(entry)


def _lease(entry: live.Entry, weights: Weights) -> Lease:
    """Remember weights as long as the lease lives, which is returned."""
    published: _Published = entry.published or _Published(weights)
    lease = published.lease()
    if lease is None:
        lease = Lease()
        published.lease = weakref.ref(lease, lambda _: _forget_unless_needed(entry))
    published.weights, entry.published = weights, published
    return lease


def _forget_unless_needed(entry: live.Entry) -> None:
    published = entry.published
    if published is None or published.lease() is not None:
        return
    if published.weights.tag is not None:  # the registry keeps weights with a name
        published.weights = published.weights.without_references()
    elif not published.automatic:
        entry.published = None


def publish(pipeline: Any, *, adopt: bool = False) -> Publication:
    """Put the weights of `pipeline` into the object store, once, and return a small handle to them.

    If the same pipeline is published again and no byte of it has changed, both publications share one set of weights. The weights
    leave the store when the last handle and the last loaded pipeline are gone.

    Args:
        pipeline: an instance of a `@zerocopy.pipeline` class, an `nn.Module`, or another object that holds models.
        adopt: whether to turn its tensors into views of the store, each part as soon as it is written, so that this process keeps
            no second copy. Tensors keep their identity and ties, and a write to them stays private. NumPy arrays, TorchScript,
            and memory that other tensors or arrays also use are not moved. After an error, everything is as before.

    Raises:
        ArgumentError: `pipeline` is a class or a publication, or holds nothing to share.
        IsolationError: `adopt` is True, but private mappings are not possible here.
        CannotTravelError: an object inside cannot leave the process. The error names its path.
        StoreTooSmallError: the weights are larger than this node's object store.
        StoreFullError: neither the store nor the disk behind it has room.
        RayClientError: this process is connected through Ray Client.
    """
    check_pipeline(pipeline, "zerocopy.publish")
    return publish_subject(Subject(pipeline), pipeline, adopt=adopt)


class Destination(Protocol):
    """Where weights are written, if not to this process' own part of the store."""

    def stored(self, found: Introspection) -> dict[object, Placement]:
        """The places of the storages that need not be written again, by key."""

    def stored_of(self, streamed: Streamed) -> dict[object, Placement]:
        """The same for a pipeline whose bytes are in memory only while they are read."""

    def make_writer(self, *args: Any) -> Writer:
        """The writer of the other storages. The arguments are those of `Writer`."""


def publish_subject(
    subject: Subject,
    anchor: Any,
    variant: tuple[str, ...] = (),
    *,
    adopt: bool = False,
    destination: Destination | None = None,
) -> Publication:
    """Publish any object that holds models.

    Args:
        anchor: while it lives, later publications of the same `variant` with this anchor share these weights.
        variant: distinguishes this way of publishing from others.
        adopt: as `publish`.
        destination: where to write; None for this process' own part of the store.

    Raises:
        As `publish`, except ArgumentError.
    """
    object_store.require()
    started = time.perf_counter()
    memory: list[Any] = []
    with _lock, collector_paused():
        entry = live.entry_of(anchor, variant)
        found = introspect(subject)
        weights: Weights
        adoption = Adoption(found) if adopt else None
        if adoption is not None and adoption.is_possible():
            stored = _stored(found, entry, exactly=True) if destination is None else destination.stored(found)
            make_writer = None if destination is None else destination.make_writer
            weights, outer = put_and_adopt(subject, found, stored, _sizes(), adoption, make_writer)
            memory = [*(entry.origin.memory() if entry.origin is not None else ()), *adoption.memory()]
            if weights.manifest is not None:
                entry.origin = live.Origin(weights.manifest, weights.shared_bytes, memory, weights.tag)
        elif destination is not None:
            snapshot = Snapshot(found)
            weights = put(found, snapshot, destination.stored(found), {}, destination.make_writer)
            outer = found.outer
        else:
            weights, outer = _same_weights(entry, found) or _put(found, entry, exactly=True)
        publication = _handle(subject.pipeline, weights, outer, _lease(entry, weights))
    _tell(publication, weights, outer, started, memory)
    return publication


def _tell(publication: Publication, weights: Weights, outer: Outer, started: float, memory: Iterable[Any] = ()) -> None:
    """Log and count a publication that began at `started`."""
    used = weights.used if isinstance(weights, OwnWeights) else {}
    _tell_of(publication, weights.manifest, outer, used, started, memory)


def _tell_of(
    publication: Publication,
    manifest: ray.ObjectRef[Any],
    outer: Outer,
    used: Mapping[bytes, int],
    started: float,
    memory: Iterable[Any] = (),
) -> None:
    seconds = time.perf_counter() - started
    events.published(manifest.binary(), publication.about(outer), lambda: used, memory, seconds)


def _same_weights(entry: live.Entry, found: Introspection) -> tuple[Weights, Outer] | None:
    """The weights that `found` was published with or loaded from, and its outer skeleton; None if the store lacks any bytes."""
    known = _weights_of(entry)
    weights = None if known is None else known.in_store()
    if isinstance(weights, OwnWeights) and (outer := weights.with_places().outer_if_same(found)):
        return weights, outer
    return _weights_of_loaded(entry, found)


def _weights_of_loaded(entry: live.Entry, found: Introspection) -> tuple[Weights, Outer] | None:
    """The weights that a pipeline was loaded with, and its outer skeleton; None if it no longer has these weights."""
    weights = ForeignWeights.of_loaded(found, entry.origin)
    outer = None if weights is None else weights.current_outer(found.pipeline)
    return None if weights is None or outer is None else (weights, outer)


def publish_automatically(pipeline: Any) -> Publication:
    """A handle to the weights of `pipeline`. Publishes them if they are new or have changed.

    The weights stay in the store as long as the pipeline lives.
    """
    object_store.require()
    started, is_new = time.perf_counter(), False
    with _lock, collector_paused():
        entry = live.entry_of(pipeline)
        weights = _weights_of(entry)
        outer = None if weights is None else weights.current_outer(pipeline)
        weights = None if weights is None or outer is None else weights.in_store()
        if weights is None or outer is None:
            found = introspect(Subject(pipeline))
            of_loaded = _weights_of_loaded(entry, found)
            is_new = of_loaded is None
            weights, outer = of_loaded or _put(found, entry, exactly=False)
        _remember(entry, weights)
        publication = _handle(pipeline, weights, outer)
    if is_new:
        _tell(publication, weights, outer, started)
    return publication


def has_name(pipeline: Any) -> bool:
    """Whether a pipeline was published or loaded under a name, and still has those weights, as far as this can be detected."""
    return _still_has(pipeline, lambda known: known.tag is not None)


def belongs_to_another(pipeline: Any) -> bool:
    """Whether a pipeline was loaded from a publication of another process, and still has those weights, like `has_name`."""
    return _still_has(pipeline, lambda known: known.manifest is not None and not is_own(known.manifest))


def _still_has(pipeline: Any, are_meant: Callable[[Weights | live.Origin], bool]) -> bool:
    """Whether a pipeline still has the weights that it was published or loaded with, if `are_meant` accepts these."""
    entry = live.entry_of(pipeline)
    with _lock, collector_paused():
        if entry.published is None and entry.origin is not None and are_meant(entry.origin):
            found = _weights_of_loaded(entry, introspect(Subject(pipeline)))
            if found is not None:
                _remember(entry, found[0])
        weights = _weights_of(entry)
        if weights is None or not are_meant(weights) or weights.current_outer(pipeline) is None:
            return False
        return weights.in_store() is not None


def publish_unremembered(found: Introspection) -> Publication:
    """A handle to the weights that a pipeline is published with, or to new ones. This process does not remember new ones.

    Raises:
        As `publish`.
    """
    object_store.require()
    with _lock, collector_paused():
        entry = live.entry_of(found.pipeline)
        if entry.origin is None and entry.published is None:
            live.forget(found.pipeline)
        weights, outer = _same_weights(entry, found) or _put(found, entry, exactly=True)
        return _handle(found.pipeline, weights, outer)


def put_once(streamed: Streamed, destination: Destination | None = None) -> Publication:
    """Publish a pipeline that is never changed or published again.

    Raises:
        StoreTooSmallError: the weights are larger than this node's object store.
    """
    started, found = time.perf_counter(), streamed.found
    if destination is None:
        writer = put_streaming(streamed, {})
    else:
        writer = put_streaming(streamed, destination.stored_of(streamed), destination.make_writer)
    manifest = writer.finish()
    publication = new_handle(found.pipeline, manifest, found.table.nbytes, found.outer, writer.tag, Lease())
    _tell_of(publication, manifest, found.outer, writer.used_bytes(), started)
    return publication


def _put(found: Introspection, entry: live.Entry, *, exactly: bool) -> tuple[Weights, Outer]:
    """Write the storages of `found` that are not `_stored`. Returns the weights, and the outer skeleton."""
    snapshot = Snapshot(found)
    return put(found, snapshot, _stored(found, entry, exactly=exactly), _sizes()), found.outer


def _sizes() -> dict[ray.ObjectRef[Any], int]:
    """Bytes of the shards that this process has written for live pipelines."""
    return {shard: nbytes for weights in _published() for shard, nbytes in weights.sizes.items()}


def _stored(found: Introspection, entry: live.Entry, *, exactly: bool) -> dict[object, Placement]:
    """The places of the storages of `found` that need not be written again.

    Args:
        exactly: compare all bytes of memory that is not a mapping of the store. Else compare only storages that may have changed.
    """
    places: dict[object, Placement] = {}
    for published in _published():
        weights = published.in_store()
        if weights is not None:
            weights = weights.with_places()
            has = weights.verified_places(found.table.storages) if exactly else weights.unchanged_places(found)
            is_superseded = published is _weights_of(entry)
            places.update(weights.worth_keeping(has, found.table.sizes()) if is_superseded else has)
    shown = windows.places_of(found.table.storages)
    owned = object_store.with_owner({place.shard for place in shown.values()})
    places.update((key, place) for key, place in shown.items() if place.shard in owned)
    return without_aliases(found.table.storages, places)


def _published() -> list[OwnWeights]:
    """The weights that this process has written, of all live pipelines."""
    return [weights for weights in map(_weights_of, live.entries()) if isinstance(weights, OwnWeights)]


def _handle(pipeline: Any, weights: Weights, outer: Outer, lease: Lease | None = None) -> Publication:
    return new_handle(pipeline, weights.manifest, weights.shared_bytes, outer, weights.tag, lease)


def new_handle(
    pipeline: Any,
    manifest: ray.ObjectRef[Any],
    shared_bytes: int,
    outer: Outer,
    tag: live.Tag | None = None,
    lease: Lease | None = None,
) -> Publication:
    """A handle to weights in the store."""
    description = type(pipeline).__name__, shared_bytes, requires_isolation(), Versions.here()
    if tag is not None:
        named: Publication = tag.publication(manifest, outer, *description, cls=type(pipeline), lease=lease)
        return named
    return Publication(Open(manifest, outer), *description, cls=type(pipeline), lease=lease)


def requires_isolation() -> bool:
    """Whether publications of this process may be loaded only where private mappings are possible."""
    return os.environ.get(mapping.REQUIRE_ISOLATION, "0") not in ("", "0")
