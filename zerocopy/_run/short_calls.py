"""How is a task called where the weights are known to be loaded: without a reference to them.

Ray counts every reference that an argument holds, at both ends, which takes longer than all else of a call. The process that
waits for the result holds the weights meanwhile, and a worker that has them loaded needs no reference. So such a call is one
argument of bytes: what is given, and which publications. A worker that has not, or not any more, says so before the function
runs, and the call is made again in full.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from zerocopy._load.publication import Publication

SECONDS = 2.0  # after the last call a worker is trusted to have the weights still: less than it keeps them
MOST_BYTES = 4096  # of a string: larger ones are better off as arguments of their own
MOST_KNOWN = 256
UNKNOWN = b""  # a worker's answer if it has not the weights

# Stands for a publication: the id of its manifest, whether it requires isolation, and what else it is made of.
Name: TypeAlias = tuple[bytes, bool, bytes]

_SCALARS = (int, float, complex, bool, type(None))
_STRINGS = (str, bytes)


def is_brief(value: object) -> bool:
    """Whether a value is small, and means the same however it is pickled."""
    return type(value) in _SCALARS or (type(value) in _STRINGS and len(value) <= MOST_BYTES)  # type: ignore[arg-type]


def shortened(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    """A call as bytes, if there is nothing in it but brief values and publications that workers have loaded of late."""
    given: dict[int | str, Any] = dict(enumerate(args)) | dict(kwargs)
    publications = {place: value for place, value in given.items() if isinstance(value, Publication)}
    if not publications or not all(map(is_brief, (given[place] for place in given if place not in publications))):
        return None
    if not all(map(_are_loaded, publications.values())):
        return None
    names = {place: _named(publication) for place, publication in publications.items()}
    if None in names.values():
        return None
    values = [None if place in names else value for place, value in enumerate(args)]
    return pickle.dumps((values, {name: value for name, value in kwargs.items() if name not in names}, names))


def parts_of(call: bytes) -> tuple[list[Any], dict[str, Any], dict[int | str, Name]]:
    """The inverse of `shortened`: arguments, with places for the publications, and those by number or name."""
    parts: tuple[list[Any], dict[str, Any], dict[int | str, Name]] = pickle.loads(call)
    return parts


def is_unknown(answer: Any) -> bool:
    """Whether a worker answered that it has not got the weights."""
    return type(answer) is bytes and answer == UNKNOWN


def answer_of(result: Any) -> Any:
    """A result as it travels back from a short call."""
    return pickle.dumps(result) if type(result) is bytes or is_brief(result) else result


def result_of(answer: Any) -> Any:
    """The inverse of `answer_of`."""
    return pickle.loads(answer) if type(answer) is bytes else answer


def _named(publication: Publication) -> Name | None:
    packed = publication.packed()
    return None if packed is None else (publication.reference.binary(), publication.requires_isolation, packed)


# From when until when short calls are worth a try, by manifest.
_times: dict[bytes, tuple[float, float]] = {}


def _are_loaded(publication: Publication) -> bool:
    first, last = _times.get(publication.reference.binary(), (0.0, 0.0))
    return first <= time.monotonic() <= last


def note_answer(values: Iterable[Any], *, is_known: bool) -> None:
    """Note that a call with these arguments was answered; `is_known` if the worker had what it needed, or has it now."""
    now = time.monotonic()
    for publication in values:
        if isinstance(publication, Publication) and not publication.closed:
            manifest = publication.reference.binary()
            first, _ = _times.pop(manifest, (0.0, 0.0))
            _times[manifest] = (first, now + SECONDS) if is_known else (now + SECONDS, 0.0)
    while len(_times) > MOST_KNOWN:
        del _times[next(iter(_times))]
