"""How is a task called if workers already have the weights loaded? Without a reference to the weights.

Ray counts every reference in an argument, in the caller and in the worker. This takes longer than everything else in a call. The
process that waits for the result holds the weights in the meantime, and a worker that has loaded them needs no reference. So such
a call has one argument: bytes, in which publications have names. If a worker does not have the weights, or no longer has them, it
reports this before the function runs, and the call is made again in full.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from zerocopy._load.publication import Publication

SECONDS = 2.0  # how long after a call a worker is trusted to have the weights; it keeps them for longer
MOST_BYTES = 4096  # of a string: larger strings are better sent as separate arguments
MOST_TRUSTED = 256  # publications

# Stands for a publication: the id of its manifest, whether it requires isolation, and its other parts, packed.
Name: TypeAlias = tuple[bytes, bool, bytes]

_SCALARS = (int, float, complex, bool, type(None))
_STRINGS = (str, bytes)


def is_brief(value: object) -> bool:
    """Whether a value is small, and every pickler gives the same result for it."""
    return type(value) in _SCALARS or (type(value) in _STRINGS and len(value) <= MOST_BYTES)  # type: ignore[arg-type]


def pack_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    """A call as bytes, if its arguments are only brief values and publications that workers have loaded recently; else None."""
    publications = [value for value in (*args, *kwargs.values()) if not is_brief(value)]
    if not publications or not all(isinstance(value, Publication) and _is_trusted(value) for value in publications):
        return None
    names = {id(publication): _name_of(publication) for publication in publications}
    if None in names.values():
        return None
    values = [names.get(id(value), value) for value in args]
    return pickle.dumps((values, {key: names.get(id(value), value) for key, value in kwargs.items()}))


def unpack_call(call: bytes) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that `pack_call` packed, with names instead of publications."""
    args, kwargs = pickle.loads(call)
    return args, kwargs


def is_name(value: object) -> bool:
    """Whether an argument of a short call stands for a publication. No brief value is a tuple."""
    return type(value) is tuple


def _name_of(publication: Publication) -> Name | None:
    packed = publication.packed()
    return None if packed is None else (publication.reference.binary(), publication.requires_isolation, packed)


class Reply(NamedTuple):
    """A worker's reply to a short call: whether it knows the publications, and if it does, the result."""

    is_known: bool
    result: Any = None


UNKNOWN = pickle.dumps(tuple(Reply(is_known=False)))


def pack_reply(result: Any) -> Any:
    """The reply as it is sent: bytes, or the result itself if it is better that Ray pickles it."""
    return pickle.dumps((True, result)) if type(result) is bytes or is_brief(result) else result


def unpack_reply(reply: Any) -> Reply:
    """The inverse of `pack_reply`, and of `UNKNOWN`."""
    return Reply(*pickle.loads(reply)) if type(reply) is bytes else Reply(True, reply)


class Trust(NamedTuple):
    """The period in which workers are trusted to have a publication loaded, so that a short call is tried."""

    not_before: float = 0.0
    until: float = 0.0

    def holds_at(self, now: float) -> bool:
        """Whether a call at this time may be short."""
        return self.not_before <= now <= self.until

    def confirmed(self, now: float) -> Trust:
        """The trust after a worker had the publication, or has loaded it."""
        return Trust(self.not_before, now + SECONDS)

    def withdrawn(self, now: float) -> Trust:
        """The trust after a worker did not have it: other workers may not have it either, and each attempt costs a call."""
        return Trust(not_before=now + SECONDS)


_trust: dict[bytes, Trust] = {}  # by manifest, in the order of the last reply


def _is_trusted(publication: Publication) -> bool:
    return _trust.get(publication.reference.binary(), Trust()).holds_at(time.monotonic())


def note_reply(args: Iterable[Any], *, is_known: bool) -> None:
    """Record a reply to a call with these arguments. `is_known`: the worker had the publications, or has them now."""
    now = time.monotonic()
    for value in args:
        if isinstance(value, Publication) and not value.closed:
            manifest = value.reference.binary()
            trust = _trust.pop(manifest, Trust())
            _trust[manifest] = trust.confirmed(now) if is_known else trust.withdrawn(now)
    while len(_trust) > MOST_TRUSTED:
        del _trust[next(iter(_trust))]
