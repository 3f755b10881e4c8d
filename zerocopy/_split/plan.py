"""What would publishing share and copy, as frozen records without a tensor, and how do they print?"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from zerocopy._declare.fields import Policy
from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection
from zerocopy._split.own_ways import SMALL, OwnWay, own_ways
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.tensors import is_tensor_or_array
from zerocopy._tables import as_html, as_text, format_bytes
from zerocopy.errors import CannotTravelError

# So many pickled bytes of a shared part are worth a note if they are a tenth of what is shared; so many always are.
NOTED_IF_MANY, NOTED = 1 << 16, 1 << 20
LISTED = 3  # paths in a note


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
        note: why something is not shared or may not be, or empty.
        pickled: for a shared part, bytes of all but its tensors and arrays: each load unpickles them.
        views: of `bytes` those that a loaded part has as views of the store; None where that was not verified.
        copied: bytes that each load copies: what came and is no view, or what tensors and arrays of the loaded part take
            beside the store if that is more. None where it was not verified.
    """

    path: str
    policy: Policy
    kind: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    note: str = ""
    pickled: int = 0
    views: int | None = None
    copied: int | None = None


@attrs.frozen(repr=False)
class SharePlan:
    """What publishing a pipeline would share and copy. Prints as a table, in a notebook as HTML.

    Attributes:
        name: what paths start with.
        entries: one per shared part and one per copied attribute.
        shared_bytes: bytes that exist once on each node.
        copied_bytes: bytes that each load copies: as measured, if the plan was verified.
        entangled: the path of a mutable object that can be reached from a shared and from a copied part, or None. Each
            call loads such a pipeline whole.
        view_bytes: of `shared_bytes` those that a loaded pipeline has as views of the store; None if the plan was not verified.
        written_bytes: bytes of views that loading writes to, in whole pages, which each load copies; None as above.
    """

    name: str
    entries: tuple[PlanEntry, ...]
    shared_bytes: int
    copied_bytes: int
    entangled: str | None = None
    view_bytes: int | None = None
    written_bytes: int | None = None

    def __str__(self) -> str:
        right = ("tensors", "bytes", *_VERIFIED)
        return as_text(self._headers(), self._rows(), right=right, title=self._title(), caption=self._caption())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self._headers(), self._rows(), caption=f"{self._title()} {self._caption()}".strip())

    @property
    def _is_verified(self) -> bool:
        return self.view_bytes is not None

    def _title(self) -> str:
        title = f"{self.name}: {format_bytes(self.shared_bytes)} shared once per node, {format_bytes(self.copied_bytes)} copied"
        if self.view_bytes is None:
            return title
        return f"{title}; verified: {format_bytes(self.view_bytes)} are views of the store"

    def _caption(self) -> str:
        sentences = []
        if self.entangled is not None:
            sentences.append(
                f"Loaded whole for each call: {self.entangled!r} is reachable from both a shared and a copied part."
            )
        if self.written_bytes:
            sentences.append(
                f"Loading writes to {format_bytes(self.written_bytes)} of the views: each load copies these pages."
            )
        return " ".join(sentences)

    def _headers(self) -> tuple[str, ...]:
        return _HEADERS[:-2] + (_VERIFIED if self._is_verified else ()) + _HEADERS[-2:]

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for entry in self.entries:
            verified = ("" if count is None else format_bytes(count) for count in (entry.views, entry.copied))
            yield (
                entry.path,
                entry.policy,
                entry.kind,
                str(entry.tensors),
                format_bytes(entry.bytes),
                *(verified if self._is_verified else ()),
                ", ".join(entry.dtypes),
                "; ".join([*entry.ties, *([entry.note] if entry.note else [])]),
            )


_HEADERS = ("path", "policy", "kind", "tensors", "bytes", "dtypes", "ties and notes")
_VERIFIED = ("views", "copied")


@attrs.frozen
class Measured:
    """What a load really gave of a shared part.

    Attributes:
        views: bytes of the store that its tensors and arrays are views of, and no part measured before has.
        private: paths of its other tensors and arrays, with the bytes of memory that each is the first to have.
    """

    views: int
    private: tuple[tuple[str, int], ...]


def plan_of(found: Introspection, measure: Callable[[str], Measured] | None = None) -> SharePlan:
    """What publishing would share and copy.

    Args:
        measure: for a plan that is verified, tells of the path of each shared part what a load really gave.
    """
    shared = tuple(_shared_entries(found, measure))
    pickled = sum(entry.pickled for entry in shared)
    # The outer skeleton of an entangled pipeline has what is pickled of the shared parts in itself.
    beside = found.outer.nbytes - (pickled if found.entangled is not None else 0)
    copied = sum(entry.pickled if entry.copied is None else entry.copied for entry in shared)
    views = None if measure is None else sum(entry.views or 0 for entry in shared)
    return SharePlan(
        paths.name_of(found.pipeline),
        (*shared, *_copied_entries(found)),
        sum(storage.nbytes for storage in found.table.storages),
        max(beside, 0) + copied,
        found.entangled,
        views,
    )


