"""What is a publication: a small handle to weights in the object store, and how it is loaded."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import attrs
import ray
import torch

from zerocopy import _devices, _partial, _store
from zerocopy._introspector import Outer, Skeleton, reach
from zerocopy._roles import add_passenger
from zerocopy._shards import Manifest, StoredMemory
from zerocopy._skeleton import Root, graft
from zerocopy._tensors import Region, TensorSpec, rebuild, stand_in
from zerocopy.errors import DeviceError, PublicationClosedError, PublicationLostError, VersionError

FORMAT = 1  # of manifests and handles; raised when either changes


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
    """What a load made: the pipeline, the shared tensors by index, and the memory that they are views of."""

    pipeline: Any
    manifest: ray.ObjectRef[Any]
    tensors: Mapping[int, Any]
    mappings: Sequence[Any]


_load_observers: list[Callable[[Publication, Loaded], None]] = []


def observe_loads(observer: Callable[[Publication, Loaded], None]) -> None:
    """Call `observer` with every pipeline loaded in this process, and the publication it came from."""
    _load_observers.append(observer)


class Publication:
    """A published pipeline: load it in any process of the cluster, pass it to tasks and actors, close it when done.

    Made by `zerocopy.publish`. Pickles to a few hundred bytes and what the pipeline copies.

    Attributes:
        kind: name of the pipeline's class.
        cls: the class itself in the process that published, None elsewhere.
        shared_bytes: bytes of the weights in the store.
    """

    def __init__(
        self,
        manifest: ray.ObjectRef[Any],
        outer: Outer,
        kind: str,
        shared_bytes: int,
        require_isolation: bool,
        versions: Versions,
    ) -> None:
        self._manifest: ray.ObjectRef[Any] | None = manifest
        self._outer = outer
        self.kind = kind
        self.shared_bytes = shared_bytes
        self._require_isolation = require_isolation
        self._versions = versions
        self._session = _store.session()
        # Set where it was published: what its weights are there, and what else to let go of when it is closed.
        self.cls: type | None = None
        self._lease: object = None  # as long as it lives, publishing the same pipeline again shares these weights
        self._close: Callable[[ray.ObjectRef[Any]], None] | None = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called on this handle."""
        return self._manifest is None

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
        if fields is not None:
            fields = _partial.names_of(fields)
        reference, manifest = self._get_manifest()
        target = _devices.resolve(device)
        everything = range(len(manifest.specs) + len(self._outer.specs))
        needed: Sequence[int] = self._referenced(manifest)
        if fields is not None:
            needed = self._needed_by(fields, manifest, needed)
        is_needed = set(needed)
        storages = sorted({manifest.specs[index].storage for index in needed if index < len(manifest.specs)})
        memory = StoredMemory(manifest, storages, require_isolation=self._require_isolation)
        live = iter(self._rebuild(manifest, needed, memory, target))
        specs = (*manifest.specs, *self._outer.specs)
        tensors = [next(live) if index in is_needed else _placeholder(specs[index], fields) for index in everything]
        pipeline = self._join(manifest, tensors)
        if fields is not None:
            _partial.keep_only(pipeline, fields)
        shared = {index: tensors[index] for index in needed if index < len(manifest.specs)}
        loaded = Loaded(pipeline, reference, shared, tuple(memory.mappings()))
        for observer in _load_observers:
            observer(self, loaded)
        return pipeline

    def _get_manifest(self) -> tuple[ray.ObjectRef[Any], Manifest]:
        reference = self._usable()
        self._versions.require_agreement()
        return reference, _store.get(reference)

    def _usable(self) -> ray.ObjectRef[Any]:
        """The reference to the manifest, if it still means something.

        Raises:
            PublicationClosedError: the publication was closed.
            PublicationLostError: the connection to the cluster that it belongs to has ended.
        """
        if self._manifest is None:
            raise PublicationClosedError(
                f"This publication of {self.kind} was closed.", hint="load before close(), or publish again."
            )
        if self._session is None or self._session is not _store.session():
            raise PublicationLostError(
                f"This publication of {self.kind} belongs to a connection to Ray that has ended.",
                hint="publish the pipeline again.",
            )
        return self._manifest

    def _referenced(self, manifest: Manifest) -> list[int]:
        """Indices of the tensors that a whole load needs: an entangled pipeline, or one passed on, may use some only."""
        skeletons = [self._outer.skeleton]
        if any(isinstance(external, Root) for external in self._outer.skeleton.externals):
            skeletons.append(manifest.skeleton)
        return sorted({external for skeleton in skeletons for external in skeleton.externals if type(external) is int})

    def _needed_by(self, fields: Sequence[str], manifest: Manifest, referenced: Sequence[int]) -> list[int]:
        """Indices of the tensors below `fields`, found on a pipeline of stand-ins that takes no memory."""
        stand_ins = [stand_in(spec) for spec in (*manifest.specs, *self._outer.specs)]
        blank = self._join(manifest, stand_ins)
        return sorted(reach(_partial.values_of(blank, fields), stand_ins) & set(referenced))

    def _rebuild(
        self, manifest: Manifest, needed: Sequence[int], memory: StoredMemory, target: torch.device
    ) -> list[Any]:
        shared = len(manifest.locations)
        private = [bytearray(content) for content in self._outer.storages]
        devices: dict[int, torch.device] = {}

        def device_of(storage: int) -> torch.device:
            if storage not in devices:
                devices[storage] = _one_device(manifest.devices.get(storage, ()), target)
            return devices[storage]

        def region_of(storage: int) -> Region:
            if storage >= shared:
                content = private[storage - shared]
                return Region(content, 0, len(content))
            return memory.region(storage, writable=device_of(storage).type == "cpu")

        specs = (*manifest.specs, *self._outer.specs)
        return rebuild([specs[index] for index in needed], region_of, device_of)

    def _join(self, manifest: Manifest, tensors: Sequence[Any]) -> Any:
        outer = self._outer.skeleton
        roots: Sequence[Any] = ()
        if any(isinstance(external, Root) for external in outer.externals):
            roots = graft_skeleton(manifest.skeleton, tensors, ())
        return graft_skeleton(outer, tensors, roots)[0]

    def close(self) -> None:
        """Let go of the weights. Loaded pipelines keep what they use; closing twice is fine."""
        manifest, self._manifest = self._manifest, None
        close, self._close = self._close, None
        self._lease = None
        if manifest is not None and close is not None:
            close(manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __copy__(self) -> Publication:
        """Another handle to the same weights, to be closed by itself."""
        make, arguments = self.__reduce__()
        twin: Publication = make(*arguments)
        twin.cls, twin._lease, twin._close = self.cls, self._lease, self._close
        return twin

    def __deepcopy__(self, memo: object) -> Publication:
        return self.__copy__()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.shared_bytes:,} bytes"
        return f"<zerocopy.Publication of {self.kind}: {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Publication, (
            self._usable(), self._outer, self.kind, self.shared_bytes, self._require_isolation, self._versions,
        )  # fmt: skip


add_passenger(Publication)


def graft_skeleton(skeleton: Skeleton, tensors: Sequence[Any], roots: Sequence[Any]) -> list[Any]:
    """Rebuild the objects of a skeleton around live tensors and roots."""
    externals = [_external(external, tensors, roots) for external in skeleton.externals]
    return graft(skeleton.payload, externals, skeleton.count)


def _external(external: Any, tensors: Sequence[Any], roots: Sequence[Any]) -> Any:
    if type(external) is int:
        return tensors[external]
    return roots[external.position] if isinstance(external, Root) else external


def _placeholder(spec: TensorSpec, fields: Sequence[str] | None) -> Any:
    return None if fields is None else stand_in(spec)


def _one_device(declared: Sequence[str | None], target: torch.device) -> torch.device:
    """The device of a storage whose fields declare `declared`, None for those that follow the load."""
    devices = {target if name is None else _devices.resolve(name) for name in declared} or {target}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise DeviceError(
            f"Fields that share memory would be loaded on {names}.", hint="give tied fields one device, or load on it."
        )
    return devices.pop()
