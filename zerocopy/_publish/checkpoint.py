"""How do weights go from safetensors files to the store without passing through private memory.

The files are mapped; tensors over the mapping are published shard by shard, and the pages of a shard are let go of when it is
written. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from zerocopy._load.publication import Publication
from zerocopy._publish.publish import put_once
from zerocopy._split.introspect import Subject, check_pipeline, introspect
from zerocopy._split.models import models_of
from zerocopy._split.paths import is_module
from zerocopy._store import object_store
from zerocopy._store.tensors import Storage, like, storage_of
from zerocopy.errors import CheckpointError

PathLike: TypeAlias = str | os.PathLike[str]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}  # fmt: skip


class _Entry(NamedTuple):
    """A tensor of a file, and where its bytes are in the mapping of it."""

    memory: mmap.mmap
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def tensor(self) -> torch.Tensor:
        """A view of the mapping."""
        if self.start == self.end:
            return torch.empty(self.shape, dtype=self.dtype)
        count = (self.end - self.start) // self.dtype.itemsize
        return torch.frombuffer(self.memory, dtype=self.dtype, count=count, offset=self.start).view(self.shape)


Slots: TypeAlias = dict[str, tuple[dict[str, Any], str]]  # where a module holds what its state dict has under a name


def publish_checkpoint(
    build: Callable[[], Any], files: PathLike | Iterable[PathLike], *, dtype: torch.dtype | None = None
) -> Publication:
    """Publish a pipeline whose weights are in safetensors files, without a copy of them in this process.

    Args:
        build: makes the pipeline, as usual. While it runs, parameters are made on the meta device, where they take no
            memory; buffers are made for real.
        files: a path, a pattern such as `"model/*.safetensors"`, or several of them. Names are those of the module's
            `state_dict()`; in a pipeline with several models each after the path of its model, as in
            `encoder.layer.0.weight`. Of tied tensors one name is enough.
        dtype: what floating-point tensors of the files are converted to, None for as they are.

    Returns:
        A publication of the pipeline. Nothing of it stays in this process.

    Raises:
        CheckpointError: there is no such file, or it is not a safetensors file, or the names and shapes in the files are
            not those of the pipeline: all that do not fit are listed.
        ArgumentError: `build` does not make a pipeline or a module.
        CannotTravelError, StoreTooSmallError, RayClientError: as `publish`.
    """
    object_store.require()
    entries = _read(files)
    with _parameters_on_meta():
        pipeline = build()
    check_pipeline(pipeline, "zerocopy.publish_checkpoint")
    slots = _slots(pipeline, entries)
    _require_fit(slots, entries)
    pages = _Pages()
    _attach(slots, entries, dtype, pages)
    return put_once(pipeline, introspect(Subject(pipeline)), pages.fill, pages.drop)


def _read(files: PathLike | Iterable[PathLike]) -> dict[str, _Entry]:
    """The tensors of all files by name."""
    patterns = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    entries: dict[str, _Entry] = {}
    for pattern in [os.fspath(pattern) for pattern in patterns]:
        paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207 (patterns may be absolute)
        if not paths:
            raise CheckpointError(f"No file matches {pattern!r}.")
        for path in paths:
            found = _read_one(path)
            if twice := sorted(found.keys() & entries.keys()):
                raise CheckpointError(f"{path!r} has {', '.join(map(repr, twice))} again.")
            entries.update(found)
    return entries


def _read_one(path: str) -> dict[str, _Entry]:
    try:
        with Path(path).open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        (length,) = struct.unpack("<Q", memory[:8])
        header = json.loads(memory[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _entry(memory, 8 + length, **described) for name, described in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path!r} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path!r} is not a safetensors file: {error}.") from None


def _entry(memory: mmap.mmap, data: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> _Entry:
    start, end = data_offsets
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize or data + end > len(memory):
        raise ValueError("its header does not fit its size")
    return _Entry(memory, _DTYPES[dtype], tuple(shape), data + start, data + end)


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


def _slots(pipeline: Any, entries: Mapping[str, _Entry]) -> Slots:
    models = {"": pipeline} if is_module(pipeline) else models_of(pipeline)
    if len(models) == 1 and not any(name.startswith(f"{path}.") for path in models for name in entries):
        models = dict(zip([""], models.values(), strict=True))
    slots: Slots = {}
    for path, model in models.items():
        for below, module in model.named_modules(remove_duplicate=False):
            start = "".join(f"{part}." for part in (path, below) if part)
            hidden = module._non_persistent_buffers_set
            for members in (module._parameters, module._buffers):
                held = (name for name, tensor in members.items() if tensor is not None and name not in hidden)
                slots.update({start + name: (members, name) for name in held})
    return slots


def _require_fit(slots: Slots, entries: Mapping[str, _Entry]) -> None:
    tensors = {name: members[key] for name, (members, key) in slots.items()}
    present = {id(tensors[name]) for name in entries.keys() & tensors.keys()}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in present]
    unexpected = [name for name in entries if name not in tensors]
    misshapen = [
        f"{name} is {list(entry.shape)}, not {list(tensors[name].shape)}"
        for name, entry in entries.items()
        if name in tensors and tuple(tensors[name].shape) != entry.shape
    ]
    if missing or unexpected or misshapen:
        lists = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lists if names)
        raise CheckpointError(
            f"The files do not fit the pipeline. {told}.", missing=missing, unexpected=unexpected, misshapen=misshapen
        )


def _attach(slots: Slots, entries: Mapping[str, _Entry], dtype: torch.dtype | None, pages: _Pages) -> None:
    """Put tensors over the files in the place of the pipeline's, once for those that are tied."""
    made: dict[int, tuple[Any, Any]] = {}
    for name in [name for name in slots if name in entries] + [name for name in slots if name not in entries]:
        members, key = slots[name]
        old = members[key]
        if id(old) not in made:
            made[id(old)] = (
                like(old, pages.tensor(entries[name], dtype)),
                old,
            )  # the old one alive: no id is used twice
        members[key] = made[id(old)][0]


