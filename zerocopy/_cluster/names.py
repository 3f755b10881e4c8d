"""What is known of one name: its versions, what aliases point at, and which versions stay?

This file and those of the registry travel to its process by value. They import nothing of torch, and what crosses the boundary
is made of builtins: so the registry starts without torch, and drivers of several releases can talk to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LATEST = "latest"
KEEP = 2


class Refused(Exception):
    """What the registry answers instead of a result: a word for what is wrong, and what the error will tell."""

    def __init__(self, why: str, **told: Any) -> None:
        super().__init__(why, told)
        self.why = why
        self.told = told


@dataclasses.dataclass(frozen=True)
class Version:
    """One version of a name. It never changes.

    Attributes:
        digest: of its content: equal for two that are equal.
        request: which commit made it. The same request that comes again makes no other version.
        storages: digest and bytes of each storage, in the order of the manifest.
        description: all of the manifest but where bytes are, pickled.
        outer: the outer skeleton, pickled.
        told: what tables and handles say of it.
        source: a call that makes the weights again, pickled. None if there is none.
        runtime_env: what that call runs in.
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
        next_number: of the next version. It counts up, also when versions were removed.
        keep: how many versions stay that no alias points at.
        job: the job that the name ends with; None if it stays.
    """

    next_number: int = 1
    keep: int = KEEP
    job: str | None = None
    versions: dict[int, Version] = dataclasses.field(default_factory=dict)
    aliases: dict[str, int] = dataclasses.field(default_factory=dict)

    def find(self, which: int | str) -> Version:
        """The version with a number, or that an alias points at.

        Raises:
            Refused: there is none.
        """
        number = self.aliases.get(which) if isinstance(which, str) else which
        if number is None or number not in self.versions:
            raise Refused("unknown version", which=which, versions=sorted(self.versions), aliases=dict(self.aliases))
        return self.versions[number]

    def check_expected(self, expect: int | None) -> None:
        """Refuse a commit that was made for another state. 0 expects that there is no version.

        Raises:
            Refused: "latest" points at another version than `expect`.
        """
        found = self.aliases.get(LATEST, 0)
        if expect is not None and expect != found:
            raise Refused("other version", expected=expect, found=found)

    def made_by(self, request: str) -> Version | None:
        """The version that a request has made before."""
        return next((version for version in self.versions.values() if version.request == request), None)

    def with_content(self, digest: bytes) -> Version | None:
        """The version with this content."""
        return next((version for version in self.versions.values() if version.digest == digest), None)

    def superseded(self) -> list[int]:
        """Numbers of the versions that do not stay."""
        pointed_at = set(self.aliases.values())
        others = sorted(self.versions.keys() - pointed_at, reverse=True)
        return others[self.keep :]

    def changed(self, **changes: Any) -> Name:
        """A copy with other versions and aliases. What no alias points at stays as long as `keep` says."""
        name = dataclasses.replace(self, **changes)
        name.versions = dict(name.versions)
        name.aliases = dict(name.aliases)
        for number in name.superseded():
            del name.versions[number]
        return name
