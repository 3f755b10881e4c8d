"""How do weights get from files into the store without a copy in private memory?

The files are mapped. Tensors that are views of the mapping are published shard by shard, and the pages of a shard are dropped
after it is written.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import attrs
import torch
from torch import nn

from zerocopy._load.partial import names_of
from zerocopy._load.publication import Publication
from zerocopy._publish import files
from zerocopy._publish.files import Content
from zerocopy._publish.fit import Rename, Rules, check_rename
from zerocopy._publish.generation import tell_of_generation
from zerocopy._publish.pages import Pages
from zerocopy._publish.publish import put_once
from zerocopy._publish.state import Member, all_models, members_of, modules_of, settle, take, tell_of_dtypes
from zerocopy._publish.weights import Streamed
from zerocopy._split.introspect import Subject, check_pipeline, introspect
from zerocopy._split.models import models_in_train_mode
from zerocopy._store import object_store
from zerocopy.errors import ArgumentError, CheckpointError

PathLike: TypeAlias = str | os.PathLike[str]
Files: TypeAlias = PathLike | Iterable[PathLike] | Mapping[str, PathLike | Iterable[PathLike]]


@attrs.frozen(kw_only=True)
class Checkpoint:
    """A pipeline with weights in files, and how to read them. Created by `checkpoint_of`.

    Attributes:
        build: as the argument of `publish_checkpoint`.
        sources: for each source, the prefix of its names, and the path of its files.
        dtype: as the argument.
        key: as the argument.
        rules: the rules for names.
        train: as the argument.
    """

    build: Callable[[], Any]
    sources: tuple[tuple[str, str], ...]
    dtype: torch.dtype | None
    key: str | None
    rules: Rules
    train: bool

    def open(self) -> Streamed:
        """Map the files, and build the pipeline with tensors that are views of them.

        Raises:
            CheckpointError, ArgumentError, CannotTravelError: as `publish_checkpoint`.
        """
        content = files.read(self.sources, self.key)
        pages = Pages(content.mapped, self.dtype)
        pipeline, missing, made = self._attached(content, pages, frozenset())
        if missing:  # build again, with memory for the parameters that are in no file
            wanted = frozenset(made[id(member.tensor)] for member in missing if id(member.tensor) in made)
            pages = Pages(content.mapped, self.dtype)
            pipeline, missing, _ = self._attached(content, pages, wanted)
            if missing:
                names = [member.name for member in missing]
                raise CheckpointError(
                    f"{names[0]!r} of {type(pipeline).__name__} is in no file, and the function that builds the model leaves "
                    "it on the meta device, where it has no values.",
                    hint="compute it there on the CPU from plain numbers, not from parameters of the model.",
                    missing=names,
                )
        tell_of_generation(all_models(pipeline), self.sources)
        if not self.train:
            for module in models_in_train_mode(pipeline):
                module.eval()
        return Streamed(introspect(Subject(pipeline)), pages.fill, pages.drop)

    def _attached(
        self, content: Content, pages: Pages, real: frozenset[int]
    ) -> tuple[Any, list[Member], dict[int, int]]:
        """The pipeline over the files, its members still on the meta device, and the creation number of parameters, by id."""
        with _parameters_on_meta(real) as made:
            pipeline = self.build()
        check_pipeline(pipeline, "zerocopy.publish_checkpoint")
        modules = modules_of(pipeline, content.tensors)
        members = members_of(modules)
        take(type(pipeline).__name__, modules, members, content, self.rules, is_told=not real)
        settle(members, pages)
        if self.dtype is None and not real:
            tell_of_dtypes(type(pipeline).__name__, members)
        missing = [member for member in members if member.held_in[member.key].is_meta]
        return pipeline, missing, {id(tensor): number for number, tensor in enumerate(made)}


def checkpoint_of(
    build: Callable[[], Any],
    paths: Files,
    *,
    dtype: torch.dtype | None,
    strict: bool,
    ignore: str | Iterable[str],
    rename: Rename | None,
    key: str | None,
    train: bool,
) -> Checkpoint:
    """Check the arguments of a user, and return them as a `Checkpoint`.

    Raises:
        ArgumentError: an argument has a wrong type.
    """
    if isinstance(build, nn.Module) or not callable(build):
        kind = type(build).__name__
        hint = (
            f"write `lambda: {kind}(...)`: it is built again here, without memory for its parameters."
            if isinstance(build, nn.Module)
            else "write publish_checkpoint(build, files), where build() makes the model."
        )
        raise ArgumentError(f"publish_checkpoint() expects a function that makes the model, got a {kind}.", hint=hint)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype={dtype!r} is not a dtype of torch.", hint="write dtype=torch.bfloat16, say.")
    check_rename(rename)
    patterns = (ignore,) if isinstance(ignore, str) else names_of(ignore, "ignore")
    rules = Rules(strict, patterns, rename)
    return Checkpoint(build=build, sources=tuple(_sources(paths)), dtype=dtype, key=key, rules=rules, train=train)


def _sources(paths: Files) -> Iterator[tuple[str, str]]:
    """The prefix of names and the absolute path of each source. Paths are absolute because other processes may read them."""
    by_model = paths if isinstance(paths, Mapping) else {"": paths}
    for model, some in by_model.items():
        every = [some] if isinstance(some, (str, os.PathLike)) else some
        if isinstance(every, torch.Tensor) or not isinstance(every, Iterable):
            raise _no_paths(paths)
        for path in every:
            if not isinstance(path, (str, os.PathLike)):
                raise _no_paths(paths)
            yield f"{model}." if model else "", os.path.abspath(path)  # noqa: PTH100 (they may be patterns)


def _no_paths(given: object) -> ArgumentError:
    if isinstance(given, Mapping) and any(isinstance(value, torch.Tensor) for value in given.values()):
        return ArgumentError(
            f"publish_checkpoint() expects paths of files, got a state dict with {len(given)} entries.",
            hint="load it and publish the model: model.load_state_dict(state); zerocopy.publish(model, adopt=True).",
        )
    return ArgumentError(
        f"publish_checkpoint() expects paths of files, got {type(given).__name__!r}.",
        hint="give a folder, an index, a file, a pattern, or several of them.",
    )


def publish_checkpoint(checkpoint: Checkpoint) -> Publication:
    """Like the public function, but without a name."""
    object_store.require()
    return put_once(checkpoint.open())


@contextlib.contextmanager
def _parameters_on_meta(real: frozenset[int]) -> Iterator[list[nn.Parameter]]:
    """Move parameters to the meta device as soon as a module registers them, as `accelerate.init_empty_weights` does.

    Models that other threads build in the meantime keep their memory.

    Yields the list of the parameters, which grows. Parameters whose position in the list is in `real` keep their memory.
    """
    made: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []  # tied parameters are registered again

    def to_meta(module: nn.Module, name: str, param: nn.Parameter) -> None:
        if param.is_meta or type(param) is not nn.Parameter:
            return
        if any(param is one for one in kept):
            return
        if len(made) in real:
            kept.append(param)
        else:
            empty = torch.empty_like(param, device="meta")
            param = module._parameters[name] = nn.Parameter(empty, requires_grad=param.requires_grad)
        made.append(param)

    outer, _in_thread.registered = _in_thread.registered, to_meta
    try:
        with _registration:
            yield made
    finally:
        _in_thread.registered = outer


class _InThread(threading.local):
    """The build that runs in this thread.

    Attributes:
        registered: is called with module, name and parameter after a module has registered a parameter. None if nothing is built.
    """

    registered: Callable[[nn.Module, str, nn.Parameter], None] | None = None


class _Registration:
    """Replaces `nn.Module.register_parameter` as long as any thread builds. The last thread that ends restores the original."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._original = original = nn.Module.register_parameter

                def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
                    original(module, name, param)
                    if param is not None and _in_thread.registered is not None:
                        _in_thread.registered(module, name, param)

                nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                nn.Module.register_parameter = self._original  # type: ignore[method-assign]


_in_thread = _InThread()
_registration = _Registration()