def _shared_entries(found: Introspection, measure: Callable[[str], Measured] | None) -> Iterator[PlanEntry]:
    name = paths.name_of(found.pipeline)
    walked = list(paths.walk(found.pipeline, name))
    roots = set(map(id, found.roots))
    root_paths: dict[int, str] = {}
    tensor_paths: dict[int, list[str]] = defaultdict(list)  # by index of the tensor
    for path, obj in walked:
        if id(obj) in roots:
            root_paths.setdefault(id(obj), path)
        if is_tensor_or_array(obj) and id(obj) in found.table.index:
            tensor_paths[found.table.index[id(obj)]].append(path)
    ties = _ties(found, tensor_paths)
    ways = list(own_ways(_candidates(found, walked, root_paths.values())))
    ends = zip(found.root_ends, found.payload_ends, strict=True)
    bounds = itertools.pairwise([(0, 0), *ends])
    for root, ((start, pickled_start), (end, pickled_end)) in zip(found.roots, bounds, strict=True):
        path = root_paths.get(id(root), name)
        below = list(paths.walk(root, path))
        indices = sorted({found.table.index[id(obj)] for _, obj in below if id(obj) in found.table.index})
        specs = [found.table.specs[index] for index in indices]
        nbytes, pickled = (
            sum(storage.nbytes for storage in found.table.storages[start:end]),
            pickled_end - pickled_start,
        )
        measured = None if measure is None else measure(path)
        passed = [way for way in ways if _is_at_or_below(way.path, path) or _is_at_or_below(path, way.path)]
        reasons = [(where, *found.private_reasons[id(obj)]) for where, obj in below if id(obj) in found.private_reasons]
        notes = [
            *(f"{where} is copied: {reason}" for where, _, reason in reasons),
            *_pickled_note(pickled, nbytes, passed),
            *(_may_copy_notes(passed) if measured is None else _copied_note(measured, passed)),
        ]
        views = None if measured is None else min(measured.views, nbytes)
        private = 0 if measured is None else sum(taken for _, taken in measured.private)
        yield PlanEntry(
            path,
            "shared",
            type(root).__name__,
            len(specs),
            nbytes,
            tuple(sorted({_dtype_name(spec.dtype) for spec in specs})),
            tuple(ties[storage] for storage in dict.fromkeys(spec.storage for spec in specs) if storage in ties),
            "; ".join(notes),
            pickled,
            views,
            None if views is None else max(nbytes - views + pickled, private),
        )


def _candidates(
    found: Introspection, walked: Sequence[tuple[str, Any]], root_paths: Iterable[str]
) -> Iterator[tuple[str, Any]]:
    """What may have a way of its own to pickle: objects of the shared parts, and those that hold a shared part; each once."""
    pickled = set(map(id, (*found.mutable, *found.composites)))
    holders = {path[:end] for path in root_paths for end, character in enumerate(path) if character in ".["}
    met: set[int] = set()
    for path, obj in walked:
        if id(obj) not in met and (id(obj) in pickled or path in holders or isinstance(obj, tuple)):
            met.add(id(obj))
            yield path, obj


def _is_at_or_below(path: str, other: str) -> bool:
    return path.startswith(other) and path[len(other) : len(other) + 1] in ("", ".", "[")


def _pickled_note(pickled: int, nbytes: int, passed: Sequence[OwnWay]) -> Iterator[str]:
    if pickled > max(NOTED_IF_MANY, min(NOTED, nbytes // 10)):
        largest = max(passed, key=lambda way: way.pickled, default=None)
        by = f" ({largest.path}: {largest.method})" if largest is not None and largest.pickled > pickled // 2 else ""
        yield f"{format_bytes(pickled)} of it are pickled: each load copies them{by}"


def _may_copy_notes(passed: Sequence[OwnWay]) -> Iterator[str]:
    by_method: dict[str, list[str]] = defaultdict(list)
    for way in passed:
        if way.nbytes:
            by_method[way.method].append(way.path)
    for method, held_at in by_method.items():
        yield f"{_listed(held_at)} may be copied by {method}: verify=True tells"


def _copied_note(measured: Measured, passed: Sequence[OwnWay]) -> Iterator[str]:
    """What has memory of its own in a loaded part, but for what is so small that loading may copy it on purpose."""
    large = sorted(((path, size) for path, size in measured.private if size > SMALL), key=lambda item: -item[1])
    if large:
        total = format_bytes(sum(size for _, size in large))
        around = [way for way in passed if _is_at_or_below(large[0][0], way.path)]
        by = f", by {around[-1].method}" if around else ""
        yield f"each load copies {_listed([path for path, _ in large])} ({total}){by}"


def _listed(held_at: Sequence[str]) -> str:
    return ", ".join(held_at[:LISTED]) + (f" and {len(held_at) - LISTED} more" if len(held_at) > LISTED else "")


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
