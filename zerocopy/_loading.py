"""How does what was published become a live pipeline: tensors are rebuilt over the store, and skeletons joined to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zerocopy import _devices, _partial
from zerocopy._introspector import Outer, Skeleton, reach
from zerocopy._shards import Manifest, StoredMemory
from zerocopy._skeleton import Root, graft
from zerocopy._tensors import Region, TensorSpec, rebuild, stand_in
from zerocopy.errors import DeviceError


def load(
    manifest: Manifest, outer: Outer, target: torch.device, fields: Sequence[str] | None, *, require_isolation: bool
) -> tuple[Any, Mapping[int, Any], Sequence[Any]]:
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
    shared = [index for index in needed if index < len(manifest.specs)]
    storages = sorted({manifest.specs[index].storage for index in shared})
    memory = StoredMemory(manifest, storages, require_isolation=require_isolation)
    specs = (*manifest.specs, *outer.specs)
    live = dict(zip(needed, _rebuild(manifest, outer, [specs[i] for i in needed], memory, target), strict=True))
    tensors = [live[i] if i in live else _placeholder(spec, fields) for i, spec in enumerate(specs)]
    pipeline = _join(manifest, outer, tensors)
    if fields is not None:
        _partial.keep_only(pipeline, fields)
    return pipeline, {index: live[index] for index in shared}, tuple(memory.mappings())


def _referenced(manifest: Manifest, outer: Outer) -> list[int]:
    """Indices of the tensors that a whole load needs: an entangled pipeline, or one passed on, may use some only."""
    skeletons = [outer.skeleton, manifest.skeleton] if _has_roots(outer) else [outer.skeleton]
    return sorted({external for skeleton in skeletons for external in skeleton.externals if type(external) is int})


def _has_roots(outer: Outer) -> bool:
    return any(isinstance(external, Root) for external in outer.skeleton.externals)


def _needed_by(fields: Sequence[str], manifest: Manifest, outer: Outer, referenced: Sequence[int]) -> list[int]:
    """Indices of the tensors below `fields`, found on a pipeline of stand-ins that takes no memory."""
    stand_ins = [stand_in(spec) for spec in (*manifest.specs, *outer.specs)]
    blank = _join(manifest, outer, stand_ins)
    return sorted(reach(_partial.values_of(blank, fields), stand_ins) & set(referenced))


def _rebuild(
    manifest: Manifest, outer: Outer, specs: Sequence[TensorSpec], memory: StoredMemory, target: torch.device
) -> list[Any]:
    shared = len(manifest.locations)
    private = [bytearray(content) for content in outer.storages]
    devices: dict[int, torch.device] = {}

    def device_of(storage: int) -> torch.device:
        if storage not in devices:
            devices[storage] = _one_device(manifest.devices.get(storage, ()), target)
        return devices[storage]

    def region_of(storage: int) -> Region:
        if storage >= shared:
            content = private[storage - shared]
            return Region(content, 0, len(content))
        return memory.region(storage, writable=device_of(storage).type == "cpu")

    return rebuild(specs, region_of, device_of)


def _one_device(declared: Sequence[str | None], target: torch.device) -> torch.device:
    """The device of a storage whose fields declare `declared`, None for those that follow the load."""
    devices = {target if name is None else _devices.resolve(name) for name in declared} or {target}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise DeviceError(
            f"Fields that share memory would be loaded on {names}.", hint="give tied fields one device, or load on it."
        )
    return devices.pop()


def _join(manifest: Manifest, outer: Outer, tensors: Sequence[Any]) -> Any:
    roots = graft_skeleton(manifest.skeleton, tensors, ()) if _has_roots(outer) else ()
    return graft_skeleton(outer.skeleton, tensors, roots)[0]


def graft_skeleton(skeleton: Skeleton, tensors: Sequence[Any], roots: Sequence[Any]) -> list[Any]:
    """Rebuild the objects of a skeleton around live tensors and roots."""
    externals = [_external(external, tensors, roots) for external in skeleton.externals]
    return graft(skeleton.payload, externals, skeleton.count)


def _external(external: Any, tensors: Sequence[Any], roots: Sequence[Any]) -> Any:
    if type(external) is int:
        return tensors[external]
    return roots[external.position] if isinstance(external, Root) else external


def _placeholder(spec: TensorSpec, fields: Sequence[str] | None) -> Any:
    return None if fields is None else stand_in(spec)
