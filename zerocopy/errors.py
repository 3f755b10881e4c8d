"""Which errors and warnings does zerocopy have? Each text names the cause and the problem, and, if possible, a solution."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias


class ZeroCopyError(Exception):
    """Base of every error raised by zerocopy.

    If there is a solution, the text ends with a hint. Keyword arguments become attributes that name the cause. Instances can be
    pickled.
    """

    def __init__(self, message: str, *, hint: str | None = None, **culprits: Any) -> None:
        super().__init__(f"{message} Hint: {hint}" if hint else message)
        self.__dict__.update(culprits)


class DeclarationError(ZeroCopyError, TypeError):
    """A decorator, a field or a policy was used incorrectly."""


class ArgumentError(ZeroCopyError, TypeError):
    """A call was given arguments that it cannot use."""


class ModeError(ZeroCopyError, ValueError):
    """A wrapper was asked for a mode that does not exist. Attribute: `mode`."""

    mode: object


class NotExposedError(ZeroCopyError, AttributeError):
    """The object does not have this attribute, but its actors or its loaded pipeline do. Attribute: `attribute`.

    Pools, publications, and models whose calls run as tasks raise it.
    """

    attribute: str


class MissingPackageError(ZeroCopyError, ImportError):
    """A feature needs a package that is not installed. Attribute: `package`."""

    package: str


class CheckpointError(ZeroCopyError, ValueError):
    """Files of weights cannot be read, or do not fit the pipeline.

    Attributes, if they do not fit: `missing`, `unexpected`, `misshapen` (lists of names).
    """

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


class CannotTravelError(ZeroCopyError, TypeError):
    """An object inside a pipeline cannot leave its process.

    Attributes: `path` (its place, such as `search.encoder.layers[3].weight`), `kind` (its type).
    """

    path: str
    kind: str


class StoreTooSmallError(ZeroCopyError, MemoryError):
    """The weights are larger than the node's object store. Attributes: `needed`, `capacity` (bytes)."""

    needed: int
    capacity: int


class StoreFullError(ZeroCopyError, MemoryError):
    """Neither the node's object store nor the disk behind it has room for the weights. No part of them stays."""


class OutOfMemoryError(ZeroCopyError, MemoryError):
    """A pipeline needs more private memory than the node has free. Attributes: `needed`, `free` (bytes)."""

    needed: int
    free: int


class PublicationClosedError(ZeroCopyError, ValueError):
    """A publication was used after `close()`."""


LostReason: TypeAlias = Literal[
    "owner ended",
    "node lost",
    "references dropped",
    "not found in time",
    "connection ended",
    "other cluster",
    "no source",
]


class PublicationLostError(ZeroCopyError, RuntimeError):
    """The weights of a publication cannot be reached any more.

    Attributes:
        reason: why the weights are lost.

            - `"owner ended"`: the process that published the weights ended.
            - `"node lost"`: the node of that process, or the last node that held the weights, is down.
            - `"references dropped"`: all references that Ray counted were closed or dropped.
            - `"not found in time"`: Ray found no copy of the weights within its time limit.
            - `"connection ended"`: the weights belong to an earlier connection of this process.
            - `"other cluster"`: the weights belong to another cluster.
            - `"no source"`: the weights have a name, but no source, or their source gives other weights.
    """

    reason: LostReason


class NotPublishedError(ZeroCopyError, LookupError):
    """There is no publication with this name, or the name has no such version or alias.

    Attributes: `name`, `versions` (the numbers of the existing versions).
    """

    name: str
    versions: list[int]


class VersionConflictError(ZeroCopyError, RuntimeError):
    """Another process has published in the meantime.

    Attributes: `name`, `expected`, `found` (numbers of versions, 0 for none).
    """

    name: str
    expected: int
    found: int


class VersionInUseError(ZeroCopyError, ValueError):
    """A version cannot be removed because aliases point at it. Attributes: `name`, `aliases`."""

    name: str
    aliases: list[str]


class PrefetchError(ZeroCopyError, RuntimeError):
    """Some nodes could not fetch the weights. The other nodes keep them.

    Attributes: `copies` (what each node has), `failed` (the reason for each failed node, by node id).
    """

    copies: Any
    failed: dict[str, str]


class CorruptedError(ZeroCopyError, RuntimeError):
    """Bytes in the store differ from the published bytes. Attribute: `storages` (the numbers of the storages)."""

    storages: list[int]


class DeviceError(ZeroCopyError, ValueError):
    """A device does not exist, or tensors that share memory were given different devices."""


class VersionError(ZeroCopyError, RuntimeError):
    """A publication was written by versions of zerocopy, torch or Python that do not match those of this process."""


class RayClientError(ZeroCopyError, RuntimeError):
    """The process is connected through Ray Client (`ray://`), which has no object store on the client side."""


class OutOfBandError(ZeroCopyError, RuntimeError):
    """A pipeline or publication was captured outside of arguments, where this is not allowed.

    Either Ray is configured to refuse such references, or the weights would be lost when the task ends.
    """


class IsolationError(ZeroCopyError, RuntimeError):
    """Private mappings are required, but are not possible here."""


class CheckpointWarning(UserWarning):
    """Files of weights differ from the model in names or dtypes, and `publish_checkpoint` resolved the difference."""


class CopyWarning(UserWarning):
    """An argument contains a model that was pickled: each worker has a copy of it."""


class FollowWarning(UserWarning):
    """A process, or an object in it, cannot follow a name: it keeps an older version."""


class IsolationWarning(UserWarning):
    """Memory of the store could not be mapped privately: writes to a loaded pipeline reach every worker."""
