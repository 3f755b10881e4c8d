"""How do weights go from files to the store without passing through private memory?

The files are mapped; tensors over the mapping are published shard by shard, and the pages of a shard are dropped when it is
written. Which tensor goes where is for each module to say, by its own `load_state_dict`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import attrs
import torch
from torch import nn

from zerocopy._compat.cpython import warn_caller
from zerocopy._compat.linux import drop_pages
from zerocopy._load.partial import names_of
from zerocopy._load.publication import Publication
from zerocopy._publish import files
from zerocopy._publish.files import Content
from zerocopy._publish.fit import Misfit, Rename, Rules, check_rename, find_head, told_of_head, with_head
from zerocopy._publish.publish import put_once
from zerocopy._publish.weights import Streamed
from zerocopy._split.introspect import Subject, check_pipeline, introspect
from zerocopy._split.models import models_in_train_mode, models_of
from zerocopy._split.paths import is_module
from zerocopy._store import object_store
from zerocopy._store.storages import Storage, storage_of
from zerocopy._store.tensors import like
from zerocopy.errors import ArgumentError, CheckpointError, CheckpointWarning

PathLike: TypeAlias = str | os.PathLike[str]
Files: TypeAlias = PathLike | Iterable[PathLike] | Mapping[str, PathLike | Iterable[PathLike]]


class Member(NamedTuple):
    """A tensor that a module holds, and where: the names of its state dict, and the dict with the key in it."""

    name: str
    held_in: dict[str, Any]
    key: str
    tensor: torch.Tensor


@attrs.frozen(kw_only=True)
class Checkpoint:
    """A pipeline over files, and how to read them. Made by `checkpoint_of`.

    Attributes:
        build: as the argument of `publish_checkpoint`.
        sources: what goes before the names, and where the files are.
        dtype: as the argument.
        key: as the argument.
        rules: on names.
        train: as the argument.
    """

    build: Callable[[], Any]
    sources: tuple[tuple[str, str], ...]
    dtype: torch.dtype | None
    key: str | None
    rules: Rules
    train: bool

    def open(self) -> Streamed:
        """Map the files and make the pipeline over them.

        Raises:
            CheckpointError, ArgumentError, CannotTravelError: as `publish_checkpoint`.
        """
        content = files.read(self.sources, self.key)
        pages = _Pages(content.mapped, self.dtype)
        pipeline, missing, made = self._attached(content, pages, frozenset())
        if missing:  # once more, with memory for those that no file gives
            wanted = frozenset(made[id(member.tensor)] for member in missing if id(member.tensor) in made)
            pages = _Pages(content.mapped, self.dtype)
            pipeline, missing, _ = self._attached(content, pages, wanted)
            if missing:
                names = [member.name for member in missing]
                raise CheckpointError(
                    f"{names[0]!r} of {type(pipeline).__name__} is in no file, and the function that builds the model leaves "
                    "it on the meta device, where it has no values.",
                    hint="compute it there on the CPU from plain numbers, not from parameters of the model.",
                    missing=names,
                )
        if not self.train:
            for module in models_in_train_mode(pipeline):
                module.eval()
        return Streamed(introspect(Subject(pipeline)), pages.fill, pages.drop)

    def _attached(
        self, content: Content, pages: _Pages, real: frozenset[int]
    ) -> tuple[Any, list[Member], dict[int, int]]:
        """The pipeline over the files; what of it is still on the meta device; and which parameter was made when, by id."""
        with _parameters_on_meta(real) as made:
            pipeline = self.build()
        check_pipeline(pipeline, "zerocopy.publish_checkpoint")
        modules = _modules_of(pipeline, content.tensors)
        members = _members_of(modules)
        _load(type(pipeline).__name__, modules, members, content, self.rules, is_told=not real)
        _settle(members, pages)
        if self.dtype is None and not real:
            _tell_of_dtypes(type(pipeline).__name__, members)
        missing = [member for member in members if member.held_in[member.key].is_meta]
        return pipeline, missing, {id(tensor): number for number, tensor in enumerate(made)}


def checkpoint_of(
    build: Callable[[], Any],
    paths: Files,
    *,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    ignore: str | Iterable[str] = (),
    rename: Rename | None = None,
    key: str | None = None,
    train: bool = False,
) -> Checkpoint:
    """What a user asks for, checked.

    Raises:
        ArgumentError: an argument is of another kind.
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
    """What goes before the names in files, and where these are, as absolute paths: other processes may read them."""
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
    """As the public function, without a name."""
    object_store.require()
    return put_once(checkpoint.open())


