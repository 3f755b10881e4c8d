"""What does a publication consist of: the records that a publisher writes and a loader reads."""

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

FORMAT = 4  # of manifests and handles; raised when either changes

NOWHERE, BESIDE = (
    -1,
    0,
)  # stand for the number of a shard where there are no bytes, or where they lie beside the manifest


class Location(NamedTuple):
    """Where a manifest says that the bytes of a storage are: from `offset` on in a buffer of a shard."""

    shard: int
    buffer: int
    offset: int
    nbytes: int


class Placement(NamedTuple):
    """Where a storage is in the store. Valid as long as `shard` is referenced."""

    shard: ray.ObjectRef[Any]
    buffer: int
    offset: int


class Root(NamedTuple):
    """An external of the outer skeleton that is the object number `position` of the shared skeleton."""

    position: int


@attrs.frozen
class Skeleton:
    """Pickled bytes, and what they refer to by number: an int is a tensor's index, the rest travels as it is."""

    payload: bytes
    externals: tuple[Any, ...]
    count: int = 1


@attrs.frozen
class Outer:
    """The outer skeleton, and the tensors that it does not share: each load copies their bytes anew.

    The skeleton is of the pipeline, and of a list of its modules to be put into eval mode, if there are any.

    Indices from the number of shared tensors on are those of `specs`; storages from the number of shared storages on are
    those of `storages`.
    """

    skeleton: Skeleton
    specs: tuple[TensorSpec, ...]
    storages: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return len(self.skeleton.payload) + sum(map(len, self.storages))

    def has_roots(self) -> bool:
        """Whether it refers to objects of the shared skeleton, not to tensors alone."""
        return any(isinstance(external, Root) for external in self.skeleton.externals)


Description: TypeAlias = tuple[Sequence[tuple[Any, ...]], Mapping[int, tuple[str | None, ...]], Skeleton, bool]


class Manifest:
    """What a publication keeps in the store: descriptions of all shared tensors, the shared skeleton, and where bytes are.

    Attributes:
        spec_rows: one row per tensor, as `rows_of` makes it.
        location_rows: one `Location` per storage, as a plain tuple.
        outer: the outer skeleton as it was published, where handles do not carry it: under a name.
        digests: of the bytes of each storage, where they are known: under a name.
        reference: refers to the store object that held this manifest. Set in the process that read it.
        beside: the other buffers of that object. Set there, too.
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
        """A manifest whose bytes may move: the registry knows where they are, and nothing of the rest."""
        spec_rows, devices, skeleton, is_reusable = description
        manifest = cls(spec_rows, location_rows, devices, skeleton, shards, is_reusable)
        manifest.outer, manifest.digests = outer, digests
        return manifest

    def outer_of(self, outer: Outer | None) -> Outer:
        """The outer skeleton of a handle, given the one that it carries.

        Raises:
            RuntimeError: it carries none, and there is none here.
        """
        found = outer if outer is not None else self.outer
        if found is None:
            raise RuntimeError("this manifest belongs to handles that carry their outer skeleton")
        return found

    def description(self) -> Description:
        """All but where bytes are."""
        return self.spec_rows, self.devices, self.skeleton, self.is_reusable

    def shard(self, number: int) -> ray.ObjectRef[Any]:
        """The shard that locations call by this number."""
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
    """Base of what refers to the store. It travels beside a skeleton instead of inside it, so that Ray counts the references."""


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
        return cls(FORMAT, version("zerocopy-ray"), str(torch.__version__), platform.python_version())

    def essence(self) -> tuple[str, str, int]:
        """What readers must agree in."""
        return _minor(self.python), _minor(self.torch), self.format

    def check_agreement(self) -> None:
        """Refuse a publication that this process would misread.

        The format must be the same; of Python and torch the first two numbers: code is pickled by value between equal
        Pythons only, and the insides of modules change between minor releases of torch.

        Raises:
            VersionError: they differ.
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
