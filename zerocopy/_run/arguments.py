"""How do arguments travel and arrive? Pipelines and modules travel as publications, which are loaded where the code runs."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin

import ray
import ray.cloudpickle

from zerocopy._cluster.following import Fixed, Live, OnDevice
from zerocopy._declare.fields import is_unknown, resolve_names
from zerocopy._declare.pipeline import is_pipeline_class
from zerocopy._load import devices
from zerocopy._load.publication import Publication
from zerocopy._publish.publish import publish_automatically
from zerocopy._run.short_calls import is_brief
from zerocopy._split.held_models import holds_models
from zerocopy._store import object_store

Load: TypeAlias = Callable[[Publication, str | None], Any]
Arrival: TypeAlias = Callable[[Any, str | None], Any]  # an argument as it arrives, on the device of the receiver
Handles: TypeAlias = Mapping[int | str, Arrival]


def pack_argument(value: Any) -> Any:
    """An argument as it is sent. A model, or an object that holds one, becomes a publication. A publication becomes a new handle.

    The new handle is needed because the caller may close the given one as soon as the call returns, or earlier from another
    thread.

    Raises:
        PublicationClosedError, PublicationLostError: it is a publication that cannot be loaded any more.
    """
    if isinstance(value, Publication):
        return value.for_call()
    return publish_automatically(value) if is_pipeline_class(type(value)) or holds_models(value) else value


def keep_argument(value: Any) -> Any:
    """An argument as it is sent several times: now, and when an actor is restarted or the next item of a `map` is sent.

    While the result lives, everything that the argument refers to lives too, even if the caller closes, changes or drops the
    argument. So an argument that may refer to more than a handle does is put into the store, and Ray keeps the references inside
    it. The store has it only once; without this, Ray would store a large argument for each call, and drop it before a restart.

    Raises:
        As `pack_argument`.
    """
    packed = pack_argument(value)
    if isinstance(packed, ray.ObjectRef) or is_brief(packed):
        return packed
    if isinstance(packed, Publication) and packed.packed() is not None:
        return packed
    return object_store.put(packed)


def load_publication(publication: Publication, device: str | None) -> Any:
    """A new pipeline. A publication with a name has its own `load`."""
    return publication.load(device)


def load_argument(value: Any, device: str | None, load: Load = load_publication) -> Any:
    """An argument as the user's code receives it: a publication becomes a pipeline on the device of that code."""
    if isinstance(value, Publication):
        return load(value, device)
    if is_pipeline_class(type(value)) and device is not None and object_store.is_running() and object_store.is_worker():
        # Ray Data and Serve pass a pipeline that is already loaded, on the CPU.
        return value if devices.resolve(device) == devices.CPU else publish_automatically(value).load(device)
    return value


def pack_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call as they are sent."""
    return [pack_argument(value) for value in args], {name: pack_argument(value) for name, value in kwargs.items()}


def keep_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], follow: Callable[[int | str], bool] = lambda _: False
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call as they are sent several times.

    Args:
        follow: whether the argument with this position or name follows the name of a publication. Its old versions are not kept.
    """

    def kept(which: int | str, value: Any) -> Any:
        return follow_argument(value) if follow(which) else keep_argument(value)

    sent = [kept(position, value) for position, value in enumerate(args)]
    return sent, {name: kept(name, value) for name, value in kwargs.items()}


def follow_argument(value: Any) -> Any:
    """An argument as it is sent if it will follow a name. A handle with a name is kept without its reference."""
    packed = pack_argument(value)
    by_name = packed.without_reference() if isinstance(packed, Publication) else packed
    if by_name is packed:
        return keep_argument(value)
    return by_name if packed.packed() is not None else object_store.put(_ByName(by_name))


class _ByName:
    """Is pickled as the handle, without a reference. Otherwise, Ray's pickle would add the reference of the present version."""

    def __init__(self, handle: Publication) -> None:
        self._handle = handle

    def __reduce__(self) -> tuple[Any, ...]:
        return self._handle.__reduce__()


def load_arguments(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: str | None,
    load: Load = load_publication,
    handles: Handles = MappingProxyType({}),
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call as the user's code receives them.

    Args:
        handles: the result of `handle_parameters`.
    """

    def arrived(which: int | str, value: Any) -> Any:
        return handles[which](value, device) if which in handles else load_argument(value, device, load)

    values = [arrived(position, value) for position, value in enumerate(args)]
    return values, {name: arrived(name, value) for name, value in kwargs.items()}


def as_live(value: Any, device: str | None) -> Any:
    """An argument for a `Live` parameter. An object without a name has one version."""
    if is_pipeline_class(type(value)) and object_store.is_running() and object_store.is_worker():
        value = publish_automatically(value)  # Ray Data and Serve pass a pipeline that is already loaded
    if isinstance(value, Publication):
        return OnDevice(value, device)
    return value if isinstance(value, (Fixed, OnDevice)) else Fixed(value)


def as_publication(value: Any, _: str | None) -> Any:
    """An argument for a parameter that is annotated as a publication. It stays as it arrived."""
    return value


@functools.lru_cache(256)
def handle_parameters(function: Any, *, is_method: bool = False) -> Handles:
    """The parameters of `function` that ask for a handle instead of a loaded pipeline: annotated `Live[...]` or `Publication`.

    Returns:
        For each of them, by position and by name, the function that returns the argument as it arrives. `self` has no position.
    """
    parameters = list(inspect.signature(function).parameters.values())[is_method:]
    asked = [(position, one.name, _asked_for(one.annotation, function)) for position, one in enumerate(parameters)]
    return {key: way for position, name, way in asked if way is not None for key in (position, name)}


def _asked_for(annotation: Any, function: Any) -> Arrival | None:
    if isinstance(annotation, str):
        found = resolve_names(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
        if not is_unknown(found):
            return _asked_for(found, function)
        # A name that was imported inside of a function cannot be found.
        return as_live if _LIVE.match(annotation) else as_publication if _PUBLICATION.fullmatch(annotation) else None
    if any(Live in (one, get_origin(one)) for one in (annotation, *get_args(annotation))):
        return as_live
    is_union = get_origin(annotation) in (Union, UnionType)  # if it has a pipeline class, it arrives loaded
    members = [one for one in (get_args(annotation) if is_union else (annotation,)) if one is not NoneType]
    classes = [get_origin(one) or one for one in members]  # of `Publication[Search]` too
    is_handle = all(isinstance(one, type) and issubclass(one, Publication) for one in classes)
    return as_publication if is_handle and members else None


_LIVE = re.compile(r"([\w.]+\.)?Live\b")
_PUBLICATION = re.compile(r"([\w.]+\.)?(Named)?Publication(\[.*\])?( *\| *None)?")


def resolve_references(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, with the objects instead of references to them, as Ray passes them to a task."""
    values = [ray.get(value) if isinstance(value, ray.ObjectRef) else value for value in args]
    named = {name: ray.get(value) if isinstance(value, ray.ObjectRef) else value for name, value in kwargs.items()}
    return values, named


def copy_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], device: str | None, handles: Handles = MappingProxyType({})
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments for a call in this process: copied or loaded, as a remote call would receive them."""
    values = list(map(_copied, args))
    return load_arguments(values, {name: _copied(value) for name, value in kwargs.items()}, device, handles=handles)


def _copied(value: Any) -> Any:
    if not object_store.is_running():
        return ray.cloudpickle.loads(ray.cloudpickle.dumps(value))
    if isinstance(value, ray.ObjectRef):
        return ray.get(value)
    return object_store.get(object_store.put(pack_argument(value)))
