"""How does a pipeline take its tensors from files? Through `load_state_dict` of each module. Ties and classes stay the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from zerocopy._compat.cpython import warn_caller
from zerocopy._publish.files import Content
from zerocopy._publish.fit import Misfit, Rules, find_head, told_of_head, with_head
from zerocopy._publish.pages import Pages
from zerocopy._split.models import models_of
from zerocopy._split.paths import is_module
from zerocopy._store.tensors import like
from zerocopy.errors import CheckpointError, CheckpointWarning


class Member(NamedTuple):
    """A tensor that a module holds: its name in the state dict, and the dict and the key that hold it."""

    name: str
    held_in: dict[str, Any]
    key: str
    tensor: torch.Tensor


def all_models(pipeline: Any) -> Mapping[str, Any]:
    """The models of a pipeline by their paths. A module has the empty path."""
    return {"": pipeline} if is_module(pipeline) else models_of(pipeline)


def modules_of(pipeline: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, nn.Module]:
    """The models of a pipeline by prefix of their names. If there is one model and no name has its path, the prefix is empty."""
    modules = {path: model for path, model in all_models(pipeline).items() if _takes_state(model)}
    if len(modules) == 1 and not any(name.startswith(f"{path}.") for path in modules for name in tensors):
        return dict(zip([""], modules.values(), strict=True))
    return {f"{path}." if path else "": module for path, module in modules.items()}


def _takes_state(model: Any) -> bool:
    return is_module(model) and not isinstance(model, torch.jit.ScriptModule)  # TorchScript brings its own weights


def members_of(modules: Mapping[str, nn.Module]) -> list[Member]:
    return [
        Member(start + (f"{below}." if below else "") + key, held_in, key, tensor)
        for start, module in modules.items()
        for below, part in module.named_modules(remove_duplicate=False)
        for held_in in (part._parameters, part._buffers)
        for key, tensor in held_in.items()
        if tensor is not None
    ]


def take(
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
        CheckpointError: the files do not fit.
    """
    wanted = {
        start + name: value
        for start, module in modules.items()
        for name, value in module.state_dict(keep_vars=True).items()
    }
    shapes = {name: value.shape for name, value in wanted.items() if isinstance(value, torch.Tensor)}
    given = rules.renamed(content.tensors)
    head = None if given.keys() == wanted.keys() else find_head(given, shapes)
    given = given if head is None else with_head(given, head, wanted)
    others = [name for name in content.others if not rules.ignores(name)]
    found = _taken(kind, modules, given, wanted, shapes)
    hidden = {member.name for member in members} - wanted.keys()  # buffers that are in no state dict
    misfit = Misfit(
        _not_ignored(found.missing, _tied(members), modules, "_keys_to_ignore_on_load_missing", rules),
        [*_not_ignored(found.unexpected, hidden, modules, "_keys_to_ignore_on_load_unexpected", rules), *others],
        found.misshapen,
    )
    if misfit.misshapen or (misfit and rules.strict):
        raise misfit.error(kind, head)
    if is_told and head is not None:
        rename = {head[0]: head[1]}
        warn_caller(f"{told_of_head(head)} Hint: pass rename={rename!r} to silence this warning.", CheckpointWarning)
    if is_told and misfit:
        warn_caller(
            f"The files do not fit this {kind}, which strict=False accepts: {misfit.told()}.", CheckpointWarning
        )


def _taken(
    kind: str,
    modules: Mapping[str, nn.Module],
    given: Mapping[str, torch.Tensor],
    wanted: Collection[str],
    shapes: Mapping[str, torch.Size],
) -> Misfit:
    """Load the given tensors into the modules. Returns what did not fit, as each module reports it."""
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
        except RuntimeError as error:
            if not misshapen:  # a module refused for another reason
                raise CheckpointError(f"The files do not fit this {kind}: {' '.join(str(error).split())}") from error
            missing += [name for name in wanted if name.startswith(start) and name not in given]
            unexpected += [start + name for name in own if start + name not in wanted]
        else:
            missing += [start + name for name in told.missing_keys]
            unexpected += [start + name for name in told.unexpected_keys]
    return Misfit(missing, unexpected, misshapen)


def _tied(members: Sequence[Member]) -> set[str]:
    """Names of the tensors that were loaded, under this name or under the name of a tied tensor."""
    came = {id(member.tensor) for member in members if member.held_in[member.key] is not member.tensor}
    return {member.name for member in members if id(member.tensor) in came}


def _not_ignored(
    names: Sequence[str], also: Collection[str], modules: Mapping[str, nn.Module], attribute: str, rules: Rules
) -> list[str]:
    """Names that are not in `also`, and that neither the user nor a model ignores.

    Models of transformers have two attributes with patterns of such names:
    https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py.
    """
    patterns = [
        (start, pattern) for start, module in modules.items() for pattern in getattr(module, attribute, None) or ()
    ]

    def is_ignored(name: str) -> bool:
        own = (name.startswith(start) and re.search(pattern, name.removeprefix(start)) for start, pattern in patterns)
        return name in also or rules.ignores(name) or any(own)

    return [name for name in names if not is_ignored(name)]


def settle(members: Sequence[Member], pages: Pages) -> None:
    """Give the tensors over the files the class, the attributes and the ties of the tensors that they replace.

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


def tell_of_dtypes(kind: str, members: Sequence[Member]) -> None:
    """Warn once if dtypes in the files differ from those of the built model. A plain `load_state_dict` would convert them."""
    pairs = [(member.tensor.dtype, member.held_in[member.key].dtype) for member in members]
    differing = [(built, found) for built, found in pairs if built != found and found.is_floating_point]
    if differing:
        built, found = differing[0]
        warn_caller(
            f"{len(differing)} tensors of this {kind} are {found}, as in the files; it was built with {built}. Hint: "
            f"pass dtype={found} or dtype={built} to silence this warning.",
            CheckpointWarning,
        )
