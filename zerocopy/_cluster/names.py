"""What does the registry know about a name: which versions exist, where do aliases point, and which versions stay?

This file and the other files of the registry are pickled by value for its process. They do not import torch, and calls pass only
builtin types and types of Ray. So the registry starts without torch, and drivers of several releases can call it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LATEST = "latest"
KEEP = 2


class Refused(Exception):
    """The registry's answer instead of a result: a word for the reason, and values for the error message."""

    def __init__(self, why: str, **told: Any) -> None:
        super().__init__(why, told)
        self.why = why
        self.told = told


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of a name. Its content never changes.

    Attributes:
        digest: digest of its content. Equal content has equal digests.
        request: id of the commit that created it. If the same commit comes again, it creates no other version.
        storages: digest and number of bytes of each storage, in the order of the manifest.
        description: the manifest without the locations of bytes, pickled.
        outer: the outer skeleton, pickled.
        told: values that tables and handles show.
        source: a call that creates the weights again, pickled; or None.
        runtime_env: the runtime environment of that call.
    """

    number: int
    digest: bytes
    request: str
    storages: list[tuple[bytes, int]]
    description: bytes
    outer: bytes
    told: dict[str, Any]
    source: bytes | None
    runtime_env: dict[str, Any]


@dataclasses.dataclass
class Name:
    """The versions of one name by number, and its aliases.

    Attributes:
        next_number: number of the next version. Numbers of removed versions are not used again.
        keep: how many versions stay, in addition to those that an alias points at.
        job: id of the job. When the job ends, the name is removed. None if the name stays.
    """

    next_number: int = 1
    keep: int = KEEP
    job: str | None = None
    versions: dict[int, Version] = dataclasses.field(default_factory=dict)
    aliases: dict[str, int] = dataclasses.field(default_factory=dict)

    def find(self, which: int | str) -> Version:
        """Return the version with a number, or the version that an alias points at.

        Raises:
            Refused: the version does not exist.
        """
        number = self.aliases.get(which) if isinstance(which, str) else which
        if number is None or number not in self.versions:
            raise Refused("unknown version", which=which, versions=sorted(self.versions), aliases=dict(self.aliases))
        return self.versions[number]

    def check_expected(self, expect: int | None) -> None:
        """Refuse a commit that expects another version as "latest". With `expect` = 0, it expects that there is none.

        Raises:
            Refused: "latest" points at another version than `expect`.
        """
        found = self.aliases.get(LATEST, 0)
        if expect is not None and expect != found:
            raise Refused("other version", expected=expect, found=found)

    def made_by(self, request: str) -> Version | None:
        """Return the version that this request has created before, or None."""
        return next((version for version in self.versions.values() if version.request == request), None)

    def with_content(self, digest: bytes) -> Version | None:
        """Return the version with this content, or None."""
        return next((version for version in self.versions.values() if version.digest == digest), None)

    def superseded(self) -> list[int]:
        """Return the numbers of the versions that do not stay."""
        pointed_at = set(self.aliases.values())
        others = sorted(self.versions.keys() - pointed_at, reverse=True)
        return others[self.keep :]

    def changed(self, **changes: Any) -> Name:
        """Return a copy with other versions and aliases. Of the versions without an alias, only the `keep` newest stay."""
        name = dataclasses.replace(self, **changes)
        name.versions = dict(name.versions)
        name.aliases = dict(name.aliases)
        for number in name.superseded():
            del name.versions[number]
        return name
