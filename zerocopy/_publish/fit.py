"""Which tensor of the files belongs to which name of the pipeline?

First, names in the files are changed as the user says. Then, if more names would fit with another prefix, as with `bert.encoder`
in the files and `encoder` in the pipeline, the prefix is changed too.
"""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar

import attrs
import torch

from zerocopy._words import counted
from zerocopy.errors import ArgumentError, CheckpointError

T = TypeVar("T")
Rename: TypeAlias = Mapping[str, str] | Callable[[str], str | None]
Head: TypeAlias = tuple[str, str]  # the prefix of names in the files, and the prefix in the pipeline instead

DEEPEST_HEAD = 3  # parts, as in `module.model.bert.`


@attrs.frozen
class Rules:
    """The user's rules for names.

    Attributes:
        strict: whether missing names and unexpected names are errors.
        ignore: patterns of names that may be missing or unexpected.
        rename: how to rename the tensors of the files: a function, which returns None to leave a tensor out; or a mapping from
            names, or from prefixes that end with a dot. Every name has the prefix `""`.
    """

    strict: bool = True
    ignore: tuple[str, ...] = ()
    rename: Rename | None = None

    def ignores(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)

    def renamed(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """The tensors of the files under their new names, without the ignored ones.

        Raises:
            CheckpointError: two tensors get the same new name.
            ArgumentError: the function returns something that is not a name.
        """
        found: dict[str, T] = {}
        for name, tensor in tensors.items():
            new = self._new_name(name)
            if new is None or self.ignores(name) or self.ignores(new):
                continue
            if new in found:
                raise CheckpointError(
                    f"rename= gives two tensors of the files the name {new!r}; one is {name!r}.",
                    hint="give each a name of its own, or None to leave one out.",
                )
            found[new] = tensor
        return found

    def _new_name(self, name: str) -> str | None:
        if self.rename is None:
            return name
        if not isinstance(self.rename, Mapping):
            new = self.rename(name)
            if new is not None and not isinstance(new, str):
                raise ArgumentError(
                    f"rename= gave {new!r} for {name!r}, which is not a name.",
                    hint="return a str, or None to leave it out.",
                )
            return new
        starts = (
            key for key in self.rename if key == name or ((not key or key.endswith(".")) and name.startswith(key))
        )
        longest = max(starts, key=len, default=None)
        return name if longest is None else self.rename[longest] + name[len(longest) :]


def check_rename(rename: object) -> None:
    """Refuse a `rename` that cannot be used.

    Raises:
        ArgumentError: it is neither a function nor a mapping from str to str.
    """
    if rename is None or (callable(rename) and not isinstance(rename, Mapping)):
        return
    if isinstance(rename, Mapping) and all(isinstance(name, str) for pair in rename.items() for name in pair):
        return
    raise ArgumentError(
        f"rename={rename!r} is neither a mapping from str to str nor a function.",
        hint="write rename={'bert.': ''}, say; a function takes a name and returns the new one, or None to leave it out.",
    )


@attrs.frozen
class Misfit:
    """What does not fit: names that the files lack, names that the pipeline lacks, and names with two different shapes."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def told(self) -> str:
        parts = [
            (self.missing, "missing from the files"),
            (self.unexpected, "unknown to the model"),
            (self.misshapen, "of another shape"),
        ]
        return "; ".join(f"{counted(names, 'name')} {what}" for names, what in parts if names)

    def error(self, kind: str, head: Head | None) -> CheckpointError:
        """The error to raise. `kind` is the class of the pipeline."""
        changed = f" {told_of_head(head)}" if head else ""
        ways = ["rename= changes names", "ignore= takes patterns of names that may be left out"]
        if not self.misshapen:
            ways.append("strict=False accepts these differences, and missing tensors keep their initial values")
        return CheckpointError(
            f"The files do not fit this {kind}: {self.told()}.{changed}",
            hint="; ".join(ways) + ".",
            missing=self.missing,
            unexpected=self.unexpected,
            misshapen=self.misshapen,
        )


def told_of_head(head: Head) -> str:
    """One sentence about a changed prefix."""
    old, new = head
    if not old:
        return f"Names in the model begin with {new!r}, and names in the files do not: it was added to these."
    changed = f"replaced by {new!r}" if new else "left out"
    return f"Names in the files begin with {old!r}, and names in the model do not: it was {changed}."


def find_head(given: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> Head | None:
    """The change of prefix that makes the most given names match wanted names with the same shapes.

    None if no change is an improvement, or if two changes are equally good.
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        for head, end in _cut(name):
            ends[end].append(head + end)
    votes: Counter[Head] = Counter()
    for name, tensor in given.items():
        for old, end in _cut(name):
            same = (full for full in ends.get(end, ()) if shapes[full] == tensor.shape)
            # Replacing `a.b.` with `c.b.` in `a.b.x` is the same as replacing `a.` with `c.`: only the shortest prefixes count.
            votes.update((old, full[: len(full) - len(end)]) for full in same if not _share_end(old, full, end))
    fitting = votes.pop(("", ""), 0)
    most = votes.most_common(2)
    if not most or most[0][1] <= fitting or (len(most) > 1 and most[1][1] == most[0][1]):
        return None
    return most[0][0]


def _cut(name: str) -> Iterable[tuple[str, str]]:
    """Each way to cut a name into a prefix of a few parts and the rest."""
    parts = name.split(".")
    for count in range(min(DEEPEST_HEAD + 1, len(parts))):
        yield "".join(part + "." for part in parts[:count]), ".".join(parts[count:])


def _share_end(old: str, full: str, end: str) -> bool:
    """Whether both prefixes end with the same part, so that both could be shorter."""
    new = full[: len(full) - len(end)]
    return bool(old and new) and old.split(".")[-2] == new.split(".")[-2]


def with_head(given: Mapping[str, T], head: Head, wanted: Mapping[str, object]) -> dict[str, T]:
    """The given tensors with changed names. A name stays if the pipeline wants it unchanged, or if its new name is also given."""
    old, new = head

    def changed(name: str) -> str:
        other = new + name.removeprefix(old)
        return name if name in wanted or not name.startswith(old) or other in given else other

    return {changed(name): tensor for name, tensor in given.items()}
