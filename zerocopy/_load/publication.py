"""What is a publication: a small handle to weights in the object store."""

from __future__ import annotations

import functools
import pickle
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self, TypeAlias

import attrs
import ray
import torch

from zerocopy._changes.snapshot import LoadedMarks
from zerocopy._compat.cpython import collector_paused
from zerocopy._load import devices, partial
from zerocopy._load.load import load
from zerocopy._split.introspect import Outer
from zerocopy._split.roles import add_passenger
from zerocopy._split.skeleton import Root
from zerocopy._store import object_store
from zerocopy._store.write import manifest_of
from zerocopy.errors import PublicationClosedError, PublicationLostError, VersionError

MOST_PACKED = 16 << 10  # bytes: more are not worth a place in a cache
MOST_REMEMBERED = 256  # loads
FORMAT = 3  # of manifests and handles; raised when either changes


@attrs.frozen
class Versions:
    """What wrote a publication."""

    format: int
    zerocopy: str
    torch: str
    python: str

    @classmethod
    @functools.cache
    def here(cls) -> Versions:
        return cls(FORMAT, version("zerocopy-ray"), torch.__version__, platform.python_version())

    def require_agreement(self) -> None:
        """Refuse a publication that this process would misread.

        The format must be the same; of Python and torch the first two numbers: code is pickled by value between equal
        Pythons only, and the insides of modules change between minor releases of torch.

        Raises:
            VersionError: they differ.
        """
        here = Versions.here()
        for name, theirs, ours in (
            ("Python", _minor(self.python), _minor(here.python)),
            ("torch", _minor(self.torch), _minor(here.torch)),
            ("zerocopy's format", self.format, here.format),
        ):
            if theirs != ours:
                raise VersionError(
                    f"This publication was written with {name} {theirs}, but this process has {ours} "
                    f"(zerocopy {self.zerocopy} there, {here.zerocopy} here).",
                    hint="install the same versions on every node.",
                )


def _minor(release: str) -> str:
    return ".".join(release.split(".")[:2])


@attrs.frozen
class Loaded:
    """What a load made: the pipeline, and how the shared tensors are that it has."""

    pipeline: Any
    manifest: ray.ObjectRef[Any]
    marks: LoadedMarks


Content: TypeAlias = tuple[ray.ObjectRef[Any], Outer]  # the reference to the manifest, and the outer skeleton

_load_observers: list[Callable[[Publication, Loaded], None]] = []


def observe_loads(observer: Callable[[Publication, Loaded], None]) -> None:
    """Call `observer` with every pipeline loaded in this process, and the publication it came from."""
    _load_observers.append(observer)


def announce_load(publication: Publication, loaded: Loaded) -> None:
    """Tell those who observe loads of one."""
    for observer in _load_observers:
        observer(publication, loaded)


