"""How does what was published become a live pipeline: tensors are rebuilt over the store, and skeletons joined to them."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from zerocopy import _devices, _partial
from zerocopy._introspector import Outer, Skeleton, reach
from zerocopy._shards import Manifest, StoredMemory
from zerocopy._skeleton import Root, graft
from zerocopy._tensors import TensorSpec, rebuild, stand_in
from zerocopy.errors import DeviceError


def load(
    manifest: Manifest, outer: Outer, target: torch.device, fields: Sequence[str] | None, *, require_isolation: bool
) -> tuple[Any, Mapping[int, Any], StoredMemory]:
    """A live pipeline, its shared tensors by index, and the memory that they are views of.

    Args:
        target: where tensors go whose field declares no device.
        fields: attributes to load, None for all.

    Raises:
        DeviceError, ArgumentError, PublicationLostError: as `Publication.load`.
    """
    needed: Sequence[int] = _referenced(manifest, outer)
    if fields is not None:
        needed = _needed_by(fields, manifest, outer, needed)
    rows = (*manifest.spec_rows, *outer.specs)
    specs: Any = rows if len(needed) == len(rows) else [rows[index] for index in needed]
    count = len(manifest.location_rows)
    storages = dict.fromkeys(spec[1] for spec in specs)
    memory = StoredMemory(manifest, [i for i in storages if i < count], require_isolation=require_isolation)
    devices = _devices_of(storages, manifest.devices, target)
    regions = memory.regions(devices)
    regions.update((count + i, (bytearray(content), 0, len(content))) for i, content in enumerate(outer.storages))
    with _collector_paused():
        live = dict(zip(needed, rebuild(specs, regions, devices), strict=True))
        tensors = live if len(live) == len(rows) else _with_placeholders(live, rows, fields)
        pipeline = _join(manifest, outer, tensors)
    if fields is not None:
        _partial.keep_only(pipeline, fields)
    shared = live if not outer.specs else {i: live[i] for i in needed if i < len(manifest.spec_rows)}
    return pipeline, shared, memory


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Thousands of new objects, all of them to stay, would have the garbage collector look at everything again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _referenced(manifest: Manifest, outer: Outer) -> Sequence[int]:
    """Indices of the tensors that a whole load needs: an entangled pipeline, or one passed on, may use some only."""
    if _has_roots(outer):
        return range(len(manifest.spec_rows) + len(outer.specs))
    return sorted({external for external in outer.skeleton.externals if type(external) is int})


def _has_roots(outer: Outer) -> bool:
    return any(isinstance(external, Root) for external in outer.skeleton.externals)


def _needed_by(fields: Sequence[str], manifest: Manifest, outer: Outer, referenced: Sequence[int]) -> list[int]:
    """Indices of the tensors below `fields`, found on a pipeline of stand-ins that takes no memory."""
    stand_ins = [stand_in(spec) for spec in (*manifest.specs, *outer.specs)]
    blank = _join(manifest, outer, stand_ins)
    return sorted(reach(_partial.values_of(blank, fields), stand_ins) & set(referenced))


def _with_placeholders(live: Mapping[int, Any], rows: Sequence[Any], fields: Sequence[str] | None) -> list[Any]:
    blank = [None] * len(rows) if fields is None else [stand_in(TensorSpec._make(row)) for row in rows]
    return [live.get(index, blank[index]) for index in range(len(rows))]


def _devices_of(
    storages: Iterable[int], declared: Mapping[int, Sequence[str | None]], target: torch.device
) -> dict[int, torch.device]:
    """Where storages belong, of those that do not stay in main memory."""
    if not declared:
        return {} if target == _devices.CPU else dict.fromkeys(storages, target)
    found = {storage: _one_device(declared.get(storage, ()), target) for storage in storages}
    return {storage: device for storage, device in found.items() if device != _devices.CPU}


def _one_device(declared: Sequence[str | None], target: torch.device) -> torch.device:
    """The device of a storage whose fields declare `declared`, None for those that follow the load."""
    devices = {target if name is None else _devices.resolve(name) for name in declared} or {target}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise DeviceError(
            f"Fields that share memory would be loaded on {names}.", hint="give tied fields one device, or load on it."
        )
    return devices.pop()


def _join(manifest: Manifest, outer: Outer, tensors: Mapping[int, Any] | Sequence[Any]) -> Any:
    roots = graft_skeleton(manifest.skeleton, tensors, ()) if _has_roots(outer) else ()
    pipeline, *to_eval = graft_skeleton(outer.skeleton, tensors, roots)
    for module in itertools.chain(*to_eval):
        module.eval()
    return pipeline


def graft_skeleton(skeleton: Skeleton, tensors: Mapping[int, Any] | Sequence[Any], roots: Sequence[Any]) -> list[Any]:
    """Rebuild the objects of a skeleton around live tensors and roots."""
    externals = [
        tensors[external] if type(external) is int else roots[external.position] if type(external) is Root else external
        for external in skeleton.externals
    ]
    return graft(skeleton.payload, externals, skeleton.count)
