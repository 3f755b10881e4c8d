"""What would publishing a pipeline share and copy, according to the plan, and as measured with one load?"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import attrs

from zerocopy._compat import linux
from zerocopy._compat.ray import is_store_file
from zerocopy._publish.publish import publish_unremembered
from zerocopy._split import paths
from zerocopy._split.introspect import Introspection, Subject, check_pipeline, introspect
from zerocopy._split.plan import SharePlan
from zerocopy._split.planning import Measured, plan_of
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.mapping import around, store_files
from zerocopy._store.storages import Storage, storage_of
from zerocopy._store.tensors import is_plain, is_tensor_or_array
from zerocopy.errors import ZeroCopyError


def plan(pipeline: Any, *, verify: bool = False) -> SharePlan:
    """List what publishing `pipeline` would share and copy. Without `verify`, it needs no Ray and writes nothing.

    Args:
        pipeline: a pipeline, a module, or another object that holds models.
        verify: whether to publish and load the pipeline once, to measure which bytes of the loaded pipeline really are views of
            the store (classes may copy the data that they receive). Until it returns, this takes memory of the store, unless the
            pipeline is already published. It does not change whether or how the pipeline is published. Needs Ray and Linux.

    Returns:
        The plan. All sizes are in bytes.

    Raises:
        ArgumentError: `pipeline` is a class, or holds nothing to share.
        CannotTravelError: an object inside cannot leave the process. The error names its path.
        ZeroCopyError: `verify` is True, and the system does not report what is mapped; or as `publish` and `load`.
    """
    check_pipeline(pipeline, "zerocopy.plan")
    found = introspect(Subject(pipeline))
    return _verified(found) if verify else plan_of(found)


def _verified(found: Introspection) -> SharePlan:
    if (reason := linux.why_no_mappings()) is not None:
        raise ZeroCopyError(
            f"This plan cannot be verified: {reason}.", hint="leave verify=True out, or run it on Linux."
        )
    try:
        return _measured(found)
    finally:
        gc.collect()  # reference cycles would keep the loaded pipeline, which keeps the weights in the store


def _measured(found: Introspection) -> SharePlan:
    before = _written_bytes()
    loaded = publish_unremembered(found).load()
    written = max(_written_bytes() - before, 0)
    plan = plan_of(found, _Loaded(loaded, found.pipeline).measure)
    return attrs.evolve(plan, copied_bytes=plan.copied_bytes + written, written_bytes=written)


def _written_bytes() -> int:
    """Bytes of store pages of which this process has its own copies, because it wrote to them."""
    return sum(use.anonymous for mapping, use in linux.usage(os.getpid()) or () if is_store_file(mapping.path))


class _Loaded:
    """A loaded pipeline whose parts are measured one after the other. Memory counts for the first part that has it."""

    def __init__(self, pipeline: Any, original: Any) -> None:
        name = paths.name_of(original)
        self._pipeline = pipeline
        self._parts: dict[str, Any] = {}
        for path, obj in paths.walk(pipeline, name):
            self._parts.setdefault(path, obj)
        # Memory that existed before, such as a global that a hook uses, was not loaded.
        self._met = {storage.key for _, storage in _storages_below(original, name)}
        self._store = store_files()

    def measure(self, path: str) -> Measured:
        """The memory of the part at `path` that no earlier part has."""
        if path not in self._parts:  # its class has moved it
            return Measured(0, ())
        part = self._parts[path]
        views, private = 0, []
        for where, storage in (*_storages_below(part, path), *_storages_pickled(part)):
            if storage.key not in self._met and storage.nbytes:
                if self._is_in_store(storage):
                    views += storage.nbytes
                elif where:
                    private.append((where, storage.nbytes))
                self._met.add(storage.key)
        return Measured(views, tuple(private))

    def _is_in_store(self, storage: Storage) -> bool:
        return storage.address is not None and around(*storage.extent, self._store) is not None


def _storages_below(part: Any, path: str) -> Iterator[tuple[str, Storage]]:
    for where, obj in paths.walk(part, path):
        if is_tensor_or_array(obj) and is_plain(obj):
            yield where, storage_of(obj)


def _storages_pickled(part: Any) -> Iterator[tuple[str, Storage]]:
    """Storages in programs, composites and C objects. They have no path. Pickling may have created those outside of the store."""
    with contextlib.suppress(Exception):  # a loaded object may not be picklable
        for obj in strip([part], zone=Zone.SHARED, split=Split.NOWHERE).externals:
            if is_tensor_or_array(obj):
                yield "", storage_of(obj)
