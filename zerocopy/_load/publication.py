"""What is a publication? A small handle to weights in the object store."""

from __future__ import annotations

import functools
import pickle
import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, Self

import attrs
import ray
import torch
from typing_extensions import TypeVar

from zerocopy._compat.cpython import collector_paused
from zerocopy._compat.ray import is_own
from zerocopy._load import devices, live, partial
from zerocopy._load.load import load
from zerocopy._load.on_nodes import OnNodes
from zerocopy._seeing import events
from zerocopy._seeing.ledger import About
from zerocopy._store import object_store
from zerocopy._store.manifest import BESIDE, Handle, Manifest, Outer, Root, Versions
from zerocopy._store.read import manifest_of
from zerocopy._tables import as_html, format_bytes
from zerocopy.errors import NotExposedError, PublicationClosedError, PublicationLostError

T_co = TypeVar("T_co", covariant=True, default=Any)
MOST_PACKED = 16 << 10  # bytes: larger outer skeletons are not cached
MOST_REMEMBERED = 256  # loads


class Lease(Protocol):
    """All handles of one pipeline share it in the process that published the pipeline: see `_publish.publish`."""

    def close(self, reference: ray.ObjectRef[Any]) -> None:
        """One of the handles to these weights was closed."""


@attrs.frozen(eq=False)
class Open:
    """A handle that can be used as long as its connection to Ray lasts.

    Attributes:
        reference: the reference to the manifest.
        outer: the outer skeleton; None if it is in the manifest.
    """

    reference: ray.ObjectRef[Any]
    outer: Outer | None
    session: object = attrs.field(factory=object_store.session)


@attrs.frozen
class Sealed:
    """A handle that arrived by plain pickle. Ray's pickle wrote its content, which is read at the first use."""

    cluster: str
    content: bytes


@attrs.frozen
class Closed:
    """A handle after `close()`."""


