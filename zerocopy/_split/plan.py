"""What will be shared: frozen records without any tensor, and how they print."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import torch

from zerocopy._declare.fields import Policy
from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection, Subject, check_pipeline, introspect
from zerocopy._split.roles import Zone
from zerocopy._split.skeleton import Split, strip
from zerocopy._store.tensors import is_tensor_or_array
from zerocopy._tables import as_html, as_text, format_bytes
from zerocopy.errors import CannotTravelError


@attrs.frozen
class PlanEntry:
    """One part of a pipeline.

    Attributes:
        path: where it sits, such as `search.encoder`.
        policy: `"shared"` or `"copied"`.
        kind: the name of its type.
        tensors: how many tensors and arrays it holds.
        bytes: shared: bytes of storages first met here. Copied: bytes of the pickled value.
        dtypes: of its tensors and arrays, sorted.
        ties: `a = b` for each pair of paths at which one tensor, or one memory, is held twice.
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
        entries: one for each shared part and each copied attribute.
        shared_bytes: bytes that exist once on each node.
        copied_bytes: bytes that each load copies.
        entangled: the path of a mutable object reachable from a shared and a copied part, or None. Such a pipeline is
            loaded whole for each call.
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
        return f"{self.name}: {format_bytes(self.shared_bytes)} shared once a node, {format_bytes(self.copied_bytes)} copied"

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
    held_at = _tensor_paths(found, name)
    start = 0
    for root, end in zip(found.roots, found.root_ends, strict=True):
        path = paths.path_to(found.pipeline, root, name) or name
        indices = sorted({found.table.index[key] for key in _ids_below(root, path) if key in found.table.index})
        yield PlanEntry(
            path,
            "shared",
            type(root).__name__,
            len(indices),
            sum(storage.nbytes for storage in found.table.storages[start:end]),
            tuple(sorted({_dtype_name(found.table.specs[index].dtype) for index in indices})),
            tuple(_ties(found, indices, held_at)),
            "; ".join(_notes(found, root, path)),
        )
        start = end


def _ids_below(root: Any, path: str) -> set[int]:
    return {id(obj) for _, obj in paths.walk(root, path)}


def _tensor_paths(found: Introspection, name: str) -> dict[int, list[str]]:
    held_at: dict[int, list[str]] = defaultdict(list)
    for path, obj in paths.walk(found.pipeline, name):
        if is_tensor_or_array(obj) and id(obj) in found.table.index:
            held_at[found.table.index[id(obj)]].append(path)
    return held_at


def _ties(found: Introspection, indices: list[int], held_at: dict[int, list[str]]) -> Iterator[str]:
    by_storage: dict[int, list[str]] = defaultdict(list)
    for index, spec in enumerate(found.table.specs):
        by_storage[spec.storage].extend(held_at[index])
    for storage in dict.fromkeys(found.table.specs[index].storage for index in indices):
        tied = by_storage[storage]
        if len(tied) > 1:
            yield " = ".join(tied)


def _notes(found: Introspection, root: Any, path: str) -> Iterator[str]:
    reasons = {id(obj): reason for obj, reason in found.private_reasons}
    for below, obj in paths.walk(root, path):
        if id(obj) in reasons:
            yield f"{below} is copied: {reasons[id(obj)]}"


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
            nbytes, note = _copied_bytes(found, value, attribute, zone), ""
        except CannotTravelError:  # the pipeline as a whole could be pickled
            nbytes, note = 0, "left out by its class"
        yield PlanEntry(f"{name}.{attribute}", "copied", type(value).__name__, len(private), nbytes, dtypes, note=note)


def _copied_bytes(found: Introspection, value: Any, name: str, zone: Zone) -> int:
    stripped = strip([value], zone=zone, split=Split.ROOTS, names=[name])
    tensors = {id(obj): obj for obj in stripped.externals if is_tensor_or_array(obj)}
    inside = sum(_nbytes(obj) for key, obj in tensors.items() if key not in found.table.index)
    return len(stripped.payload) + inside


def _nbytes(obj: torch.Tensor | np.ndarray[Any, Any]) -> int:
    return int(obj.nbytes)