@contextlib.contextmanager
def _parameters_on_meta(real: frozenset[int]) -> Iterator[list[nn.Parameter]]:
    """Send parameters to the meta device as soon as a module registers them, as `accelerate.init_empty_weights` does.

    Gives the list of them, which grows. Those whose numbers in it are in `real` keep their memory.
    """
    register = nn.Module.register_parameter
    made: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []  # they are registered again where they are tied

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or param.is_meta or type(param) is not nn.Parameter:
            return
        if any(param is one for one in kept):
            return
        if len(made) in real:
            kept.append(param)
        else:
            empty = torch.empty_like(param, device="meta")
            param = module._parameters[name] = nn.Parameter(empty, requires_grad=param.requires_grad)
        made.append(param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield made
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _modules_of(pipeline: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """The models of a pipeline, by what their names begin with: nothing, where there is one that no name tells."""
    models = {"": pipeline} if is_module(pipeline) else models_of(pipeline)
    modules = {path: model for path, model in models.items() if _takes_state(model)}
    if len(modules) == 1 and not any(name.startswith(f"{path}.") for path in modules for name in tensors):
        return dict(zip([""], modules.values(), strict=True))
    return {f"{path}." if path else "": module for path, module in modules.items()}


def _takes_state(model: Any) -> bool:
    return is_module(model) and not isinstance(model, torch.jit.ScriptModule)  # which brings its own weights


def _members_of(modules: Mapping[str, nn.Module]) -> list[Member]:
    return [
        Member(start + (f"{below}." if below else "") + key, held_in, key, tensor)
        for start, module in modules.items()
        for below, part in module.named_modules(remove_duplicate=False)
        for held_in in (part._parameters, part._buffers)
        for key, tensor in held_in.items()
        if tensor is not None
    ]


def _load(
    kind: str,
    modules: Mapping[str, nn.Module],
    members: Sequence[Member],
    content: Content,
    rules: Rules,
    *,
    is_told: bool,
) -> None:
    """Let each module take its tensors from the files.

    Raises:
        CheckpointError: they do not fit.
    """
    states = {start: module.state_dict(keep_vars=True) for start, module in modules.items()}
    wanted = {start + name: value for start, state in states.items() for name, value in state.items()}
    shapes = {name: value.shape for name, value in wanted.items() if isinstance(value, torch.Tensor)}
    given = rules.renamed(content.tensors)
    head = None if given.keys() == wanted.keys() else find_head(given, shapes)
    given = given if head is None else with_head(given, head, wanted)
    others = [name for name in content.others if not rules.ignores(name)]
    misfit = _without_what_may_be(_taken(kind, modules, given, shapes), modules, members, rules, others)
    if misfit.misshapen or (misfit and rules.strict):
        raise misfit.error(kind, head)
    if is_told and head is not None:
        rename = {head[0]: head[1]}
        warn_caller(f"{told_of_head(head)} Hint: with rename={rename!r} you say so yourself.", CheckpointWarning)
    if is_told and misfit:
        warn_caller(
            f"The files do not fit this {kind}, which strict=False accepts: {misfit.told()}.", CheckpointWarning
        )


def _taken(
    kind: str,
    modules: Mapping[str, nn.Module],
    given: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
) -> Misfit:
    """Load what is given into the modules. Also what did not fit, as each module says."""
    missing = list[str]()
    unexpected = [name for name in given if not any(name.startswith(start) for start in modules)]
    misshapen = [
        f"{name} is {list(tensor.shape)}, not {list(shapes[name])}"
        for name, tensor in given.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    for start, module in modules.items():
        own = {name.removeprefix(start): tensor for name, tensor in given.items() if name.startswith(start)}
        try:
            told = module.load_state_dict(own, strict=False, assign=True)
            lacks, has = told.missing_keys, told.unexpected_keys
        except RuntimeError as error:
            if not misshapen:  # a module has a reason of its own
                raise CheckpointError(f"The files do not fit this {kind}: {error}.") from error
            state = module.state_dict()
            lacks, has = [name for name in state if name not in own], [name for name in own if name not in state]
        missing += [start + name for name in lacks]
        unexpected += [start + name for name in has]
    return Misfit(missing, unexpected, misshapen)


def _without_what_may_be(
    misfit: Misfit,
    modules: Mapping[str, nn.Module],
    members: Sequence[Member],
    rules: Rules,
    others: Sequence[str],
) -> Misfit:
    """What is left of a misfit without ties, buffers that no state dict has, and what the user or the model itself ignores.

    Models of transformers say so by two attributes, as patterns:
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py.
    """
    satisfied = {id(member.tensor) for member in members if member.held_in[member.key] is not member.tensor}
    tied = {member.name for member in members if id(member.tensor) in satisfied}
    hidden = {member.name for member in members} - {
        start + name for start, module in modules.items() for name in module.state_dict()
    }

    def is_ignored(name: str, attribute: str) -> bool:
        patterns = (
            (pattern, name.removeprefix(start))
            for start, module in modules.items()
            if name.startswith(start)
            for pattern in getattr(module, attribute, None) or ()
        )
        return rules.ignores(name) or any(re.search(pattern, below) for pattern, below in patterns)

    missing = [name for name in misfit.missing if name not in tied]
    unexpected = [name for name in misfit.unexpected if name not in hidden]
    return Misfit(
        [name for name in missing if not is_ignored(name, "_keys_to_ignore_on_load_missing")],
        [name for name in unexpected if not is_ignored(name, "_keys_to_ignore_on_load_unexpected")] + list(others),
        misfit.misshapen,
    )


def _settle(members: Sequence[Member], pages: _Pages) -> None:
    """Let tensors over the files have the class and the attributes of those that they replace, and be tied as those were.

    Raises:
        CheckpointError: the files have two values for tied tensors.
    """
    ties: dict[int, list[Member]] = defaultdict(list)
    for member in members:
        ties[id(member.tensor)].append(member)
    for tied in ties.values():
        loaded = [member for member in tied if member.held_in[member.key] is not member.tensor]
        if not loaded:
            continue
        first, *more = (member.held_in[member.key].detach() for member in loaded)
        for member, other in zip(loaded[1:], more, strict=True):
            if first.shape != other.shape or not torch.equal(first, other):
                raise CheckpointError(
                    f"The model ties {loaded[0].name!r} and {member.name!r}, but the files have two values for them.",
                    hint="build a model that does not tie them (tie_word_embeddings=False in a config of transformers).",
                )
        made = like(loaded[0].tensor, pages.tensor(first))
        for member in tied:
            member.held_in[member.key] = made


def _tell_of_dtypes(kind: str, members: Sequence[Member]) -> None:
    """Say once where the files have another dtype than the model was built with: `load_state_dict` alone would convert."""
    pairs = [(member.tensor.dtype, member.held_in[member.key].dtype) for member in members]
    differing = [(built, found) for built, found in pairs if built != found and found.is_floating_point]
    if differing:
        built, found = differing[0]
        warn_caller(
            f"{len(differing)} tensors of this {kind} are {found}, as in the files; it was built with {built}. Hint: "
            f"dtype={found} or dtype={built} says so yourself.",
            CheckpointWarning,
        )


class _Pages:
    """Memory that is filled just before it is written to the store, and dropped afterwards."""

    def __init__(self, mapped: Collection[object], dtype: torch.dtype | None) -> None:
        """`mapped`: keys of the storages over files. `dtype`: what floating-point tensors are converted to."""
        self._mapped = mapped
        self._dtype = dtype
        self._used: set[object] = set()  # keys of storages that a tensor of the pipeline has
        self._ours: set[object] = set()  # keys of those over files, and over memory to fill
        self._to_fill: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def tensor(self, source: torch.Tensor) -> torch.Tensor:
        """`source`, if it is a whole storage that no other tensor has; or a tensor that it will be copied into."""
        storage = storage_of(source)
        dtype = self._dtype if self._dtype is not None and source.is_floating_point() else source.dtype
        is_whole = source.nbytes == storage.nbytes and storage.key not in self._used
        self._used.add(storage.key)
        if not source.numel() or (is_whole and dtype == source.dtype):
            if storage.key in self._mapped:
                self._ours.add(storage.key)
            return source
        memory = mmap.mmap(-1, math.prod(source.shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(memory, dtype=dtype).view(source.shape)
        key = storage_of(tensor).key
        self._ours.add(key)
        self._to_fill[key] = tensor, source
        return tensor

    def fill(self, storages: Sequence[Storage]) -> None:
        for storage in storages:
            if storage.key in self._to_fill:
                tensor, source = self._to_fill[storage.key]
                tensor.copy_(source)
                below = storage_of(source)
                if below.key in self._mapped and below.address is not None:
                    drop_pages(below.address, below.nbytes)

    def drop(self, storages: Sequence[Storage]) -> None:
        for storage in storages:
            if storage.key in self._ours and storage.address is not None:
                # What is in a file can be read again, and what was converted is in the store.
                drop_pages(storage.address, storage.nbytes)
