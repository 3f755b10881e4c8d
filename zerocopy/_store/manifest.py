"""What does a publication consist of? Of these records, which a publisher writes and a loader reads."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, Self, TypeAlias

import attrs
import ray
import torch

from zerocopy._store.tensors import TensorSpec
from zerocopy.errors import VersionError

FORMAT = 4  # of manifests and handles. It is increased when one of them changes

NOWHERE, BESIDE = (
    -1,
    0,
)  # shard numbers of storages that have no bytes, or whose bytes are in the same object as the manifest


class Location(NamedTuple):
    """The location of a storage's bytes in a manifest: they start at `offset` in a buffer of a shard."""

    shard: int
    buffer: int
    offset: int
    nbytes: int


class Placement(NamedTuple):
    """The place of a storage in the store. It is valid as long as `shard` is referenced."""

    shard: ray.ObjectRef[Any]
    buffer: int
    offset: int


class Root(NamedTuple):
    """An external of the outer skeleton: the object with the number `position` of the shared skeleton."""

    position: int


@attrs.frozen
class Skeleton:
    """Pickled bytes, and the externals that they refer to by number. An int is a tensor's index, others are objects."""

    payload: bytes
    externals: tuple[Any, ...]
    count: int = 1


@attrs.frozen
class Outer:
    """The outer skeleton, and its tensors that are not shared. Each load copies their bytes.

    The skeleton contains the pipeline, and a list of the modules to put into eval mode, if there are any.

    Tensors have the indices of the shared tensors first, then those of `specs`. Storages have the indices of the shared storages
    first, then those of `storages`.
    """

    skeleton: Skeleton
    specs: tuple[TensorSpec, ...]
    storages: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return len(self.skeleton.payload) + sum(map(len, self.storages))

    def has_roots(self) -> bool:
        """Whether it refers to objects of the shared skeleton, and not only to tensors."""
        return any(isinstance(external, Root) for external in self.skeleton.externals)


Description: TypeAlias = tuple[Sequence[tuple[Any, ...]], Mapping[int, tuple[str | None, ...]], Skeleton, bool]


class Manifest:
    """The part of a publication in the store: descriptions of the shared tensors, the shared skeleton, and locations of bytes.

    Attributes:
        spec_rows: one row per tensor, as `rows_of` makes it.
        location_rows: one `Location` per storage, as a plain tuple.
        outer: the published outer skeleton of a publication with a name. Without a name, the handles carry it.
        digests: digest of the bytes of each storage of a publication with a name. Without a name, it is empty.
        reference: reference to the store object of this manifest. It is set in the process that reads the manifest.
        beside: the buffers of that object. They are set at the same time.
    """

    def __init__(
        self,
        spec_rows: Sequence[tuple[Any, ...]],
        location_rows: Sequence[tuple[int, int, int, int]],
        devices: Mapping[int, tuple[str | None, ...]],
        skeleton: Skeleton,
        shards: Sequence[ray.ObjectRef[Any]],
        is_reusable: bool,
    ) -> None:
        self.spec_rows = spec_rows
        self.location_rows = location_rows
        self.devices = devices
        self.skeleton = skeleton
        self.shards = shards
        self.is_reusable = is_reusable
        self.outer: Outer | None = None
        self.digests: Sequence[bytes] = ()
        self.reference: ray.ObjectRef[Any] | None = None
        self.beside: Sequence[Any] = ()

    @classmethod
    def assembled(
        cls,
        description: Description,
        location_rows: Sequence[tuple[int, int, int, int]],
        shards: Sequence[ray.ObjectRef[Any]],
        outer: Outer,
        digests: Sequence[bytes],
    ) -> Self:
        """Create a manifest whose bytes may move. The registry knows their locations, and does not read the other parts."""
        spec_rows, devices, skeleton, is_reusable = description
        manifest = cls(spec_rows, location_rows, devices, skeleton, shards, is_reusable)
        manifest.outer, manifest.digests = outer, digests
        return manifest

    def outer_of(self, outer: Outer | None) -> Outer:
        """Return the outer skeleton that a handle carries (`outer`), or else the one of this manifest.

        Raises:
            RuntimeError: neither of them has one.
        """
        found = outer if outer is not None else self.outer
        if found is None:
            raise RuntimeError("this manifest belongs to handles that carry their outer skeleton")
        return found

    def description(self) -> Description:
        """Return all parts of the manifest except the locations of bytes."""
        return self.spec_rows, self.devices, self.skeleton, self.is_reusable

    def shard(self, number: int) -> ray.ObjectRef[Any]:
        """Return the reference to the shard with this number in locations."""
        reference = self.reference if number == BESIDE else self.shards[number - 1]
        if reference is None:
            raise RuntimeError("this manifest was not read from the store")
        return reference

    def used_bytes(self) -> dict[bytes, int]:
        """Bytes of the storages in each shard, by the id of the shard."""
        used: dict[bytes, int] = {}
        for number, _, _, nbytes in self.location_rows:
            if number != NOWHERE:
                key = self.shard(number).binary()
                used[key] = used.get(key, 0) + nbytes
        return used

    @functools.cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(TensorSpec.of_row, self.spec_rows))

    @functools.cached_property
    def locations(self) -> tuple[Location, ...]:
        return tuple(map(Location._make, self.location_rows))

    def __reduce__(self) -> tuple[Any, ...]:
        rows = self.spec_rows, self.location_rows
        return Manifest, (*rows, self.devices, self.skeleton, self.shards, self.is_reusable)


class Handle:
    """Base class of handles to the store. A handle is pickled outside of skeletons, so that Ray counts its references."""


@attrs.frozen
class Versions:
    """The versions of the software that wrote a publication."""

    format: int
    zerocopy: str
    torch: str
    python: str

    @classmethod
    @functools.cache
    def here(cls) -> Versions:
        return cls(FORMAT, version("zerocopy-ray"), str(torch.__version__), platform.python_version())

    def essence(self) -> tuple[str, str, int]:
        """Return the versions that must be equal in a reader."""
        return _minor(self.python), _minor(self.torch), self.format

    def check_agreement(self) -> None:
        """Refuse a publication that this process would misread.

        The format must be equal, and the first two numbers of the versions of Python and torch. Code that is pickled by value
        needs an equal version of Python, and the attributes of modules change between minor releases of torch.

        Raises:
            VersionError: the versions differ.
        """
        here = Versions.here()
        names = "Python", "torch", "zerocopy's format"
        for name, theirs, ours in zip(names, self.essence(), here.essence(), strict=True):
            if theirs != ours:
                raise VersionError(
                    f"This publication was written with {name} {theirs}, but this process has {ours} "
                    f"(zerocopy {self.zerocopy} there, {here.zerocopy} here).",
                    hint="install the same versions on every node, or publish again with these.",
                )


def _minor(release: str) -> str:
    return ".".join(release.split(".")[:2])
