"""How do weights go from safetensors files to the store without passing through private memory?

The files are mapped; tensors over the mapping are published shard by shard, and the pages of a shard are dropped when it is
written.
"""

from __future__ import annotations

import contextlib
import glob
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import nn

from zerocopy._compat.linux import drop_pages
from zerocopy._load.publication import Publication
from zerocopy._publish.publish import put_once
from zerocopy._publish.weights import Streamed
from zerocopy._split.introspect import Subject, check_pipeline, introspect
from zerocopy._split.models import models_of
from zerocopy._split.paths import is_module
from zerocopy._store import object_store
from zerocopy._store.storages import Storage, storage_of
from zerocopy._store.tensors import like
from zerocopy.errors import CheckpointError

PathLike: TypeAlias = str | os.PathLike[str]
Tensors: TypeAlias = Mapping[str, torch.Tensor]  # of the files, by name: views of the mapped files
Targets: TypeAlias = dict[str, tuple[dict[str, Any], str]]  # where a module holds what its state dict has under a name


@attrs.frozen
class Checkpoint:
    """A pipeline over files, and how to read them.

    Attributes:
        build: as the argument of `publish_checkpoint`.
        files: paths and patterns.
        dtype: as the argument.
    """

    build: Callable[[], Any]
    files: tuple[str, ...]
    dtype: torch.dtype | None

    def open(self) -> Streamed:
        """Map the files and make the pipeline over them.

        Raises:
            CheckpointError, ArgumentError, CannotTravelError: as `publish_checkpoint`.
        """
        tensors = _read(self.files)
        with _parameters_on_meta():
            pipeline = self.build()
        check_pipeline(pipeline, "zerocopy.publish_checkpoint")
        targets = _targets(pipeline, tensors)
        _check_fit(targets, tensors)
        pages = _Pages()
        _attach(targets, tensors, self.dtype, pages)
        return Streamed(introspect(Subject(pipeline)), pages.fill, pages.drop)


def publish_checkpoint(
    build: Callable[[], Any], files: PathLike | Iterable[PathLike], *, dtype: torch.dtype | None = None
) -> Publication:
    """As the public function, without a name."""
    object_store.require()
    return put_once(Checkpoint(build, paths_of(files), dtype).open())


def paths_of(files: PathLike | Iterable[PathLike]) -> tuple[str, ...]:
    """Paths and patterns as text."""
    every = [files] if isinstance(files, (str, os.PathLike)) else files
    return tuple(os.fspath(path) for path in every)


def _read(patterns: Sequence[str]) -> Tensors:
    tensors: dict[str, torch.Tensor] = {}
    for pattern in patterns:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207 (patterns may be absolute)
        if not paths:
            raise CheckpointError(f"No file matches {pattern!r}.")
        for path in paths:
            found = _read_one(path)
            if twice := sorted(found.keys() & tensors.keys()):
                raise CheckpointError(f"{path!r} has {', '.join(map(repr, twice))} again.")
            tensors.update(found)
    return tensors


def _read_one(path: str) -> Tensors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except OSError as error:
        raise CheckpointError(f"{path!r} cannot be read: {error}.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path!r} is not a safetensors file: {error}.") from None


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Send every parameter to the meta device as soon as a module registers it, as `accelerate.init_empty_weights` does."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta and type(param) is nn.Parameter:
            empty = torch.empty_like(param, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _targets(pipeline: Any, tensors: Tensors) -> Targets:
    models = {"": pipeline} if is_module(pipeline) else models_of(pipeline)
    if len(models) == 1 and not any(name.startswith(f"{path}.") for path in models for name in tensors):
        models = dict(zip([""], models.values(), strict=True))
    targets: Targets = {}
    for path, model in models.items():
        for below, module in model.named_modules(remove_duplicate=False):
            start = "".join(f"{part}." for part in (path, below) if part)
            hidden = module._non_persistent_buffers_set
            for members in (module._parameters, module._buffers):
                held = (name for name, tensor in members.items() if tensor is not None and name not in hidden)
                targets.update({start + name: (members, name) for name in held})
    return targets


def _check_fit(targets: Targets, tensors: Tensors) -> None:
    wanted = {name: members[key] for name, (members, key) in targets.items()}
    present = {id(wanted[name]) for name in tensors.keys() & wanted.keys()}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in present]
    unexpected = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} is {list(tensor.shape)}, not {list(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and wanted[name].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        lists = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lists if names)
        raise CheckpointError(
            f"The files do not fit the pipeline. {told}.", missing=missing, unexpected=unexpected, misshapen=misshapen
        )


def _attach(targets: Targets, tensors: Tensors, dtype: torch.dtype | None, pages: _Pages) -> None:
    """Put tensors over the files in the place of the pipeline's, once for those that are tied."""
    made: dict[int, tuple[Any, Any]] = {}  # with the old one, which stays alive: no id is used twice
    for name in sorted(targets, key=lambda name: name not in tensors):
        members, key = targets[name]
        old = members[key]
        if id(old) not in made:
            made[id(old)] = like(old, pages.tensor(tensors[name], dtype)), old
        members[key] = made[id(old)][0]


class _Pages:
    """Memory that is filled just before it is written to the store, and dropped afterwards."""

    def __init__(self) -> None:
        self._ours: set[object] = set()  # keys of the storages over files, and over memory to convert into
        self._converted: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensor(self, source: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """`source`, which is a view of a file, or a tensor that it will be converted into."""
        if dtype in (None, source.dtype) or not source.is_floating_point() or not source.numel():
            self._ours.add(storage_of(source).key)
            return source
        memory = mmap.mmap(-1, math.prod(source.shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=dtype).view(source.shape)
        key = storage_of(tensor).key
        self._ours.add(key)
        self._converted[key] = tensor, source
        return tensor

    def fill(self, storages: Sequence[Storage]) -> None:
        for storage in storages:
            if storage.key in self._converted:
                tensor, source = self._converted[storage.key]
                tensor.copy_(source)
                drop_pages(source.data_ptr(), source.nbytes)

    def drop(self, storages: Sequence[Storage]) -> None:
        for storage in storages:
            if storage.key in self._ours and storage.address is not None:
                # What is in a file can be read again, and what was converted is in the store.
                drop_pages(storage.address, storage.nbytes)
