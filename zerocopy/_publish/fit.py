"""Which tensor of the files belongs to which name of the pipeline?

Names of the files are changed as the user says. Then, if all of them differ from the pipeline's by what they begin with, as
`bert.encoder` and `encoder` do, that is changed too.
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
Head: TypeAlias = tuple[str, str]  # what names of the files begin with, and what the pipeline's do instead

DEEPEST_HEAD = 3  # parts, as in `module.model.bert.`


@attrs.frozen
class Rules:
    """What the user says of names.

    Attributes:
        strict: whether what is missing and what is left over are errors.
        ignore: patterns of names that may be missing, or left over.
        rename: what names of the files are called in the pipeline: a function, which gives None for what is left out; or a
            mapping from names, or from beginnings of names that end with a dot. `""` begins every name.
    """

    strict: bool = True
    ignore: tuple[str, ...] = ()
    rename: Rename | None = None

    def ignores(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)

    def renamed(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """The tensors of the files under their new names, without those to ignore.

        Raises:
            CheckpointError: two have one new name.
            ArgumentError: the function gives something else than a name.
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
    """Refuse what cannot rename anything.

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
    """What does not fit: names of the pipeline, names of the files, and names with both shapes."""

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
        """What to raise for it. `kind` is the class of the pipeline."""
        changed = f" {told_of_head(head)}" if head else ""
        ways = ["rename= changes names", "ignore= takes patterns of names that may be left out"]
        if not self.misshapen:
            ways.append("strict=False accepts all of it, and leaves what is missing as it was built")
        return CheckpointError(
            f"The files do not fit this {kind}: {self.told()}.{changed}",
            hint="; ".join(ways) + ".",
            missing=self.missing,
            unexpected=self.unexpected,
            misshapen=self.misshapen,
        )


def told_of_head(head: Head) -> str:
    """One sentence on a head that was changed."""
    old, new = head
    if not old:
        return f"Names in the model begin with {new!r}, and names in the files do not: it was added to these."
    changed = f"replaced by {new!r}" if new else "left out"
    return f"Names in the files begin with {old!r}, and names in the model do not: it was {changed}."


def find_head(given: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> Head | None:
    """What to change at the beginning of the given names so that the most of them are wanted, with their shapes.

    None where nothing is gained by that, or two ways gain the same.
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        for head, end in _cut(name):
            ends[end].append(head + end)
    votes: Counter[Head] = Counter()
    for name, tensor in given.items():
        for old, end in _cut(name):
            same = (full for full in ends.get(end, ()) if shapes[full] == tensor.shape)
            # `a.b.x` for `a.c.x` is `b.x` for `c.x` too: the shortest heads count.
            votes.update((old, full[: len(full) - len(end)]) for full in same if not _share_start(old, full, end))
    fitting = votes.pop(("", ""), 0)
    most = votes.most_common(2)
    if not most or most[0][1] <= fitting or (len(most) > 1 and most[1][1] == most[0][1]):
        return None
    return most[0][0]


def _cut(name: str) -> Iterable[tuple[str, str]]:
    """Each way to cut a name into a head of a few parts and the rest."""
    parts = name.split(".")
    for count in range(min(DEEPEST_HEAD + 1, len(parts))):
        yield "".join(part + "." for part in parts[:count]), ".".join(parts[count:])


def _share_start(old: str, full: str, end: str) -> bool:
    """Whether both heads could be shorter at their ends."""
    new = full[: len(full) - len(end)]
    return bool(old and new) and old.split(".")[-2] == new.split(".")[-2]


def with_head(given: Mapping[str, T], head: Head, wanted: Mapping[str, object]) -> dict[str, T]:
    """The given tensors under changed names. A name stays that is wanted as it is, or whose new one is given as well."""
    old, new = head

    def changed(name: str) -> str:
        other = new + name.removeprefix(old)
        return name if name in wanted or not name.startswith(old) or other in given else other

    return {changed(name): tensor for name, tensor in given.items()}
