"""How does a user publish under a name, look a name up, set an alias, and remove a name?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, overload

import torch

from zerocopy._cluster import client, handles, names
from zerocopy._cluster.asked import check_name, check_number, check_source, check_unnamed, commit_of
from zerocopy._cluster.following import WATCHER
from zerocopy._cluster.handles import NamedPublication, Tag, Unresolved, Version
from zerocopy._cluster.recovery import offer_pipeline, packed_checkpoint, packed_source
from zerocopy._cluster.refresh import tag_of
from zerocopy._cluster.writing import Commit, Named
from zerocopy._load.publication import Publication
from zerocopy._publish import publish as unnamed
from zerocopy._publish.checkpoint import Files, checkpoint_of
from zerocopy._publish.checkpoint import publish_checkpoint as unnamed_checkpoint
from zerocopy._publish.fit import Rename
from zerocopy._split.introspect import Subject, check_pipeline
from zerocopy._store import object_store
from zerocopy.errors import ArgumentError

T = TypeVar("T")
TRIES = 4  # each with the next registry, after the last one has ended


@overload
def publish(
    pipeline: T,
    *,
    adopt: bool = ...,
    name: str,
    alias: str | None = ...,
    source: Callable[[], Any] | None = ...,
    expect: int | None = ...,
    keep: int | None = ...,
    lifetime: Literal["cluster", "job"] = ...,
) -> NamedPublication[T]: ...
@overload
def publish(
    pipeline: T,
    *,
    adopt: bool = ...,
    name: str | None = ...,
    alias: str | None = ...,
    source: Callable[[], Any] | None = ...,
    expect: int | None = ...,
    keep: int | None = ...,
    lifetime: Literal["cluster", "job"] = ...,
) -> Publication[T]: ...
def publish(
    pipeline: T,
    *,
    adopt: bool = False,
    name: str | None = None,
    alias: str | None = None,
    source: Callable[[], Any] | None = None,
    expect: int | None = None,
    keep: int | None = None,
    lifetime: Literal["cluster", "job"] = "cluster",
) -> Publication[T]:
    """Put the weights of `pipeline` into the object store, once, and return a small handle to them.

    If the same pipeline is published again and no byte of it has changed, both publications share one set of weights. The
    weights leave the store when the last handle and the last loaded pipeline are gone. Weights with a name stay.

    Args:
        pipeline: an instance of a `@zerocopy.pipeline` class, an `nn.Module`, or another object that holds models.
        adopt: whether to re-point its tensors at the store, each part as soon as it is written, so that this process keeps no
            second copy. Tensors keep their identity and ties, and a write to them stays private. NumPy arrays, TorchScript, and
            memory that another tensor or array views are not moved. After an error, everything is as before.
        name: publish a version of this name. `lookup` finds it in any process of the cluster, also after this process has
            ended. Storages that the cluster already has, under any name, are not written again. If a version with equal content
            exists, no new version is created.
        alias: an alias that points at this version from now on, like "latest".
        source: a function that creates the pipeline again, with the same weights, if they are lost.
        expect: the number of the version that "latest" must point at; 0 if there must be none.
        keep: the number of versions of this name that stay, in addition to those that an alias points at. The default is the
            last value that was given for this name, or 2.
        lifetime: with "job", the name is removed when the Ray job of this process ends.

    Returns:
        A handle. Its `load()` returns the published pipeline. With a name, its `current()` returns the newest version.

    Raises:
        ArgumentError: `pipeline` holds no models, or an argument is invalid.
        VersionConflictError: "latest" does not point at `expect`. Nothing was changed.
        IsolationError: `adopt` is True, but private mappings are not possible here.
        CannotTravelError: an object inside cannot leave the process. The error names its path.
        StoreTooSmallError: the weights are larger than this node's object store.
        StoreFullError: neither the store nor the disk behind it has room.
        RayClientError: this process is connected through Ray Client.
    """
    if not isinstance(adopt, bool):
        raise ArgumentError(f"adopt={adopt!r} is neither True nor False.")
    if name is None:
        check_unnamed(alias, source, expect, keep, lifetime)
        return unnamed.publish(pipeline, adopt=adopt)
    check_pipeline(pipeline, "zerocopy.publish")
    if source is not None:
        check_source(source)
    packed = None if source is None else packed_source(source)
    commit = commit_of(name, packed, alias=alias, expect=expect, keep=keep, lifetime=lifetime)
    subject = Subject(pipeline)

    def publish_to(target: Named) -> Publication:
        publication = unnamed.publish_subject(subject, pipeline, adopt=adopt, destination=target)
        WATCHER.hold_pipeline(pipeline, target.digests, offer_pipeline)
        return publication

    return publish_as(commit, publish_to)


def publish_as(commit: Commit, publish_to: Callable[[Named], Any]) -> NamedPublication:
    """Publish under a name. If the registry ends meanwhile, publish again with the next registry."""
    for left in reversed(range(TRIES)):
        try:
            publication: NamedPublication = publish_to(Named(commit))
            break
        except client.RegistryLost as error:
            if not left:
                raise client.unreachable(error) from error
            time.sleep(1)
    WATCHER.note_here(commit.name)
    return publication


@overload
def publish_checkpoint(
    build: Callable[[], T],
    files: Files,
    *,
    dtype: torch.dtype | None = ...,
    strict: bool = ...,
    ignore: str | Iterable[str] = ...,
    rename: Rename | None = ...,
    key: str | None = ...,
    train: bool = ...,
    name: str,
    alias: str | None = ...,
    expect: int | None = ...,
    keep: int | None = ...,
    lifetime: Literal["cluster", "job"] = ...,
) -> NamedPublication[T]: ...
@overload
def publish_checkpoint(
    build: Callable[[], T],
    files: Files,
    *,
    dtype: torch.dtype | None = ...,
    strict: bool = ...,
    ignore: str | Iterable[str] = ...,
    rename: Rename | None = ...,
    key: str | None = ...,
    train: bool = ...,
    name: str | None = ...,
    alias: str | None = ...,
    expect: int | None = ...,
    keep: int | None = ...,
    lifetime: Literal["cluster", "job"] = ...,
) -> Publication[T]: ...
def publish_checkpoint(
    build: Callable[[], T],
    files: Files,
    *,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    ignore: str | Iterable[str] = (),
    rename: Rename | None = None,
    key: str | None = None,
    train: bool = False,
    name: str | None = None,
    alias: str | None = None,
    expect: int | None = None,
    keep: int | None = None,
    lifetime: Literal["cluster", "job"] = "cluster",
) -> Publication[T]:
    """Publish a pipeline whose weights are in files, without a copy of the weights in this process.

    Args:
        build: a function that creates the pipeline. While it runs, parameters are created on the meta device, where they take no
            memory. Buffers are created for real. It runs a second time if no file has some of the parameters.
        files: a folder as for `from_pretrained`, an index, a file, a pattern such as `"model/*.safetensors"`, or several of
            these; or a mapping from each model of the pipeline to one of these. The files are in the format of safetensors, or
            state dicts of `torch.save`, which are read with `weights_only=True`. Files of torch before 1.6 pass through memory.
            Names are those of the module's `state_dict()`. In a pipeline with several models, each name begins with the path of
            its model, as in `encoder.layer.0.weight`. Tied tensors need one name. If all names differ by a prefix, such as
            `bert.` or `module.`, the prefix is changed, and a warning says so.
        dtype: the dtype that floating-point tensors of the files are converted to. With None, they are not converted.
        strict: whether tensors that no file has, and names that the pipeline does not have, are errors. If False, such tensors
            keep the values that `build` gives them, and a warning says how many there are.
        ignore: a pattern like those for file names, or several, for names that may be missing or unexpected.
        rename: how to rename the names of the files: a function that returns the new name, or None to leave a tensor out; or a
            mapping from names, or from prefixes that end with a dot. `""` is the prefix of every name.
        key: the key of the state dict in a file of `torch.save`. By default, it is `state_dict`, `model_state_dict`, `model`,
            `module`, or the only key in the file.
        train: whether modules keep the modes that `build` gave them. By default, they are put into eval mode.
        name: as in `publish`. If the weights are lost, they are read again from the files, on any node that has the files.
        alias: as in `publish`.
        expect: as in `publish`.
        keep: as in `publish`.
        lifetime: as in `publish`.

    Returns:
        A publication of the pipeline. No part of the pipeline stays in this process.

    Raises:
        CheckpointError: a file does not exist or cannot be read; or the names and shapes in the files do not fit the pipeline
            (the attributes list all that do not fit); or the pipeline ties tensors that differ in the files.
        ArgumentError: `build` does not return an object that holds models, or an argument is invalid.
        VersionConflictError, CannotTravelError, StoreTooSmallError, RayClientError: as in `publish`.
    """
    checkpoint = checkpoint_of(
        build, files, dtype=dtype, strict=strict, ignore=ignore, rename=rename, key=key, train=train
    )
    if name is None:
        check_unnamed(alias, None, expect, keep, lifetime)
        return unnamed_checkpoint(checkpoint)
    commit = commit_of(name, packed_checkpoint(checkpoint), alias=alias, expect=expect, keep=keep, lifetime=lifetime)
    return publish_as(commit, lambda to: unnamed.put_once(checkpoint.open(), to))


def lookup(name: str, *, alias: str | None = None, version: int | None = None) -> NamedPublication:
    """Find a publication by its name, from any process of the cluster.

    Args:
        name: the name.
        alias: the alias that the handle follows. The default is "latest", if `version` is not given.
        version: the number of one version. The handle always refers to this version.

    Returns:
        A handle to the publication.

    Raises:
        ArgumentError: both are given, or one has a wrong type.
        NotPublishedError: there is no such name, alias or version. The error lists the existing versions.
    """
    check_name(name, "name")
    if alias is not None and version is not None:
        raise ArgumentError("lookup() takes an alias or a version, got both.", hint="leave one out.")
    if alias is not None:
        check_name(alias, "alias")
    check_number(version)
    object_store.require(may_start=False)
    which = version if version is not None else alias or names.LATEST
    changes = WATCHER.changes
    told = client.ask("resolve", name, which)
    tag = Tag(name, alias=alias or names.LATEST, follows=True)
    if version is not None:
        tag = Tag(name, number=version, digest=told["digest"].hex())
    return handles.handle_of(told, tag, Unresolved()).answered(told, changes)


def set_alias(name: str, alias: str, *, version: int | None = None, to: str | None = None) -> Version:
    """Point an alias at a version, to roll back or forward. Every handle that follows the alias changes to this version.

    Args:
        name: the name.
        alias: "latest", which each publication also moves, or an alias of your own.
        version: the number of the version.
        to: another alias, to point at the version of that alias.

    Raises:
        ArgumentError: neither `version` nor `to` is given, or both are, or one has a wrong type.
        NotPublishedError: there is no such name, version or alias.
    """
    check_name(name, "name")
    check_name(alias, "alias")
    if (version is None) == (to is None):
        got = "none" if to is None else "both"
        raise ArgumentError(
            f"set_alias() takes a version or an alias to point at, got {got}.",
            hint="write version=1 or to='latest', say.",
        )
    if to is not None:
        check_name(to, "alias")
    check_number(version)
    told = client.ask("point", name, alias, version if version is not None else to)
    WATCHER.note_here(name)
    return Version(name, told["number"], told["digest"].hex())


def remove(name: str, *, version: int | None = None) -> None:
    """Remove a name, or one of its versions. Loaded pipelines keep what they use.

    Version numbers are not used again. The memory is freed when the last reader has finished.

    Args:
        name: the name.
        version: the number of one version. With None, the name and all its versions are removed.

    Raises:
        NotPublishedError: there is no such name or version.
        VersionInUseError: an alias points at this version.
    """
    check_name(name, "name")
    check_number(version)
    client.ask("remove", name, version, may_be_gone=True)
    WATCHER.note_here(name)


def version_of(pipeline: Any) -> Version | None:
    """Return the version that a live pipeline was loaded from, or published as. None if it has no name.

    Raises:
        ArgumentError: `pipeline` is a publication. Use its attribute `version`.
    """
    if isinstance(pipeline, Publication):
        raise ArgumentError(
            "version_of() expects a loaded pipeline, got a publication.", hint="use its attribute `version`."
        )
    tag = tag_of(pipeline)
    return None if tag is None else tag.version
