"""What would publishing share and copy, as frozen records without a tensor, and how do they print?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from zerocopy._declare.fields import Policy
from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection, Subject, check_pipeline, introspect
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.tensors import is_tensor_or_array
from zerocopy._tables import as_html, as_text, format_bytes
from zerocopy.errors import CannotTravelError


@attrs.frozen
class PlanEntry:
    """One part of a pipeline.

    Attributes:
        path: where it is, such as `search.encoder`.
        policy: `"shared"` or `"copied"`.
        kind: the name of its type.
        tensors: how many tensors and arrays it holds.
        bytes: for a shared part, those of the storages that are first met here; for a copied one, those of its pickle.
        dtypes: the dtypes of its tensors and arrays, sorted.
        ties: `a = b` for each two paths at which one tensor, or one memory, is held.
        note: why something is not shared, or empty.
    """

    path: str
    policy: Policy
    kind: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    note: str = ""


@attrs.frozen(repr=False)
class SharePlan:
    """What publishing a pipeline would share and copy. Prints as a table, in a notebook as HTML.

    Attributes:
        name: what paths start with.
        entries: one per shared part and one per copied attribute.
        shared_bytes: bytes that exist once on each node.
        copied_bytes: bytes that each load copies.
        entangled: the path of a mutable object that can be reached from a shared and from a copied part, or None. Each
            call loads such a pipeline whole.
    """

    name: str
    entries: tuple[PlanEntry, ...]
    shared_bytes: int
    copied_bytes: int
    entangled: str | None = None

    def __str__(self) -> str:
        caption = self._caption()
        return as_text(_HEADERS, self._rows(), right=("tensors", "bytes"), title=self._title(), caption=caption)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(_HEADERS, self._rows(), caption=f"{self._title()} {self._caption()}".strip())

    def _title(self) -> str:
        return f"{self.name}: {format_bytes(self.shared_bytes)} shared once per node, {format_bytes(self.copied_bytes)} copied"

    def _caption(self) -> str:
        if self.entangled is None:
            return ""
        return f"Loaded whole for each call: {self.entangled!r} is reachable from both a shared and a copied part."

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for entry in self.entries:
            remarks = "; ".join([*entry.ties, *([entry.note] if entry.note else [])])
            yield (
                entry.path,
                entry.policy,
                entry.kind,
                str(entry.tensors),
                format_bytes(entry.bytes),
                ", ".join(entry.dtypes),
                remarks,
            )


_HEADERS = ("path", "policy", "kind", "tensors", "bytes", "dtypes", "ties and notes")


def plan(pipeline: Any) -> SharePlan:
    """What publishing `pipeline` would share and copy. Needs no Ray and writes nothing.

    Raises:
        ArgumentError: `pipeline` is neither an instance of a pipeline class nor an `nn.Module`.
        CannotTravelError: something inside cannot leave the process; the error names its path.
    """
    check_pipeline(pipeline, "zerocopy.plan")
    found = introspect(Subject(pipeline))
    entries = (*_shared_entries(found), *_copied_entries(found))
    shared_bytes = sum(storage.nbytes for storage in found.table.storages)
    return SharePlan(paths.name_of(pipeline), entries, shared_bytes, found.outer.nbytes, found.entangled)


def _shared_entries(found: Introspection) -> Iterator[PlanEntry]:
    name = paths.name_of(found.pipeline)
    roots = set(map(id, found.roots))
    root_paths: dict[int, str] = {}
    tensor_paths: dict[int, list[str]] = defaultdict(list)  # by index of the tensor
    for path, obj in paths.walk(found.pipeline, name):
        if id(obj) in roots:
            root_paths.setdefault(id(obj), path)
        if is_tensor_or_array(obj) and id(obj) in found.table.index:
            tensor_paths[found.table.index[id(obj)]].append(path)
    ties = _ties(found, tensor_paths)
    start = 0
    for root, end in zip(found.roots, found.root_ends, strict=True):
        path = root_paths.get(id(root), name)
        below = list(paths.walk(root, path))
        indices = sorted({found.table.index[id(obj)] for _, obj in below if id(obj) in found.table.index})
        specs = [found.table.specs[index] for index in indices]
        private = [(where, *found.private_reasons[id(obj)]) for where, obj in below if id(obj) in found.private_reasons]
        yield PlanEntry(
            path,
            "shared",
            type(root).__name__,
            len(specs),
            sum(storage.nbytes for storage in found.table.storages[start:end]),
            tuple(sorted({_dtype_name(spec.dtype) for spec in specs})),
            tuple(ties[storage] for storage in dict.fromkeys(spec.storage for spec in specs) if storage in ties),
            "; ".join(f"{where} is copied: {reason}" for where, _, reason in private),
        )
        start = end


def _ties(found: Introspection, tensor_paths: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """By storage, the paths at which its memory is held, where there are several."""
    by_storage: dict[int, list[str]] = defaultdict(list)
    for index, spec in enumerate(found.table.specs):
        by_storage[spec.storage].extend(tensor_paths.get(index, ()))
    return {storage: " = ".join(held_at) for storage, held_at in by_storage.items() if len(held_at) > 1}


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _copied_entries(found: Introspection) -> Iterator[PlanEntry]:
    if not is_pipeline_class(type(found.pipeline)):
        return
    name = paths.name_of(found.pipeline)
    roots = {id(root) for root in found.roots}
    declared = fields(type(found.pipeline))
    for attribute, value in paths.attributes_of(found.pipeline).items():
        if id(value) in roots:
            continue
        zone = Zone.COPIED if attribute in declared and declared[attribute].policy == "copied" else Zone.AUTO
        below = [obj for _, obj in paths.walk(value, attribute) if is_tensor_or_array(obj)]
        private = {id(obj): obj for obj in below if id(obj) not in found.table.index}.values()
        dtypes = tuple(sorted({_dtype_name(obj.dtype) for obj in private}))
        try:
            nbytes, note = _copied_bytes(found, value, zone), ""
        except CannotTravelError:  # but the pipeline could be pickled: its class leaves this attribute out
            nbytes, note = 0, "left out by its class"
        yield PlanEntry(f"{name}.{attribute}", "copied", type(value).__name__, len(private), nbytes, dtypes, note=note)


def _copied_bytes(found: Introspection, value: Any, zone: Zone) -> int:
    stripped = strip([value], zone=zone, split=Split.ROOTS)
    tensors = {id(obj): obj for obj in stripped.externals if is_tensor_or_array(obj)}
    return len(stripped.payload) + sum(int(obj.nbytes) for key, obj in tensors.items() if key not in found.table.index)