class Publication:
    """A published pipeline: load it in any process of the cluster, pass it to tasks and actors, close it when done.

    Made by `zerocopy.publish`. Pickles to a few hundred bytes and what the pipeline copies.

    Attributes:
        kind: name of the pipeline's class.
        cls: the class itself in the process that published, None elsewhere.
        shared_bytes: bytes of the weights in the store.
        requires_isolation: whether loads refuse where private mappings are not possible.
    """

    def __init__(
        self,
        content: Content | bytes,
        kind: str,
        shared_bytes: int,
        require_isolation: bool,
        versions: Versions,
    ) -> None:
        # Bytes: sealed for plain pickle, until it is used. None: closed.
        self._content: Content | bytes | None = content
        self.kind = kind
        self.shared_bytes = shared_bytes
        self.requires_isolation = require_isolation
        self._versions = versions
        self._session = object_store.session()
        # Set where it was published: what its weights are there, and what else to let go of when it is closed.
        self.cls: type | None = None
        self._lease: object = None  # as long as it lives, publishing the same pipeline again shares these weights
        self._close: Callable[[ray.ObjectRef[Any]], None] | None = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called on this handle."""
        return self._content is None

    @property
    def reference(self) -> ray.ObjectRef[Any]:
        """What keeps the weights in the store.

        Raises:
            As `load`, where the publication means nothing any more.
        """
        return self.content()[0]

    def load(self, device: str | torch.device | None = None, fields: Sequence[str] | None = None) -> Any:
        """Make a live pipeline whose tensors are views of the store, private to this process when written.

        Args:
            device: where every tensor goes: a torch device, `"auto"` for the GPU that Ray assigned (else the CPU), or
                None for the CPU. A field that declares a device of its own keeps it.
            fields: load these attributes only, with what they refer to. The others raise AttributeError.

        Returns:
            A new pipeline of the published class, independent of any other load. Its `__init__` does not run.

        Raises:
            PublicationClosedError: the publication was closed.
            PublicationLostError: its weights are gone from the cluster.
            VersionError: it was written by versions that cannot agree with these.
            DeviceError: a device is not there, or fields that share memory would go to different ones.
            ArgumentError: `fields` names an attribute that the pipeline does not have.
        """
        names = None if fields is None else partial.names_of(fields)
        reference, outer = self.content()
        self.require_agreement()
        with collector_paused(promote=_is_first_load(reference)):
            manifest = manifest_of(reference)
            target = devices.resolve(device)
            pipeline, tensors, memory = load(manifest, outer, target, names, require_isolation=self.requires_isolation)
            announce_load(self, Loaded(pipeline, reference, LoadedMarks(tensors, memory.mapped)))
        return pipeline

    def content(self) -> Content:
        """The content, if it still means something.

        Raises:
            PublicationClosedError: the publication was closed.
            PublicationLostError: the connection to the cluster that it belongs to has ended, or it is another one.
            ZeroCopyError: plain pickle brought it here, where Ray is not running.
        """
        if isinstance(self._content, bytes):
            object_store.require_running(f"This publication of {self.kind}")
            self._content, self._session = self._opened(*pickle.loads(self._content)), object_store.session()
        if self._content is None:
            raise PublicationClosedError(
                f"This publication of {self.kind} was closed.", hint="load before close(), or publish again."
            )
        if self._session is None or self._session is not object_store.session():
            raise PublicationLostError(
                f"This publication of {self.kind} belongs to a connection to Ray that has ended.",
                hint="publish the pipeline again.",
            )
        return self._content

    def close(self) -> None:
        """Let go of the weights. Loaded pipelines keep what they use; closing twice is fine."""
        content, self._content = self._content, None
        close, self._close = self._close, None
        self._lease = None
        if isinstance(content, tuple) and close is not None:
            close(content[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __copy__(self) -> Publication:
        """Another handle to the same weights, to be closed by itself."""
        twin = Publication(*self.parts())
        twin.cls, twin._lease, twin._close = self.cls, self._lease, self._close
        return twin

    def __deepcopy__(self, memo: object) -> Publication:
        return self.__copy__()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.shared_bytes:,} bytes"
        return f"<zerocopy.Publication of {self.kind}: {state}>"

    def require_agreement(self) -> None:
        """Refuse what this process would misread.

        Raises:
            VersionError: it was written by versions that cannot agree with these.
        """
        self._versions.require_agreement()

    def parts(self) -> tuple[Any, ...]:
        """What another handle is made of.

        Raises:
            As `load`, where the publication means nothing any more.
        """
        return self.content(), *self._description()

    def _description(self) -> tuple[Any, ...]:
        return self.kind, self.shared_bytes, self.requires_isolation, self._versions

    def packed(self) -> bytes | None:
        """All but the reference, pickled: for Ray's slower pickle. None where there are things that only Ray can pickle.

        Raises:
            As `load`, where the publication means nothing any more.
        """
        outer = self.content()[1]
        if outer.nbytes > MOST_PACKED or not all(
            type(obj) in (int, Root, type(None)) for obj in outer.skeleton.externals
        ):
            return None
        return _pack(outer, *self._description())

    def __reduce__(self) -> tuple[Any, ...]:
        """For plain pickle, which knows nothing of references and their owners: Ray's pickle seals them."""
        content = self._content if isinstance(self._content, bytes) else self._sealed()
        return Publication, (content, *self._description())

    def _sealed(self) -> bytes:
        content = self.content()
        object_store.refuse_out_of_band(f"A publication of {self.kind}")
        object_store.count_pin(content[0])
        sealed: bytes = pickle.dumps((object_store.cluster(), ray.cloudpickle.dumps(content)))
        return sealed

    def _opened(self, cluster: str, sealed: bytes) -> Content:
        if cluster != object_store.cluster():
            raise PublicationLostError(
                f"This publication of {self.kind} belongs to another cluster than this process.",
                hint="publish the pipeline again.",
            )
        content: Content = pickle.loads(sealed)
        return content


_loaded: dict[bytes, None] = {}  # manifests, oldest first


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
    """The handle that `packed` gave, and its reference."""
    outer, *description = _unpack(packed)
    return Publication((reference, outer), *description)


add_passenger(Publication)