class Publication(OnNodes, Handle, Generic[T_co]):
    """A published pipeline: load it in any process of the cluster, pass it to tasks and actors, close it when done.

    `zerocopy.publish` returns it. Its pickle has a few hundred bytes plus the copied parts of the pipeline. For type checkers,
    `Publication[Search]` is a publication whose `load()` returns a `Search`; without the brackets, it returns `Any`.

    Attributes:
        kind: name of the pipeline's class.
        cls: the class itself in the process that published, None elsewhere.
        shared_bytes: bytes of the weights in the store.
        requires_isolation: whether `load` raises an error where private mappings are not possible.
    """

    def __init__(
        self,
        state: Open | Sealed | Closed,
        kind: str,
        shared_bytes: int,
        requires_isolation: bool,
        versions: Versions,
        *,
        cls: type | None = None,
        lease: Lease | None = None,
    ) -> None:
        self._state = state
        self.kind = kind
        self.shared_bytes = shared_bytes
        self.requires_isolation = requires_isolation
        self._versions = versions
        self.cls = cls
        self._lease = lease
        self._current: tuple[torch.device, Any] | None = None
        self._holders = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called on this handle."""
        return isinstance(self._state, Closed)

    @property
    def reference(self) -> ray.ObjectRef[Any]:
        """The reference that keeps the weights in the store.

        Raises:
            As `load`, if the publication is closed or lost.
        """
        return self.content().reference

    def load(
        self, device: str | torch.device | None = None, fields: Sequence[str] | None = None, *, verify: bool = False
    ) -> T_co:
        """Create a live pipeline over the weights in the store, in milliseconds and without a copy. Writes to it are private.

        `close()` releases the weights in the store. `zerocopy.unshare()` copies the weights of a loaded pipeline into private
        memory.

        Args:
            device: the device of every tensor: a torch device, `"auto"` for the GPU that Ray assigned (else the CPU), or None
                for the CPU. A field that declares a device of its own keeps that device.
            fields: load only these attributes and the objects that they refer to. The other attributes raise AttributeError.
            verify: compare all loaded bytes with their digests. Only publications with a name have digests.

        Returns:
            A new pipeline of the published class, independent of any other load. Its `__init__` does not run.

        Raises:
            PublicationClosedError: the publication was closed.
            PublicationLostError: its weights are lost from the cluster.
            VersionError: it was written by versions of zerocopy, torch or Python that do not match those of this process.
            DeviceError: a device does not exist, or fields that share memory would go to different devices.
            ArgumentError: `fields` names an attribute that the pipeline does not have, or there are no digests to verify.
            CorruptedError: `verify` found bytes that differ from the published bytes.
            IsolationError: private mappings are required, but are not possible here.
        """
        loaded: T_co = self._load(device, fields, verify=verify)
        return loaded

    def _load(self, device: str | torch.device | None, fields: Sequence[str] | None, *, verify: bool) -> Any:
        started = time.perf_counter()
        names = None if fields is None else partial.names_of(fields)
        with collector_paused(promote=_is_first_load(self.reference)):
            manifest, outer = self._described()
            target = devices.resolve(device)
            pipeline, memory = load(manifest, outer, target, names, require_isolation=self.requires_isolation)
            if verify:
                memory.check_digests()
            mapped = memory.mapped_memory()
            self.note_load(pipeline, manifest, mapped, target, names)
        self.tell_of_load(manifest, outer, mapped, time.perf_counter() - started)
        return pipeline

    def _described(self) -> tuple[Manifest, Outer]:
        content = self.content()
        self.check_agreement()
        manifest = manifest_of(content.reference)
        return manifest, manifest.outer_of(content.outer)

    def tell_of_load(self, manifest: Manifest, outer: Outer, memory: Sequence[Any], seconds: float) -> None:
        """Log and count a load into new memory."""
        about = self.about(outer)
        events.loaded(manifest.shard(BESIDE).binary(), about, manifest.used_bytes, memory, seconds)

    def about(self, outer: Outer) -> About:
        """The name, version, class and sizes of this publication."""
        tag = self._tag()
        name, number = ("", None) if tag is None else (tag.name, tag.number)
        return About(name, number, self.kind, self.shared_bytes, outer.nbytes)

    def note_load(
        self,
        pipeline: Any,
        manifest: Manifest,
        memory: Sequence[Any],
        target: torch.device,
        fields: Sequence[str] | None = None,
    ) -> None:
        """Remember how a pipeline was loaded from this publication. Its tensors are views of `memory`."""
        origin = live.Origin(manifest.shard(BESIDE), self.shared_bytes, memory, self._tag(), target, fields)
        live.note_load(pipeline, origin)

    def _tag(self) -> live.Tag | None:
        """The tag of the weights, if they have a name."""
        return None

    def current(self, device: str | torch.device | None = None) -> T_co:
        """Return the newest version, loaded. This process has one object per version and device.

        A publication without a name has one version. For a publication with a name, new versions are loaded in the background,
        and this method never waits for them. A caller that keeps the object keeps its version.

        Args:
            device: as in `load`.

        Raises:
            As `load`, at the first call.
        """
        self._check_open()
        target = devices.resolve(device)
        current = self._current  # another thread may use another device, or close this handle
        if current is None or current[0] != target:
            current = self._current = target, self._load_once(target)
        pipeline: T_co = current[1]
        return pipeline

    def _load_once(self, target: torch.device) -> Any:
        key = self.content().reference.binary(), target, self.requires_isolation
        pipeline = _current.get(key)
        if pipeline is None:
            loaded = self.load(target)
            try:
                with _current_lock:  # another thread may have loaded it in the meantime: all get one object
                    pipeline = _current.setdefault(key, loaded)
            except TypeError:  # not every object supports weak references: a module that is a tuple does not
                pipeline = loaded
        return pipeline

    def content(self) -> Open:
        """The state of an open handle.

        Raises:
            PublicationClosedError: the publication was closed.
            PublicationLostError: the connection to its cluster has ended, or this process is connected to another cluster.
            ZeroCopyError: it arrived by plain pickle, and Ray is not running in this process.
        """
        if isinstance(self._state, Sealed):
            object_store.check_running(f"This publication of {self.kind}")
            self._state = self._opened(self._state)
        self._check_open()
        if (
            not isinstance(self._state, Open)
            or self._state.session is None
            or self._state.session is not object_store.session()
        ):
            raise PublicationLostError(
                f"This publication of {self.kind} belongs to a connection to Ray that has ended.",
                hint="publish the pipeline again.",
                reason="connection ended",
            )
        return self._state

    def _check_open(self) -> None:
        if isinstance(self._state, Closed):
            raise PublicationClosedError(
                f"This publication of {self.kind} was closed.", hint="load before close(), or publish again."
            )

    def close(self) -> None:
        """Release the weights in the store. Loaded pipelines keep what they use. Closing twice is allowed."""
        state, self._state = self._state, Closed()
        lease, self._lease = self._lease, None
        self._current = self._holders = None
        if isinstance(state, Open):
            if lease is not None:
                lease.close(state.reference)
            else:  # it came from another process
                object_store.unpin(state.reference)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __copy__(self) -> Publication[T_co]:
        """Another handle to the same weights, which is closed separately."""
        return type(self)(self.content(), *self._description(), cls=self.cls, lease=self._lease)

    def __deepcopy__(self, memo: object) -> Publication[T_co]:
        return self.__copy__()

    def for_call(self) -> Publication[T_co]:
        """A separate handle for one call. If the publication has a name, it is a handle of the newest version."""
        return self.__copy__()

    if not TYPE_CHECKING:  # else type checkers would accept any attribute

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            if name in ("name", "alias", "version"):
                hint = "only a publication with a name has it: zerocopy.publish(..., name=...)."
            else:
                hint = f"load the pipeline first: publication.load().{name}."
            kind = vars(self).get("kind")
            raise NotExposedError(f"A publication of {kind} has no attribute {name!r}.", hint=hint, attribute=name)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.shared_bytes:,} bytes"
        return f"<zerocopy.Publication of {self.kind}: {state}>"

    def _repr_html_(self) -> str:
        headers, row = self._told()
        shared = "closed" if self.closed else format_bytes(self.shared_bytes)
        return as_html((*headers, "class", "shared"), [(*row, self.kind, shared)], right=["shared"])

    def _told(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Additional columns of the table in a notebook."""
        return (), ()

    def check_agreement(self) -> None:
        """Refuse a publication that this process would read incorrectly.

        Raises:
            VersionError: it was written by versions that do not match those of this process.
        """
        self._versions.check_agreement()

    def _description(self) -> tuple[Any, ...]:
        return self.kind, self.shared_bytes, self.requires_isolation, self._versions

    def packed(self) -> bytes | None:
        """Everything except the reference, pickled by plain pickle, which is faster than Ray's.

        None if only Ray's pickle can write it, or if it is too large for a cache.

        Raises:
            As `load`, if the publication is closed or lost.
        """
        outer = self.content().outer
        if outer is not None and not _is_small(outer):
            return None
        cls: Any = type(self)  # for mypy, the class has no hash
        return _pack(cls, outer, *self._description())

    def reduce(self) -> tuple[Any, ...]:
        """Reduce the handle for Ray's pickle, so that Ray counts the reference.

        Raises:
            As `load`, if the publication is closed or lost.
        """
        content = self.content()
        packed = self.packed()
        if packed is None:
            return rebuilt, (content.reference, type(self), content.outer, *self._description())
        return unpacked, (content.reference, packed)

    def __reduce__(self) -> tuple[Any, ...]:
        """For plain pickle, which cannot handle references and their owners: Ray's pickle writes them into a sealed handle."""
        state = self._state if isinstance(self._state, Sealed) else self._sealed()
        return type(self), (state, *self._description())

    def without_reference(self) -> Publication:
        """A handle that keeps no weights in the store, if it can find them again."""
        return self

    def travels_by_name(self) -> bool:
        """Whether it would be pickled without object references now."""
        return False

    def check_out_of_band(self) -> None:
        """Refuse to be pickled where the reference would be useless to the receiver.

        Raises:
            OutOfBandError: see `object_store.check_out_of_band`.
        """
        object_store.check_out_of_band(f"A publication of {self.kind}", lambda: is_own(self.reference))

    def _sealed(self) -> Sealed:
        content = self.content()
        self.check_out_of_band()
        object_store.count_pin(content.reference)
        return Sealed(object_store.cluster(), ray.cloudpickle.dumps((content.reference, content.outer)))

    def _opened(self, sealed: Sealed) -> Open:
        if sealed.cluster != object_store.cluster():
            raise PublicationLostError(
                f"This publication of {self.kind} belongs to another cluster than this process.",
                hint="connect to that cluster, or publish the pipeline in this one.",
                reason="other cluster",
            )
        return Open(*pickle.loads(sealed.content))


