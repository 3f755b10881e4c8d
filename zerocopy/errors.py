"""What can go wrong, in words: every error says who, what and the way out."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias


class ZeroCopyError(Exception):
    """Base of every error raised by zerocopy.

    The text ends with a hint where there is a way out. Keyword arguments become attributes that
    name the culprit. Instances pickle.
    """

    def __init__(self, message: str, *, hint: str | None = None, **culprits: Any) -> None:
        super().__init__(f"{message} Hint: {hint}" if hint else message)
        self.__dict__.update(culprits)


class DeclarationError(ZeroCopyError, TypeError):
    """A decorator, a field or a policy was used in a way that has no meaning."""


class ArgumentError(ZeroCopyError, TypeError):
    """A call was given arguments that it cannot use."""


class ModeError(ZeroCopyError, ValueError):
    """A wrapper was asked for a mode that does not exist. Attribute: `mode`."""

    mode: object


class NotExposedError(ZeroCopyError, AttributeError):
    """A pool, a publication or a model whose calls are tasks was asked for what only its actors or its loads have.

    Attribute: `attribute`.
    """

    attribute: str


class MissingPackageError(ZeroCopyError, ImportError):
    """Something needs a package that is not installed. Attribute: `package`."""

    package: str


class CheckpointError(ZeroCopyError, ValueError):
    """Files of weights cannot be read, or do not fit. Attributes, where they do not fit: lists of names."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


class CannotTravelError(ZeroCopyError, TypeError):
    """An object inside a pipeline cannot leave its process.

    Attributes: `path` (where it sits, such as `search.encoder.layers[3].weight`), `kind` (its type).
    """

    path: str
    kind: str


class StoreTooSmallError(ZeroCopyError, MemoryError):
    """The weights are larger than the node's object store. Attributes: `needed`, `capacity` (bytes)."""

    needed: int
    capacity: int


class StoreFullError(ZeroCopyError, MemoryError):
    """Neither the node's object store nor the disk behind it has room for the weights. Nothing of them stays."""


class OutOfMemoryError(ZeroCopyError, MemoryError):
    """A pipeline would take more private memory than the node has left. Attributes: `needed`, `free` (bytes)."""

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
        reason: what has happened.

            - `"owner ended"`: the process that published them ended.
            - `"node lost"`: the node of that process, or the last one that held them, is down.
            - `"references dropped"`: all that Ray had counted was closed or dropped.
            - `"not found in time"`: Ray found no copy of them within its time limit.
            - `"connection ended"`: they belong to an earlier connection of this process.
            - `"other cluster"`: they belong to another cluster.
            - `"no source"`: they have a name, but no source makes them again, or it makes other weights.
    """

    reason: LostReason


class NotPublishedError(ZeroCopyError, LookupError):
    """There is no publication with a name, or the name has no such version or alias.

    Attributes: `name`, `versions` (the numbers that there are).
    """

    name: str
    versions: list[int]


class VersionConflictError(ZeroCopyError, RuntimeError):
    """Somebody else has published meanwhile. Attributes: `name`, `expected`, `found` (numbers of versions, 0 for none)."""

    name: str
    expected: int
    found: int


class VersionInUseError(ZeroCopyError, ValueError):
    """A version cannot be removed, because aliases point at it. Attributes: `name`, `aliases`."""

    name: str
    aliases: list[str]


class PrefetchError(ZeroCopyError, RuntimeError):
    """Some nodes could not fetch weights. The others keep them.

    Attributes: `copies` (what each node has), `failed` (the reason, by the id of the node).
    """

    copies: Any
    failed: dict[str, str]


class CorruptedError(ZeroCopyError, RuntimeError):
    """Bytes in the store are not those that were published. Attribute: `storages` (their numbers)."""

    storages: list[int]


class DeviceError(ZeroCopyError, ValueError):
    """A device is not there, or tensors that share memory were sent to different devices."""


class VersionError(ZeroCopyError, RuntimeError):
    """A publication was written by versions of zerocopy, torch or Python that cannot agree with these."""


class RayClientError(ZeroCopyError, RuntimeError):
    """Ray Client (`ray://`) has no object store on this side."""


class OutOfBandError(ZeroCopyError, RuntimeError):
    """A pipeline or publication was captured where Ray was told to allow no references, or where they end with the task."""


class IsolationError(ZeroCopyError, RuntimeError):
    """Private mappings were required and are not possible here."""


class CheckpointWarning(UserWarning):
    """Files of weights differ from the model in names or dtypes, in a way that was settled without asking."""


class CopyWarning(UserWarning):
    """An argument brought a model by plain pickling: each worker has a copy of it."""


class FollowWarning(UserWarning):
    """A process cannot follow a name, or something in it does not follow: it keeps an older version."""


class IsolationWarning(UserWarning):
    """Store memory could not be mapped privately: writes to a loaded pipeline reach every worker."""
