"""What does a pipeline share, and what does it copy?

A pipeline is split into two skeletons, and the tensors that they refer to. The *shared* skeleton holds the shared roots: the
values of `shared()` fields, and the modules found elsewhere. It is created once per publication. The *outer* skeleton holds the
pipeline around them, with everything that is copied. It is small, and is created each time the pipeline is passed.

If a mutable object can be reached from both skeletons, two objects would be created from it. Such a pipeline is *entangled*: its
outer skeleton holds everything but the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import numpy as np
import ray
import torch
from torch import nn
from torch.export import ExportedProgram

from zerocopy._compat.cpython import held_by_more_than
from zerocopy._declare.pipeline import fields, is_pipeline_class
from zerocopy._split import paths
from zerocopy._split.ordinary import Stripped
from zerocopy._split.skeleton import Split, strip
from zerocopy._split.zones import Zone
from zerocopy._store.manifest import Handle, Outer, Root, Skeleton
from zerocopy._store.storages import storage_of
from zerocopy._store.tensors import TensorTable, is_tensor_or_array
from zerocopy.errors import ArgumentError, CannotTravelError, DeviceError

SMALL_COMPONENT = 4096  # bytes
_HOLD_NOTHING = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray)


@attrs.frozen(kw_only=True)
class Introspection:
    """Everything that publishing or planning needs to know about a pipeline. It holds the live objects.

    Attributes:
        outer: the outer skeleton.
        shared: the shared skeleton.
        table: the shared tensors and their storages.
        roots: the shared roots.
        root_ends: number of storages in the table after each root.
        payload_ends: bytes of the shared skeleton after each root.
        entangled: the path of an object that can be reached from both sides, or None.
        private_reasons: shared objects that have private memory in every load, and the reasons, by id.
        devices: the devices that fields declare, by storage; None stands for a field that declares none.
        known: the data that is needed to create another outer skeleton.
        mutable: modules, containers and other mutable objects of the shared skeleton.
        composites: shared tensors that were taken apart.
        components: the parts of these tensors. They are kept as long as they may be recognized.
        loose: shared tensors that the pipeline holds outside of modules.
    """

    pipeline: Any
    outer: Outer
    shared: Skeleton
    table: TensorTable
    roots: list[Any]
    root_ends: list[int]
    payload_ends: list[int]
    entangled: str | None
    private_reasons: Mapping[int, tuple[Any, str]]
    devices: dict[int, tuple[str | None, ...]]
    known: Known
    mutable: list[Any]
    composites: list[Any]
    components: list[Any]
    loose: list[Any]


@attrs.frozen
class Known:
    """The data about published weights for the creation of another outer skeleton. Has ids of live objects, no references.

    Attributes:
        tensors: index of each shared tensor, by id.
        storages: index of each shared storage, by key.
        roots: position of each shared root, by id.
        mutable: ids of the mutable objects of the shared skeleton.
        loose: the fingerprint of the roots that are neither modules nor tensors.
        tensor_count: number of shared tensors.
        storage_count: number of shared storages.
        whole: whether the outer skeleton always holds everything but the tensors.
    """

    tensors: dict[int, int]
    storages: dict[object, int]
    roots: dict[int, int]
    mutable: frozenset[int]
    loose: tuple[object, ...]
    tensor_count: int
    storage_count: int
    whole: bool


class UnknownRoot(Exception):
    """The pipeline has a shared root that its publication does not hold, or holds in another form."""


@attrs.frozen
class Subject:
    """A pipeline, and how to publish it.

    Attributes:
        copied: attributes to treat as `copied()` fields, in addition to the fields that its class declares.
        replaced: objects to publish instead of others, by the id of the others.
        to_eval: modules inside that every load puts into eval mode.
    """

    pipeline: Any
    copied: Collection[str] = ()
    replaced: Mapping[int, Any] = attrs.field(factory=dict)
    to_eval: Sequence[Any] = ()

    def strip(self, split: Split) -> Stripped:
        """Split the pipeline, and the list of modules to put into eval mode (if there are any), from their tensors."""
        objects = [self.pipeline, *([list(self.to_eval)] if self.to_eval else [])]
        copied = {id(self.pipeline): self.copied}
        return strip(objects, zone=Zone.AUTO, split=split, within=self.pipeline, copied=copied, replaced=self.replaced)


def check_pipeline(obj: object, what: str) -> None:
    """Check that `obj` can be published: its class declares what is shared, or it holds models anywhere.

    Raises:
        ArgumentError: `obj` is a class, or holds nothing to share.
        CannotTravelError: an object inside cannot leave the process. The error names its path.
    """
    if isinstance(obj, type):
        raise ArgumentError(
            f"{what} expects an instance, got the class {obj.__name__!r}.", hint="make an instance of it."
        )
    if isinstance(obj, ray.ObjectRef):
        raise ArgumentError(
            f"{what} expects a model or an object that holds some, got an ObjectRef.",
            hint="pass the object that ray.get() returns.",
        )
    if isinstance(obj, Handle):
        raise ArgumentError(
            f"{what} expects a model or an object that holds some, got a publication.",
            hint="pass the pipeline that its load() returns, or use the publication as it is.",
        )
    if is_pipeline_class(type(obj)) or paths.is_module(obj) or isinstance(obj, ExportedProgram):
        return
    if isinstance(obj, _HOLD_NOTHING) or not Subject(obj).strip(Split.ROOTS).roots:
        raise ArgumentError(
            f"{what} found no model to share in this {type(obj).__name__!r}.",
            hint="give an nn.Module, or an object that holds some; tensors and arrays outside of modules are shared by the "
            "shared() fields of a class marked with @zerocopy.pipeline. Files of weights are for "
            "zerocopy.publish_checkpoint(build, files).",
        )


def introspect(subject: Subject) -> Introspection:
    """Split a pipeline into its skeletons and its tensors. Nothing is written anywhere.

    Raises:
        CannotTravelError: an object inside cannot leave the process. The error names its path.
        DeviceError: two fields that share memory declare different devices.
    """
    pipeline = subject.pipeline
    if is_pipeline_class(type(pipeline)):
        fields(type(pipeline))  # refuses stray declarations before anything is pickled
    first = subject.strip(Split.ROOTS)
    shared = strip(first.roots, zone=Zone.SHARED, split=Split.NOWHERE, within=pipeline, replaced=subject.replaced)
    table, root_ends = _tabulate(shared)
    entangled = _entanglement(subject, first, shared)
    loose = _look_outside_of_modules(pipeline, first.roots)
    known = Known(
        tensors=table.index,
        storages=table.storage_index,
        roots={id(root): position for position, root in enumerate(first.roots)},
        mutable=_lasting(shared.seen) - set(subject.replaced) if entangled is None else frozenset(),
        loose=loose.fingerprint,
        tensor_count=len(table.specs),
        storage_count=len(table.storages),
        whole=entangled is not None,
    )
    externals = _encode(shared.externals, table, known, whole=True)
    return Introspection(
        pipeline=pipeline,
        outer=_outer_of(subject, known, first),
        shared=Skeleton(shared.payload, externals, len(first.roots)),
        table=table,
        roots=first.roots,
        root_ends=root_ends,
        payload_ends=shared.payload_ends,
        entangled=entangled,
        private_reasons=shared.private_reasons,
        devices=_declared_devices(pipeline, table),
        known=known,
        mutable=list(shared.seen.values()),
        composites=shared.composites,
        components=shared.components,
        loose=loose.tensors,
    )


def make_outer(pipeline: Any, known: Known) -> tuple[Outer, list[Any]]:
    """The present outer skeleton of `pipeline` over published weights, and the shared tensors outside of modules.

    Raises:
        UnknownRoot: the weights do not hold a module or a shared value that the pipeline has now.
        CannotTravelError: a copied object cannot leave the process.
    """
    subject = Subject(pipeline)
    stripped = subject.strip(Split.ROOTS)
    loose = _look_outside_of_modules(pipeline, stripped.roots)
    if not all(id(root) in known.roots for root in stripped.roots) or loose.fingerprint != known.loose:
        raise UnknownRoot
    return _outer_of(subject, known, stripped), loose.tensors


def _outer_of(subject: Subject, known: Known, stripped: Stripped) -> Outer:
    whole = known.whole or not known.mutable.isdisjoint(stripped.seen)
    if whole:
        stripped = subject.strip(Split.NOWHERE)
    private = TensorTable(known.storages, known.storage_count)
    externals = _encode(stripped.externals, private, known, whole=whole)
    storages = tuple(storage.to_bytes().tobytes() for storage in private.storages)
    skeleton = Skeleton(stripped.payload, externals, len(stripped.ends))
    return Outer(skeleton, tuple(private.specs), storages)


def _encode(externals: Sequence[Any], table: TensorTable, known: Known, *, whole: bool) -> tuple[Any, ...]:
    """Externals as they travel. Tensors that are not in `known` are added to `table`, and numbered after those in `known`."""
    encoded: list[Any] = []
    for obj in externals:
        if id(obj) in known.tensors and is_tensor_or_array(obj):
            encoded.append(known.tensors[id(obj)])
        elif id(obj) in known.roots and not whole:
            encoded.append(Root(known.roots[id(obj)]))
        elif is_tensor_or_array(obj):
            encoded.append(known.tensor_count + table.add(obj))
        else:
            encoded.append(obj)
    return tuple(encoded)


class _Loose(NamedTuple):
    """What a pipeline shares outside of modules.

    Attributes:
        fingerprint: changes with the shared roots that are neither modules nor tensors: dicts, lists, objects of any class.
        tensors: tensors and arrays that are roots or inside such roots, without those that pickling created.
    """

    fingerprint: tuple[object, ...]
    tensors: list[Any]


def _look_outside_of_modules(pipeline: Any, roots: Sequence[Any]) -> _Loose:
    """Roots that are neither modules nor tensors have no version counter. So they are pickled again, down to these."""
    tensors = [root for root in roots if is_tensor_or_array(root)]
    loose = [root for root in roots if not isinstance(root, nn.Module) and not is_tensor_or_array(root)]
    if not loose:
        return _Loose((), tensors)
    stripped = strip(loose, zone=Zone.SHARED, split=Split.ROOTS, within=pipeline)
    components = set(map(id, stripped.components))
    parts = (_content(obj) if id(obj) in components else id(obj) for obj in stripped.externals)
    inside = [obj for obj in stripped.externals if is_tensor_or_array(obj) and id(obj) not in components]
    return _Loose((stripped.payload, tuple(map(id, loose)), *parts), [*tensors, *inside, *stripped.composites])


def _content(component: Any) -> object:
    """The value to compare a component by: for a small one its bytes, because each pickling may create it again."""
    source = storage_of(component)
    return source.to_bytes().tobytes() if source.nbytes <= SMALL_COMPONENT else source.key


def _tabulate(shared: Stripped) -> tuple[TensorTable, list[int]]:
    """The shared tensors, and the number of storages in the table after each root."""
    table = TensorTable()
    root_ends = []
    start = 0
    for end in shared.ends:
        for obj in shared.externals[start:end]:
            if id(obj) in shared.shared:
                table.add(obj)
        root_ends.append(len(table.storages))
        start = end
    return table, root_ends


def _entanglement(subject: Subject, outer: Stripped, shared: Stripped) -> str | None:
    """The path of an object that would be in both skeletons, or None."""
    pipeline, name = subject.pipeline, paths.name_of(subject.pipeline)
    if shared.has_pipeline:
        starts = paths.paths_to(pipeline, outer.roots, name)
        below = (found for root in outer.roots for found in paths.walk(root, starts.get(id(root), name)))
        return next((path for path, obj in below if is_pipeline_class(type(obj))), name)
    common = outer.seen.keys() & shared.seen.keys() - set(subject.replaced)
    if not common:
        return None
    walked = paths.walk(pipeline, name)
    return next((path for path, obj in walked if id(obj) in common and outer.seen[id(obj)] is obj), name)


def _lasting(seen: dict[int, Any]) -> frozenset[int]:
    """Ids of the objects in `seen` that exist after the pickling. Reducers created the others during the pickling.

    Only `seen` holds the others, and perhaps one other object that a reducer created.
    """
    return held_by_more_than(2, seen)


def _declared_devices(pipeline: Any, table: TensorTable) -> dict[int, tuple[str | None, ...]]:
    """The declared devices of the shared fields that reach each storage, if at least one of these fields declares a device."""
    if not is_pipeline_class(type(pipeline)):
        return {}
    declared = fields(type(pipeline))
    if not any(field.device for field in declared.values()):
        return {}
    devices: dict[int, dict[str, str | None]] = {}
    for field_name, value in paths.attributes_of(pipeline).items():
        field = declared.get(field_name)
        try:
            below = strip([value], zone=Zone.SHARED, split=Split.NOWHERE).externals
        except CannotTravelError:  # the class does not pickle this attribute
            continue
        device = field.device if field is not None and field.policy == "shared" else None
        for index in {table.index[id(obj)] for obj in below if id(obj) in table.index}:
            devices.setdefault(table.specs[index].storage, {})[field_name] = device
    for storage_devices in devices.values():
        _check_one_device(storage_devices, paths.name_of(pipeline))
    return {
        storage: tuple(dict.fromkeys(by_field.values()))
        for storage, by_field in devices.items()
        if any(by_field.values())
    }


def _check_one_device(by_field: dict[str, str | None], name: str) -> None:
    declared = {device: field for field, device in by_field.items() if device is not None}
    if len(declared) > 1:
        (one, first), (two, second), *_ = declared.items()
        raise DeviceError(
            f"Fields {first!r} and {second!r} of {name} share memory but declare the devices {one!r} and {two!r}.",
            hint="give these fields one device=.",
        )
