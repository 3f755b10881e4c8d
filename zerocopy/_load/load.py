"""How does a publication become a live pipeline? Tensors become views of the store, and skeletons are rebuilt around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import ray
import torch

from zerocopy._load import devices, partial
from zerocopy._split.skeleton import graft
from zerocopy._store.manifest import BESIDE, NOWHERE, Manifest, Outer, Root, Skeleton
from zerocopy._store.read import StoredMemory
from zerocopy._store.storages import Region, allocated
from zerocopy._store.tensors import ARRAY, TensorSpec, rebuild, stand_in
from zerocopy._store.uploads import upload
from zerocopy.errors import DeviceError


@attrs.frozen(eq=False)
class SharedPart:
    """What several loads of one publication can share: the shared tensors by index, the roots, and their memory."""

    tensors: Mapping[int, Any]
    roots: Sequence[Any]
    memory: StoredMemory


def load(
    manifest: Manifest, outer: Outer, target: torch.device, fields: Sequence[str] | None, *, require_isolation: bool
) -> tuple[Any, StoredMemory]:
    """A live pipeline, and the memory that its shared tensors are views of.

    Args:
        target: the device of the tensors whose field declares no device.
        fields: attributes to load, None for all.

    Raises:
        DeviceError, ArgumentError, PublicationLostError: as `Publication.load`.
    """
    if fields is None and is_separable(manifest, outer):
        shared = load_shared(manifest, target, require_isolation=require_isolation)
        return join(manifest, outer, shared, target), shared.memory
    return _load_needed(manifest, outer, target, fields, require_isolation=require_isolation)


def _load_needed(
    manifest: Manifest, outer: Outer, target: torch.device, fields: Sequence[str] | None, *, require_isolation: bool
) -> tuple[Any, StoredMemory]:
    """Like `load`, but loads only the tensors that are needed. Other fields hold stand-ins until they are removed."""
    specs = (*manifest.specs, *outer.specs)
    needed = _needed(manifest, outer, specs, fields)
    storages = list(dict.fromkeys(specs[index].storage for index in needed))
    stored = [storage for storage in storages if storage < len(manifest.location_rows)]
    memory = StoredMemory(manifest, stored, require_isolation=require_isolation)
    rows = [specs[index] for index in needed]
    by_storage = _devices_of(rows, manifest.devices, target)
    regions = {**memory.regions(_only_uploaded(by_storage, rows)), **_private_regions(manifest, outer)}
    live = dict(zip(needed, rebuild(rows, regions, upload(regions, by_storage)), strict=True))
    blank = {} if fields is None else {i: stand_in(spec) for i, spec in enumerate(specs) if i not in live}
    pipeline = _join_all(manifest, outer, [live.get(index, blank.get(index)) for index in range(len(specs))])
    if fields is not None:
        partial.keep_only(pipeline, fields)
    return pipeline, memory


def shards_of(manifest: Manifest, outer: Outer, fields: Sequence[str] | None) -> list[ray.ObjectRef[Any]]:
    """The store objects that a load reads: the object with the manifest, and its shards.

    Args:
        fields: as `load`.
    """
    used: Sequence[int] = range(len(manifest.location_rows))
    if fields is not None:
        specs = (*manifest.specs, *outer.specs)
        used = [specs[index].storage for index in _needed(manifest, outer, specs, fields)]
    numbers = {manifest.location_rows[storage][0] for storage in used if storage < len(manifest.location_rows)}
    return [manifest.shard(number) for number in sorted({BESIDE, *numbers} - {NOWHERE})]


def _needed(
    manifest: Manifest, outer: Outer, specs: Sequence[TensorSpec], fields: Sequence[str] | None
) -> Sequence[int]:
    """Indices of the tensors to load."""
    referenced: Sequence[int] = range(len(specs))
    if not outer.has_roots():  # entangled or passed on: the skeleton may refer to only some of the published tensors
        referenced = sorted({external for external in outer.skeleton.externals if type(external) is int})
    if fields is None:
        return referenced
    stand_ins = [stand_in(spec) for spec in specs]
    blank = _join_all(manifest, outer, stand_ins)
    return sorted(partial.reach(partial.values_of(blank, fields), stand_ins) & set(referenced))


def is_separable(manifest: Manifest, outer: Outer) -> bool:
    """Whether the shared part can be loaded separately: not if the pipeline is entangled, or copies a view of shared memory."""
    return outer.has_roots() and all(spec.storage >= len(manifest.location_rows) for spec in outer.specs)


def load_shared(manifest: Manifest, target: torch.device, *, require_isolation: bool) -> SharedPart:
    """Load the shared part.

    Raises:
        As `load`.
    """
    rows: Any = manifest.spec_rows
    memory = StoredMemory(manifest, range(len(manifest.location_rows)), require_isolation=require_isolation)
    by_storage = _devices_of(rows, manifest.devices, target)
    regions = memory.regions(_only_uploaded(by_storage, rows))
    tensors = dict(enumerate(rebuild(rows, regions, upload(regions, by_storage))))
    return SharedPart(tensors, graft_skeleton(manifest.skeleton, tensors, ()), memory)


def join(manifest: Manifest, outer: Outer, shared: SharedPart, target: torch.device) -> Any:
    """Build the pipeline around the shared part, with fresh copies of the rest."""
    tensors: Any = shared.tensors
    if outer.specs:
        regions = _private_regions(manifest, outer)
        private = rebuild(outer.specs, regions, upload(regions, _devices_of(outer.specs, {}, target)))
        tensors = {**tensors, **dict(enumerate(private, start=len(manifest.spec_rows)))}
    return _in_eval_mode(graft_skeleton(outer.skeleton, tensors, shared.roots))


def _join_all(manifest: Manifest, outer: Outer, tensors: Sequence[Any]) -> Any:
    """Build the pipeline around tensors, given in the order of their indices: first the shared ones, then those of `outer`."""
    roots = graft_skeleton(manifest.skeleton, tensors, ()) if outer.has_roots() else ()
    return _in_eval_mode(graft_skeleton(outer.skeleton, tensors, roots))


def _private_regions(manifest: Manifest, outer: Outer) -> dict[int, Region]:
    """Fresh memory for the storages that are copied, by index."""
    count = len(manifest.location_rows)
    return {count + i: allocated(content) for i, content in enumerate(outer.storages)}


def _devices_of(
    rows: Iterable[tuple[Any, ...]], declared: Mapping[int, Sequence[str | None]], target: torch.device
) -> dict[int, torch.device]:
    """The devices of the storages that are not for main memory, given the row of each tensor."""
    if not declared and target == devices.CPU:
        return {}
    storages = {storage for kind, storage, *_ in rows if kind != ARRAY}
    found = {storage: _one_device(declared.get(storage, ()), target) for storage in storages}
    return {storage: device for storage, device in found.items() if device != devices.CPU}


def _only_uploaded(by_storage: Mapping[int, torch.device], rows: Iterable[tuple[Any, ...]]) -> set[int]:
    """Storages in `by_storage` that no array is a view of. Arrays stay in main memory, where they can be written to."""
    return set(by_storage) - {storage for kind, storage, *_ in rows if kind == ARRAY} if by_storage else set()


def _one_device(declared: Sequence[str | None], target: torch.device) -> torch.device:
    """The device of a storage, given the devices that its fields declare. None stands for the device of the load."""
    wanted = {target if name is None else devices.resolve(name) for name in declared} or {target}
    if len(wanted) > 1:
        names = " and ".join(sorted(map(str, wanted)))
        raise DeviceError(
            f"Fields that share memory would be loaded on different devices: {names}.",
            hint="give these fields one device=, or load the pipeline on the device that they declare.",
        )
    return wanted.pop()


def _in_eval_mode(objects: Sequence[Any]) -> Any:
    """Put the modules in the lists after the pipeline into eval mode, and return the pipeline."""
    pipeline, *to_eval = objects
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
