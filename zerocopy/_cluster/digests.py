"""When are two storages, or two versions, the same? When their digests are equal.

The digests are not cryptographic. Different storages do not get equal digests by chance, but a person who may write to the
cluster can create such storages.

Pickles of equal objects can differ between processes, in three ways: a set is written in the order of its hashes, which are
random in each process; a string that occurs twice is written twice if it is two objects; and a class that is pickled by value has
a random id. Two versions are the same if their pickles differ in nothing else.
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
    """Return the digest of a version: of its tensors, its structure and its copied parts.

    Args:
        storages: digest and number of bytes of each storage.
        agreement: other values that must be equal, such as the version of torch.
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
    """Convert pickles to tokens, which are equal for pickles that differ only in the three ways named above."""
    file = io.BytesIO(payload)
    memo = _Memo()  # all pickles of a payload share one memo
    while file.tell() < len(payload):
        yield from _canonical_of_one(file, memo)


class _Memo(list[_Token]):
    """The memo of a pickle. Atoms get no number, because one pickle refers to an atom where another one writes it again."""

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
    """Return a value whose `repr` shows all bits of a number, also of a very long one."""
    if isinstance(value, float):
        return struct.pack("d", value)
    return hex(value) if type(value) is int else value


def _close_tuple(tokens: list[_Token], count: int, name: str) -> None:
    """Turn a tuple of atoms into one atom."""
    parts = tokens[-count:]
    if len(parts) == count and all(part[0] == "atom" for part in parts):
        tokens[-count:] = [("atom", tuple(parts))]
    else:
        tokens.append((name,))


def _close_set(tokens: list[_Token], mark: int, name: str) -> None:
    """Sort the atoms of a set, because their order has no meaning. Pickle writes a large set in several parts."""
    items = tokens[mark + 1 :]
    if not all(item[0] == "atom" for item in items):
        tokens.append((name,))
        return
    del tokens[mark:]
    if name == "ADDITEMS" and tokens and tokens[-1][0] == "items":
        items += tokens.pop()[1]
    tokens.append(("items" if name == "ADDITEMS" else "atom", sorted(items, key=repr)))
