"""What does a plan show about each part of an introspected pipeline: how much is shared, pickled and copied, and why?"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection
from zerocopy._split.own_ways import OwnWay, own_ways
from zerocopy._split.plan import PlanEntry, SharePlan
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.storages import COPIED
from zerocopy._store.tensors import is_tensor_or_array
from zerocopy._tables import format_bytes
from zerocopy.errors import CannotTravelError

# Pickled bytes of a shared part get a note if they exceed NOTED_IF_MANY and a tenth of the shared bytes, or if they exceed NOTED.
NOTED_IF_MANY, NOTED = 1 << 16, 1 << 20
LISTED = 3  # the maximum number of paths in a note


@attrs.frozen
class Measured:
    """The memory that a real load has for a shared part.

    Attributes:
        views: bytes of the store that its tensors and arrays are views of, without those of parts measured before.
        private: paths of its other tensors and arrays, with the bytes of the memory that no earlier tensor or array has.
    """

    views: int
    private: tuple[tuple[str, int], ...]


def plan_of(found: Introspection, measure: Callable[[str], Measured] | None = None) -> SharePlan:
    """What publishing would share and copy.

    Args:
        measure: for a verified plan, returns the memory that a real load has for the shared part at a path.
    """
    shared = tuple(_shared_entries(found, measure))
    # The outer skeleton of an entangled pipeline holds everything that is pickled, and the shared skeleton is not loaded.
    beside = 0 if found.entangled is None else sum(entry.pickled for entry in shared)
    copied = sum(entry.pickled if entry.copied is None else entry.copied for entry in shared)
    return SharePlan(
        paths.name_of(found.pipeline),
        (*shared, *_copied_entries(found)),
        sum(storage.nbytes for storage in found.table.storages),
        max(found.outer.nbytes - beside, 0) + copied,
        found.entangled,
        None if measure is None else sum(entry.views or 0 for entry in shared),
        dtype_bytes=_dtype_bytes(found),
    )


def _dtype_bytes(found: Introspection) -> tuple[tuple[str, int], ...]:
    """The bytes of each dtype, largest first."""
    dtypes: dict[int, str] = {}
    for spec in found.table.specs:
        dtypes.setdefault(spec.storage, _dtype_name(spec.dtype))
    nbytes: Counter[str] = Counter()
    for index, storage in enumerate(found.table.storages):
        nbytes[dtypes[index]] += storage.nbytes
    return tuple(nbytes.most_common())


def _shared_entries(found: Introspection, measure: Callable[[str], Measured] | None) -> Iterator[PlanEntry]:
    walked = _Walked(found)
    ways = list(own_ways(walked.candidates()))
    start = pickled_start = 0
    for root, end, pickled_end in zip(found.roots, found.root_ends, found.payload_ends, strict=True):
        entry = walked.entry_of(root, range(start, end), pickled_end - pickled_start)
        passed = [way for way in ways if _is_within(way.path, entry.path) or _is_within(entry.path, way.path)]
        notes = [*([entry.note] if entry.note else []), *_pickled_notes(entry, passed)]
        if measure is None:
            yield attrs.evolve(entry, note="; ".join(notes), may_copy="; ".join(_may_copy(passed)))
        else:
            measured = measure(entry.path)
            views, private = min(measured.views, entry.bytes), sum(nbytes for _, nbytes in measured.private)
            # Private memory was often created from loaded data that is no view, so the two are not added.
            copied = max(entry.bytes - views + entry.pickled, private)
            note = "; ".join([*notes, *_copied_notes(measured, passed)])
            yield attrs.evolve(entry, note=note, views=views, copied=copied)
        start, pickled_start = end, pickled_end


class _Walked:
    """An introspected pipeline, and the paths of its parts."""

    def __init__(self, found: Introspection) -> None:
        self._found = found
        self._name = paths.name_of(found.pipeline)
        self._objects = list(paths.walk(found.pipeline, self._name))
        self._root_paths: dict[int, str] = {}
        roots = set(map(id, found.roots))
        for path, obj in self._objects:
            if id(obj) in roots:
                self._root_paths.setdefault(id(obj), path)

    def candidates(self) -> Iterator[tuple[str, Any]]:
        """Objects that may have their own way to pickle: in shared parts, and those that hold a shared part; each once."""
        found = self._found
        pickled = set(map(id, (*found.mutable, *found.composites)))
        root_paths = self._root_paths.values()
        holders = {path[:end] for path in root_paths for end, sign in enumerate(path) if sign in ".["}
        for path, obj in {id(obj): (path, obj) for path, obj in reversed(self._objects)}.values():
            if id(obj) in pickled or path in holders or isinstance(obj, tuple):
                yield path, obj

    def entry_of(self, root: Any, own: range, pickled: int) -> PlanEntry:
        """The entry of a shared root, given the numbers of the storages that count for it."""
        found = self._found
        path = self._root_paths.get(id(root), self._name)
        below = list(paths.walk(root, path))
        indices = {found.table.index[id(obj)] for _, obj in below if id(obj) in found.table.index}
        indices.update(index for number in own for index in self._without_path[number])
        specs = [found.table.specs[index] for index in sorted(indices)]
        reasons = [(where, *found.private_reasons[id(obj)]) for where, obj in below if id(obj) in found.private_reasons]
        storages = dict.fromkeys(spec.storage for spec in specs)
        return PlanEntry(
            path,
            "shared",
            type(root).__name__,
            len(specs),
            sum(found.table.storages[number].nbytes for number in own),
            tuple(sorted({_dtype_name(spec.dtype) for spec in specs})),
            (*self._modules_held_in(path), *(self._ties[storage] for storage in storages if storage in self._ties)),
            "; ".join(f"{where} is copied: {reason}" for where, _, reason in reasons),
            pickled,
        )

    @functools.cached_property
    def _without_path(self) -> Mapping[int, list[int]]:
        """By storage, the indices of tensors without a path, as in TorchScript: torch makes new Python objects for them."""
        table, found = self._found.table, defaultdict[int, list[int]](list)
        walked = {table.index[id(obj)] for _, obj in self._objects if id(obj) in table.index}
        for index, spec in enumerate(table.specs):
            if index not in walked:
                found[spec.storage].append(index)
        return found

    def _modules_held_in(self, part: str) -> list[str]:
        """For each module in a part that is held at several paths: these paths."""
        return [
            " = ".join(held_at) for held_at in self._shared_modules if any(_is_within(path, part) for path in held_at)
        ]

    @functools.cached_property
    def _shared_modules(self) -> list[list[str]]:
        """The paths of each module that has tensors and several paths, without paths from the module back to itself."""
        found: dict[int, list[str]] = defaultdict(list)
        for path, obj in self._objects:
            if paths.is_module(obj) and not any(_is_within(path, other) for other in found[id(obj)]):
                found[id(obj)].append(path)
        modules: dict[int, Any] = {id(obj): obj for _, obj in self._objects if len(found.get(id(obj), ())) > 1}
        return [
            found[key] for key, module in modules.items() if any(map(_has_any, (module.parameters(), module.buffers())))
        ]

    @functools.cached_property
    def _ties(self) -> Mapping[int, str]:
        """The paths of each storage that is held at several paths."""
        found = self._found
        tensor_paths: dict[int, list[str]] = defaultdict(list)  # by index of the tensor
        for path, obj in self._objects:
            if is_tensor_or_array(obj) and id(obj) in found.table.index:
                tensor_paths[found.table.index[id(obj)]].append(path)
        by_storage: dict[int, list[str]] = defaultdict(list)
        for index, spec in enumerate(found.table.specs):
            by_storage[spec.storage].extend(tensor_paths.get(index, ()))
        return {storage: " = ".join(held_at) for storage, held_at in by_storage.items() if len(held_at) > 1}


def _has_any(values: Iterator[Any]) -> bool:
    return next(values, None) is not None


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _is_within(path: str, other: str) -> bool:
    return path.startswith(other) and path[len(other) : len(other) + 1] in ("", ".", "[")


def _pickled_notes(entry: PlanEntry, passed: Sequence[OwnWay]) -> Iterator[str]:
    if entry.pickled > max(NOTED_IF_MANY, min(NOTED, entry.bytes // 10)):
        largest = max(passed, key=lambda way: way.pickled, default=None)
        is_by_it = largest is not None and largest.pickled > entry.pickled // 2
        by = f" ({largest.path}: {largest.method})" if largest is not None and is_by_it else ""
        yield f"{format_bytes(entry.pickled)} of it are pickled: each load copies them{by}"


def _may_copy(passed: Sequence[OwnWay]) -> Iterator[str]:
    by_method: dict[str, list[str]] = defaultdict(list)
    for way in passed:
        if way.nbytes:
            by_method[way.method].append(way.path)
    for method, held_at in by_method.items():
        yield f"{_listed(held_at)} may be copied by {method}: verify=True shows it"


def _copied_notes(measured: Measured, passed: Sequence[OwnWay]) -> Iterator[str]:
    """Names the data with memory of its own, except data so small that a load copies it on purpose."""
    large = sorted(((path, nbytes) for path, nbytes in measured.private if nbytes > COPIED), key=lambda item: -item[1])
    if large:
        total = format_bytes(sum(nbytes for _, nbytes in large))
        around = [way for way in passed if _is_within(large[0][0], way.path)]
        by = f", by {max(around, key=lambda way: len(way.path)).method}" if around else ""
        yield f"each load copies {_listed([path for path, _ in large])} ({total}){by}"


def _listed(held_at: Sequence[str]) -> str:
    return ", ".join(held_at[:LISTED]) + (f" and {len(held_at) - LISTED} more" if len(held_at) > LISTED else "")


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
        except CannotTravelError:  # the pipeline could be pickled, so its class leaves this attribute out
            nbytes, note = 0, "left out by its class"
        yield PlanEntry(f"{name}.{attribute}", "copied", type(value).__name__, len(private), nbytes, dtypes, note=note)


def _copied_bytes(found: Introspection, value: Any, zone: Zone) -> int:
    stripped = strip([value], zone=zone, split=Split.ROOTS)
    tensors = {id(obj): obj for obj in stripped.externals if is_tensor_or_array(obj)}
    return len(stripped.payload) + sum(int(obj.nbytes) for key, obj in tensors.items() if key not in found.table.index)