def _is_small(outer: Outer) -> bool:
    """Whether plain pickle can write the outer skeleton, and it is small enough for a cache."""
    plain = all(type(obj) in (int, Root, type(None)) for obj in outer.skeleton.externals)
    return plain and outer.nbytes <= MOST_PACKED


_current: weakref.WeakValueDictionary[tuple[bytes, torch.device, bool], Any] = weakref.WeakValueDictionary()
_current_lock = threading.Lock()

_loaded: dict[bytes, None] = {}  # ids of manifests, oldest first


def _is_first_load(reference: ray.ObjectRef[Any]) -> bool:
    """Whether this process has not loaded these weights before, as far as it remembers."""
    manifest = reference.binary()
    if manifest in _loaded:
        return False
    _loaded[manifest] = None
    if len(_loaded) > MOST_REMEMBERED:
        del _loaded[next(iter(_loaded))]
    return True


@functools.lru_cache(64)
def _pack(*parts: Any) -> bytes:
    return pickle.dumps(parts)


@functools.lru_cache(64)
def _unpack(packed: bytes) -> tuple[Any, ...]:
    parts: tuple[Any, ...] = pickle.loads(packed)
    return parts


def unpacked(reference: ray.ObjectRef[Any], packed: bytes) -> Publication:
    """The handle, rebuilt from its reference and the result of `packed`."""
    return rebuilt(reference, *_unpack(packed))


def rebuilt(
    reference: ray.ObjectRef[Any], cls: type[Publication], outer: Outer | None, *description: Any
) -> Publication:
    """The handle, rebuilt in the process that received it."""
    return cls(Open(reference, outer), *description)
