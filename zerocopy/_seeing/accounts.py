"""Which bytes belong to which publication? The kernel's figures for mappings are joined with the notes of the processes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import attrs

from zerocopy._compat import linux
from zerocopy._seeing import ledger
from zerocopy._seeing.ledger import About, Shown, Told
from zerocopy._seeing.processes import Used


@attrs.frozen
class PublicationMemory:
    """The memory of one publication on one node, in bytes.

    Attributes:
        name: name of the publication; empty if it has none.
        version: number of the version; None without a name.
        kind: name of the pipeline's class; empty for memory of the store that no process reports.
        node: id of the node; empty without Ray.
        processes: number of processes that have loaded it and still use it.
        loads: number of loads that are in use.
        shared: its weights in the node's store, counted once, no matter how many processes use them.
        dirtied: pages that processes have written since they loaded it. Each process has its own copy of such a page.
        private: the dirtied pages, and the copied part of each load.
        plain: bytes of one plain copy in each of these processes.
    """

    name: str
    version: int | None
    kind: str
    node: str
    processes: int
    loads: int
    shared: int
    dirtied: int
    private: int
    plain: int

    @property
    def saved(self) -> int:
        """Bytes that plain copies would take in addition. Negative as long as no process has loaded it."""
        return self.plain - self.shared - self.private


_Label = tuple[str, int | None, bytes]  # name and number; without a name, the key


@attrs.define
class _Sum:
    """The figures of one publication."""

    about: About
    used: dict[bytes, int] = attrs.field(factory=dict)  # bytes in each shard
    mapped: Counter[tuple[int, bytes]] = attrs.field(factory=Counter)  # how often each process has mapped each shard
    dirtied: int = 0

    def loads(self) -> int:
        """Return the number of loads. A load maps each shard that it needs once."""
        by_process: dict[int, int] = defaultdict(int)
        for (pid, _), count in self.mapped.items():
            by_process[pid] = max(by_process[pid], count)
        return sum(by_process.values())

    def record(self, node: str) -> PublicationMemory:
        about, loads = self.about, self.loads()
        shared = sum(self.used.values())
        private = self.dirtied + loads * about.copied
        processes = len({pid for pid, _ in self.mapped})
        if about.kind:
            plain = sum(self.used.get(shard, 0) for _, shard in self.mapped) + processes * about.copied
        else:  # unknown memory: nobody knows what plain copies would take
            plain = shared + private
        return PublicationMemory(
            about.name, about.version, about.kind, node, processes, loads, shared, self.dirtied, private, plain
        )


class Accounts:
    """The publications of one node.

    Attributes:
        sizes: bytes of each shard that a process has mapped.
    """

    def __init__(self, told: Iterable[Told]) -> None:
        """`told`: publications that the registry reports."""
        self._sums: dict[_Label, _Sum] = {}
        self._labels: dict[bytes, _Label] = {}
        self._untold: dict[tuple[int, int, int], _Sum] = {}  # by file and offset
        self.sizes: dict[bytes, int] = {}
        for one in told:
            self._add_told(one)

    def _add_told(self, told: Told) -> None:
        about = told.about
        label = (about.name, about.version, b"") if about.name else ("", None, told.key)
        self._labels[told.key] = label
        self._sums.setdefault(label, _Sum(about)).used.update(told.used)

    def add_process(self, pid: int, of_store: Used) -> None:
        """Join the notes of a process with the figures of its mappings of the store."""
        told, shown = ledger.read(pid)
        for one in told.values():
            self._add_told(one)
        latest: dict[int, Shown] = {}
        for window in shown:  # a later one at the same place has replaced an earlier one
            if window.publication in self._labels:
                latest[window.start] = window
        live: dict[int, Shown] = {}
        for mapping, usage in of_store:
            found = _window_of(mapping, latest)
            if not mapping.mode.endswith("p"):
                within = (one for one in latest.values() if mapping.start <= one.start and one.end <= mapping.end)
                live.update((one.start, one) for one in within if not one.is_private)
            elif found is None:
                self._add_untold(pid, mapping, usage)
            else:
                live[found.start] = found
                self._sums[self._labels[found.publication]].dirtied += usage.anonymous
        for window in live.values():
            self._sums[self._labels[window.publication]].mapped[pid, window.shard] += 1
            self.sizes[window.shard] = window.nbytes

    def _add_untold(self, pid: int, mapping: linux.Mapping, usage: linux.Usage) -> None:
        place = mapping.device, mapping.inode, mapping.file_offset
        found = self._untold.setdefault(place, _Sum(About("", None, "", 0, 0)))
        shard = repr(place).encode()
        found.used[shard] = self.sizes[shard] = max(mapping.end - mapping.start, found.used.get(shard, 0))
        found.mapped[pid, shard] += 1
        found.dirtied += usage.anonymous

    def keep_loaded(self) -> None:
        """Forget publications that none of the processes has loaded."""
        self._sums = {label: found for label, found in self._sums.items() if found.mapped}

    def publications(self, node: str) -> list[PublicationMemory]:
        """One record for each publication that is on the node."""
        records = [found.record(node) for found in (*self._sums.values(), *self._untold.values())]
        return [one for one in records if one.shared or one.loads]

    def objects(self) -> int:
        """Bytes of the objects on the node that hold publications, each object counted once."""
        largest: dict[bytes, int] = dict(self.sizes)
        for found in self._sums.values():
            for shard, nbytes in found.used.items():
                largest[shard] = max(nbytes, largest.get(shard, 0))
        return sum(largest.values())


def _window_of(mapping: linux.Mapping, latest: Mapping[int, Shown]) -> Shown | None:
    """Return the noted memory that is equal to a private mapping, or contains it."""
    exact = latest.get(mapping.start)
    if exact is not None and exact.is_private and mapping.end <= exact.end:
        return exact
    around = (one for one in latest.values() if one.start <= mapping.start and mapping.end <= one.end)
    return next((one for one in around if one.is_private), None)
