"""How does an actor follow a name automatically? Before each call, the pipelines that arrived loaded become the newest version.

Nothing is changed while a call runs. So only actors that run one call at a time can follow in this way. If a concurrent actor
waited until its calls have ended, it would deadlock as soon as it calls itself, and one long stream would block all calls.
Concurrent actors use `Live`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from zerocopy._cluster.following import Followed, warn_once
from zerocopy._cluster.handles import NamedPublication, Tag, followed_for
from zerocopy._cluster.refresh import swap, tag_of
from zerocopy._compat.ray import is_async_actor
from zerocopy._load import devices, live
from zerocopy._load.publication import Publication
from zerocopy._split import paths
from zerocopy.errors import DeclarationError

C = TypeVar("C", bound=type)

HOOK = "on_version"
_FOLLOWER = "__zerocopy_follower__"  # on an actor's instance
_WRAPPED = "__zerocopy_follows__"  # on its methods
_WAY_OUT = "take a zerocopy.Live[...] parameter, and call its current() in each method."


def check_can_follow(cls: type, options: Mapping[str, Any]) -> None:
    """Refuse automatic following for an actor that runs several calls at a time.

    Raises:
        DeclarationError: it has async methods, or options that make it concurrent.
    """
    functions = ((name, value) for base in cls.__mro__ for name, value in vars(base).items())
    is_async = next((n for n, f in functions if inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f)), None)
    if is_async is not None:
        raise DeclarationError(
            f"follow=True is for actors that run one call at a time, but {cls.__name__} has the async method {is_async!r}.",
            hint=_WAY_OUT,
        )
    check_options_can_follow(cls, options)


def check_options_can_follow(cls: type, options: Mapping[str, Any]) -> None:
    """The same check for options that are given later."""
    concurrent = [name for name in ("max_concurrency", "concurrency_groups") if options.get(name) not in (None, 1)]
    if concurrent:
        raise DeclarationError(
            f"follow=True is for actors that run one call at a time, but {cls.__name__} has "
            f"{concurrent[0]}={options[concurrent[0]]!r}.",
            hint=_WAY_OUT,
        )


def follow_in_methods(cls: type) -> None:
    """Let each public method of a class check for newer versions first."""
    for base in cls.__mro__[:-1]:
        for name, value in list(vars(base).items()):
            is_call = name != HOOK and (name == "__call__" or not name.startswith("__"))
            is_inherited = base is not cls and name in vars(cls)
            if is_call and not is_inherited and inspect.isfunction(value) and not hasattr(value, _WRAPPED):
                setattr(cls, name, _following(value))


def _following(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _newest(self):
                yield from method(self, *args, **kwargs)
    else:

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _newest(self):
                return method(self, *args, **kwargs)

    setattr(call, _WRAPPED, True)
    return call


def load_newest(publication: Publication, device: str | None) -> Any:
    """Load the newest version instead of the published one, which may be gone when an actor is restarted."""
    return (publication.newest() if isinstance(publication, NamedPublication) else publication).load(device)


def start_following(actor: Any, values: Iterable[Any]) -> None:
    """Let an actor follow the names of the pipelines that arrived loaded.

    Raises:
        DeclarationError: the actor runs several calls at a time.
    """
    followed = []
    for pipeline in values:
        tag = tag_of(pipeline) if type(pipeline).__weakrefoffset__ else None
        if tag is not None and tag.alias is not None:
            followed.append(_Pipeline(pipeline, tag))
    if followed and is_async_actor():
        raise DeclarationError(
            f"follow=True is for actors that run one call at a time, but this {type(actor).__name__} runs several.",
            hint=_WAY_OUT,
        )
    object.__setattr__(actor, _FOLLOWER, _Follower(followed))


class _Pipeline:
    """A pipeline that arrived loaded, and the name that it follows."""

    def __init__(self, pipeline: Any, tag: Tag) -> None:
        origin = live.entry_of(pipeline).origin
        self.pipeline = pipeline
        target = devices.CPU if origin is None or origin.target is None else origin.target
        self.followed: Followed = followed_for(pipeline, tag, target)
        self.state = _state_of(pipeline)
        self.followed.start()

    def update(self, actor: Any) -> None:
        """Change the pipeline to the newest version that is loaded."""
        newest = self.followed.newest()
        if newest.pipeline is self.pipeline:
            return
        self.followed.replace(newest, self.pipeline)  # even if a later step fails, this version is not tried again
        changed = _difference(self.state, _state_of(self.pipeline))
        try:
            swap(self.pipeline, newest.pipeline)
        except Exception as error:  # any error of the new version's own code: the actor keeps the old one
            warn_once(f"{type(actor).__name__} goes on with an older version: {error}")
            return
        self.state = _state_of(self.pipeline)
        hook = getattr(actor, HOOK, None)
        if hook is not None:
            hook(self.pipeline)
        elif changed is not None:
            warn_once(
                f"{type(actor).__name__} got a new version. What was done to the old one is not done again: {changed}. Do it in "
                f"a method {HOOK}(self, pipeline) of {type(actor).__name__}."
            )


class _Follower:
    """The pipelines that an actor follows, and the depth of nested calls."""

    def __init__(self, followed: list[_Pipeline]) -> None:
        self._followed = followed
        self._lock = threading.RLock()  # `on_version` may call other methods
        self._depth = 0

    @contextlib.contextmanager
    def call(self, actor: Any) -> Iterator[None]:
        with self._lock:
            self._depth += 1
        try:
            with self._lock:
                if self._depth == 1:
                    for one in self._followed:
                        one.update(actor)
            yield
        finally:
            with self._lock:
                self._depth -= 1


def _newest(actor: Any) -> contextlib.AbstractContextManager[None]:
    follower: _Follower | None = getattr(actor, "__dict__", {}).get(_FOLLOWER)
    return contextlib.nullcontext() if follower is None else follower.call(actor)


def _state_of(pipeline: Any) -> dict[str, tuple[object, ...]]:
    """Kinds, devices and modes of the modules in a pipeline, by path."""
    held = {"": pipeline} if isinstance(pipeline, nn.Module) else paths.attributes_of(pipeline)
    roots = {name: value for name, value in held.items() if isinstance(value, nn.Module)}
    return {
        f"{name}.{below}".strip("."): _state_of_module(module)
        for name, root in roots.items()
        for below, module in root.named_modules()
    }


def _state_of_module(module: nn.Module) -> tuple[object, ...]:
    return type(module).__qualname__, _is_compiled(module), _device_of(module), module.training


def _device_of(module: nn.Module) -> torch.device | None:
    first = next(iter(module.parameters(recurse=False)), None)
    return None if first is None else first.device


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _difference(before: dict[str, tuple[object, ...]], now: dict[str, tuple[object, ...]]) -> str | None:
    """Describes a change of a pipeline after it was loaded; None if there is none."""
    if before.keys() != now.keys():
        return "modules were replaced, added or removed"
    names = ("the class", "compilation", "the device", "train or eval mode")
    changed = ((path, names[i]) for path in before for i in range(4) if before[path][i] != now[path][i])
    path, what = next(changed, (None, None))
    return None if path is None else f"{what} of {path or 'the module'!r}"
