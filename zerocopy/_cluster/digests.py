"""When are two storages, or two versions, the same? When their digests are.

Digests are not cryptographic: nobody meets two storages of equal digests by chance, but somebody who may write to the cluster can
make them.

Pickles of equal objects may differ between processes: a set is written in the order of its hashes, which each process draws anew;
a string that is met again is written again if it is another object; a class that travels by value has a random id. A version is
the same if nothing but these differ.
"""

from __future__ import annotations

import io
import itertools
import pickletools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import ray.cloudpickle
import xxhash

from zerocopy._compat.ray import is_id_of_class
from zerocopy._store.manifest import Manifest, Outer, Root

_Token: TypeAlias = tuple[Any, ...]  # "atom" and a value, "items" and the atoms of a set, or an opcode and its argument

_ATOMS = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SETS = {"ADDITEMS", "FROZENSET"}
_GETS = {"BINGET", "LONG_BINGET"}
_CLOSE_A_MARK = {"TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "POP_MARK", "OBJ", "INST"}
_IGNORED = {"PROTO", "FRAME"}


def digest_of_version(
    manifest: Manifest, storages: Sequence[tuple[bytes, int]], outer: Outer, agreement: tuple[object, ...]
) -> bytes:
    """The digest of all that a version has: tensors, structure, and what is copied.

    Args:
        storages: digest and bytes of each storage.
        agreement: what else its readers must agree with.
    """
    sizes = list(map(len, outer.storages))
    described = manifest.spec_rows, manifest.devices, manifest.is_reusable, storages, outer.specs, sizes, agreement
    digest = xxhash.xxh3_128(repr(described).encode())
    for content in outer.storages:
        digest.update(content)
    for skeleton in (manifest.skeleton, outer.skeleton):
        said = list(map(_told, skeleton.externals)), list(canonical(skeleton.payload))
        digest.update(repr(said).encode())
    return digest.digest()


def _told(external: Any) -> object:
    return external if isinstance(external, (int, Root, type(None))) else ray.cloudpickle.dumps(external)


def canonical(payload: bytes) -> Iterator[_Token]:
    """What pickles say, in a form that is equal for those that differ in nothing but what is named above."""
    file = io.BytesIO(payload)
    memo = _Memo()  # those of a payload have one
    while file.tell() < len(payload):
        yield from _canonical_of_one(file, memo)


class _Memo(list[_Token]):
    """What a pickle refers to again. Atoms stand for themselves, and so are not counted: one pickle refers, another repeats."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()

    def remember(self, token: _Token) -> None:
        self.append(token if token[0] == "atom" else ("get", next(self._numbers)))


def _canonical_of_one(file: io.BytesIO, memo: _Memo) -> list[_Token]:
    tokens: list[_Token] = []
    marks: list[int] = []
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _ATOMS:
            tokens.append(("atom", None if is_id_of_class(argument) else (name, _exact(argument))))
        elif name == "MEMOIZE":
            memo.remember(tokens[-1])
        elif name in _GETS:
            tokens.append(memo[argument])
        elif name in _TUPLES:
            _close_tuple(tokens, _TUPLES[name], name)
        elif name in _SETS:
            _close_set(tokens, marks.pop(), name)
        elif name not in _IGNORED:
            if name == "MARK":
                marks.append(len(tokens))
            elif name in _CLOSE_A_MARK:
                marks.pop()
            tokens.append((name, argument))
    return tokens


def _exact(value: Any) -> object:
    """A value as text tells it: of numbers all bits, of long ones too."""
    if isinstance(value, float):
        return struct.pack("d", value)
    return hex(value) if type(value) is int else value


def _close_tuple(tokens: list[_Token], count: int, name: str) -> None:
    """A tuple of atoms is an atom."""
    parts = tokens[-count:]
    if len(parts) == count and all(part[0] == "atom" for part in parts):
        tokens[-count:] = [("atom", tuple(parts))]
    else:
        tokens.append((name,))


def _close_set(tokens: list[_Token], mark: int, name: str) -> None:
    """Atoms in a set have no order. Pickle writes a large set in several parts."""
    items = tokens[mark + 1 :]
    if not all(item[0] == "atom" for item in items):
        tokens.append((name,))
        return
    del tokens[mark:]
    if name == "ADDITEMS" and tokens and tokens[-1][0] == "items":
        items += tokens.pop()[1]
    tokens.append(("items" if name == "ADDITEMS" else "atom", sorted(items, key=repr)))
