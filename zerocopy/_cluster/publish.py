"""What can one do with names: publish under one, look one up, point aliases, list, remove?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

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

TRIES = 4  # with one registry after the other


@overload
def publish(
    pipeline: Any,
    *,
    adopt: bool = ...,
    name: str,
    alias: str | None = ...,
    source: Callable[[], Any] | None = ...,
    expect: int | None = ...,
    keep: int | None = ...,
    lifetime: Literal["cluster", "job"] = ...,
) -> NamedPublication: ...
@overload
def publish(
    pipeline: Any,
    *,
    adopt: bool = ...,
    name: str | None = ...,
    alias: str | None = ...,
    source: Callable[[], Any] | None = ...,
    expect: int | None = ...,
    keep: int | None = ...,
    lifetime: Literal["cluster", "job"] = ...,
) -> Publication: ...
def publish(
    pipeline: Any,
    *,
    adopt: bool = False,
    name: str | None = None,
    alias: str | None = None,
    source: Callable[[], Any] | None = None,
    expect: int | None = None,
    keep: int | None = None,
    lifetime: Literal["cluster", "job"] = "cluster",
) -> Publication:
    """Put the weights of `pipeline` into the object store, once, and return a small handle to them.

    Publishing the same pipeline again shares one set of weights as long as no byte of it has changed. The weights leave
    the store when the last handle and the last pipeline loaded from one are gone. Those with a name stay.

    Args:
        pipeline: an instance of a `@zerocopy.pipeline` class, or a bare `nn.Module`.
        adopt: re-point its tensors at the store, each part as soon as it is written, so that this process keeps no second
            copy. Tensors keep their identity and ties, and a write to them stays private. Memory that something else
            has a view of, NumPy arrays and TorchScript stay where they are. After an error everything is as before.
        name: makes this a version of that name, which `lookup` finds in any process of the cluster, also after this one has
            ended. Storages that the cluster has under any name are not written again. Equal content is the version that
            exists.
        alias: points at this version from now on, as "latest" does.
        source: makes the pipeline again, with the same weights, if they are lost.
        expect: number of the version that "latest" must point at, 0 for none.
        keep: how many versions of this name stay beside those that an alias points at: 2 if nobody has said anything else.
        lifetime: with "job", the name ends with the Ray job that runs here.

    Returns:
        A handle. `load()` gives what was published; with a name, `current()` gives the newest version.

    Raises:
        ArgumentError: `pipeline` is neither, or an argument makes no sense.
        VersionConflictError: "latest" does not point at `expect`. Nothing was changed.
        IsolationError: `adopt` was asked for where private mappings are not possible.
        CannotTravelError: something inside cannot leave the process; the error names its path.
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
    """Publish under a name. If the registry ends meanwhile, again with the next one."""
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
    build: Callable[[], Any],
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
) -> NamedPublication: ...
@overload
def publish_checkpoint(
    build: Callable[[], Any],
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
) -> Publication: ...
def publish_checkpoint(
    build: Callable[[], Any],
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
) -> Publication:
    """Publish a pipeline whose weights are in files, without a copy of them in this process.

    Args:
        build: makes the pipeline, as usual. While it runs, parameters are made on the meta device, where they take no
            memory; buffers are made for real. It runs again if no file has some of the parameters.
        files: a folder such as `from_pretrained` takes, an index, a file, a pattern such as `"model/*.safetensors"`, or several
            of them; or a mapping from each model of the pipeline to one of these. Files are of safetensors, or state dicts
            of `torch.save`, which are read with `weights_only=True`; those of torch before 1.6 pass through memory.
            Names are those of the module's `state_dict()`; in a pipeline with several models each after the path of its
            model, as in `encoder.layer.0.weight`. Of tied tensors one name is enough. Where all names differ by what they
            begin with, such as `bert.` or `module.`, that is changed, and a warning says so.
        dtype: what floating-point tensors of the files are converted to, None for as they are.
        strict: whether tensors that no file has, and names that the pipeline does not have, are errors. Else the former
            stay as `build` makes them, and a warning tells how many.
        ignore: a pattern, as of file names, or several, of names that may be missing or too many.
        rename: what the names in the files are called in the pipeline: a function, which gives None for what is left out; or a
            mapping from names, or from beginnings of names that end with a dot; `""` is the beginning of every name.
        key: under which key a file of `torch.save` has the state dict. By default it is found: `state_dict`,
            `model_state_dict`, `model`, `module`, or the only one that there is.
        train: leave modules in the modes that `build` gave them. By default they are put into eval mode.
        name: as in `publish`. If the weights are lost, they are read from the files again, on any node that has them.
        alias: as in `publish`.
        expect: as in `publish`.
        keep: as in `publish`.
        lifetime: as in `publish`.

    Returns:
        A publication of the pipeline. Nothing of it stays in this process.

    Raises:
        CheckpointError: there is no such file, or it cannot be read, or the names and shapes in the files are not those of
            the pipeline: attributes list all that do not fit. Or the pipeline ties tensors that differ in the files.
        ArgumentError: `build` does not make an object that holds models, or an argument makes no sense.
        VersionConflictError, CannotTravelError, StoreTooSmallError, RayClientError: as `publish`.
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
    """The publication with a name, from any process of the cluster.

    Args:
        alias: what the handle follows, "latest" if neither this nor `version` is given.
        version: the number of one version, for good.

    Raises:
        ArgumentError: both are given, or one is of another kind.
        NotPublishedError: there is none; the error tells which there are.
    """
    check_name(name, "name")
    if alias is not None and version is not None:
        raise ArgumentError("lookup() takes an alias or a version, got both.", hint="leave one out.")
    if alias is not None:
        check_name(alias, "alias")
    check_number(version)
    object_store.require()
    which = version if version is not None else alias or names.LATEST
    changes = WATCHER.changes
    told = client.ask("resolve", name, which)
    tag = Tag(name, alias=alias or names.LATEST, follows=True)
    if version is not None:
        tag = Tag(name, number=version, digest=told["digest"].hex())
    return handles.handle_of(told, tag, Unresolved()).answered(told, changes)


def set_alias(name: str, alias: str, *, version: int | None = None, to: str | None = None) -> Version:
    """Let an alias point at a version: to roll back, or forward. Whatever follows it changes.

    Args:
        alias: such as "latest", which each publication moves, or one of your own.
        version: number of the version.
        to: another alias, whose version it is.

    Raises:
        ArgumentError: neither or both are given, or one is of another kind.
        NotPublishedError: there is no such version or name.
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
    """Remove a name, or one of its versions. Pipelines that were loaded keep what they use.

    The numbers of later versions go on counting. The memory goes when the last reader has left.

    Raises:
        NotPublishedError: there is none.
        VersionInUseError: an alias points at this version.
    """
    check_name(name, "name")
    check_number(version)
    client.ask("remove", name, version, may_be_gone=True)
    WATCHER.note_here(name)


def version_of(pipeline: Any) -> Version | None:
    """Which version a live pipeline was loaded from, or published as. None without a name.

    Raises:
        ArgumentError: it is a publication, whose `version` tells that.
    """
    if isinstance(pipeline, Publication):
        raise ArgumentError(
            "version_of() expects a loaded pipeline, got a publication.", hint="use its attribute `version`."
        )
    tag = tag_of(pipeline)
    return None if tag is None else tag.version
