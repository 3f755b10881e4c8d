"""Which publications have names in this cluster? The answer is a sequence of records, which prints as a table."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import ray.exceptions

from zerocopy._cluster import client
from zerocopy._cluster.handles import Version
from zerocopy._seeing.ledger import About, Told
from zerocopy._store.read import manifest_in
from zerocopy._tables import as_html, as_text, format_bytes
from zerocopy.errors import ArgumentError, ZeroCopyError


@attrs.frozen
class Published:
    """One version of a name.

    Attributes:
        version: name, number and digest.
        aliases: the aliases that point at it.
        kind: name of the pipeline's class.
        shared_bytes: bytes of its weights. Versions share the bytes that they have in common.
        nodes: ids of the nodes whose stores have all its weights; empty while it is lost.
        age: seconds since it was published.
        source: whether it has a source, which rebuilds it if its weights are lost.
    """

    version: Version
    aliases: tuple[str, ...]
    kind: str
    shared_bytes: int
    nodes: tuple[str, ...]
    age: float
    source: bool


@attrs.frozen(repr=False)
class Publications:
    """All versions of all names, in order. Prints as a table, in a notebook as HTML.

    Attributes:
        versions: one entry per version.
    """

    versions: tuple[Published, ...]

    def __iter__(self) -> Iterator[Published]:
        return iter(self.versions)

    def __len__(self) -> int:
        return len(self.versions)

    def __getitem__(self, position: int) -> Published:
        if isinstance(position, str):
            raise ArgumentError(
                f"zerocopy.publications() has positions, not the key {position!r}.",
                hint=f"zerocopy.lookup({position!r}) gives the publication with a name.",
            )
        return self.versions[position]

    @property
    def names(self) -> list[str]:
        """All names, without repetition."""
        return list(dict.fromkeys(one.version.name for one in self.versions))

    def __str__(self) -> str:
        return as_text(_HEADERS, self._rows(), right=_NUMBERS) if self.versions else "No publication has a name."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(_HEADERS, self._rows(), right=_NUMBERS) if self.versions else f"<p>{self}</p>"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for one in self.versions:
            aliases, source = ", ".join(one.aliases), "yes" if one.source else "no"
            counts = (format_bytes(one.shared_bytes), str(len(one.nodes)), _format_age(one.age))
            yield (one.version.name, str(one.version.number), aliases, one.kind, *counts, source)


_HEADERS = ("name", "version", "aliases", "class", "bytes", "nodes", "age", "source")
_NUMBERS = ("version", "bytes", "nodes", "age")


def _format_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def publications() -> Publications:
    """List all publications that have a name in this cluster."""
    now = time.time()
    found: dict[str, dict[str, Any]] = client.ask("listed")
    return Publications(
        tuple(_published(told, entry["aliases"], now) for entry in found.values() for told in entry["versions"])
    )


def _published(told: dict[str, Any], aliases: dict[str, int], now: float) -> Published:
    return Published(
        Version(told["name"], told["number"], told["digest"].hex()),
        tuple(sorted(alias for alias, number in aliases.items() if number == told["number"])),
        told["kind"],
        told["shared_bytes"],
        tuple(told["nodes"]),
        max(0.0, now - told["created"]),
        told["has_source"],
    )


def told_versions(timeout: float) -> tuple[Mapping[str, list[Told]], list[str]]:
    """Return the versions on each node, by node id, for a memory report; and notes on missing versions.

    Args:
        timeout: seconds to wait for the registry. If it does not exist, it is not created.
    """
    registry = client.existing_registry()
    told: dict[str, list[Told]] = defaultdict(list)
    if registry is None:
        return told, []
    end = time.monotonic() + timeout
    try:
        listed = client.reply_within(registry, timeout, "listed")
        for one in [version for entry in listed.values() for version in entry["versions"]]:
            found = _told_version(registry, one["name"], one["number"], end) if one["nodes"] else []
            for node in one["nodes"]:
                told[node] += found
    except (client.RegistryLost, TimeoutError):
        return told, ["The registry of named publications did not answer: some that nobody has loaded may be missing."]
    return told, []


def _told_version(registry: Any, name: str, number: int, end: float) -> list[Told]:
    """Return the report of one version in a list; an empty list if the version was just removed or is lost."""
    try:
        told: Mapping[str, Any] = client.reply_within(registry, _left(end), "resolve", name, number)
    except ZeroCopyError:
        return []
    if told["reference"] is None:
        return []
    (reference,) = told["reference"]
    try:
        manifest = manifest_in(reference, reference.future().result(_left(end)))
    except ray.exceptions.ObjectLostError:
        return []
    about = About(name, number, told["kind"], told["shared_bytes"], manifest.outer_of(None).nbytes)
    return [Told(reference.binary(), about, manifest.used_bytes())]


def _left(end: float) -> float:
    """Return the seconds until `end`, at least 0."""
    return max(0.0, end - time.monotonic())