class _Pages:
    """Memory that is filled when it is about to be written to the store, and let go of afterwards."""

    def __init__(self) -> None:
        self._mapped: dict[object, tuple[mmap.mmap, int, int]] = {}
        self._converted: dict[object, tuple[torch.Tensor, _Entry]] = {}

    def tensor(self, entry: _Entry, dtype: torch.dtype | None) -> torch.Tensor:
        """A tensor over the bytes of a file, or over memory in which they will be converted."""
        if dtype in (None, entry.dtype) or not entry.dtype.is_floating_point or entry.start == entry.end:
            tensor = entry.tensor()
            self._mapped[_key(tensor)] = entry.memory, entry.start, entry.end
            return tensor
        nbytes = math.prod(entry.shape) * dtype.itemsize
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=dtype).view(entry.shape)
        self._mapped[_key(tensor)] = memory, 0, nbytes
        self._converted[_key(tensor)] = tensor, entry
        return tensor

    def fill(self, storages: Sequence[Storage]) -> None:
        for storage in storages:
            if storage.key in self._converted:
                tensor, entry = self._converted[storage.key]
                tensor.copy_(entry.tensor())
                _let_go(entry.memory, entry.start, entry.end)

    def drop(self, storages: Sequence[Storage]) -> None:
        for storage in storages:
            if storage.key in self._mapped:
                _let_go(*self._mapped[storage.key])


def _let_go(memory: mmap.mmap, start: int, end: int) -> None:
    """Take pages out of this process: what is in a file can be read again, what was converted is in the store."""
    first = start - start % mmap.PAGESIZE
    memory.madvise(mmap.MADV_DONTNEED, first, end - first)


def _key(tensor: torch.Tensor) -> object:
    return storage_of(tensor).key
