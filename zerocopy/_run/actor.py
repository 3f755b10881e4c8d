"""What does `@actor` generate? Ray actors of a class that stays a plain class, with pipelines that arrive loaded."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import attr
import ray

from zerocopy._compat.ray import is_ray_actor_class
from zerocopy._declare.fields import Marker, check_device_name
from zerocopy._declare.pipeline import class_with_own_init, describe, is_pipeline_class
from zerocopy._run.arguments import handle_parameters, keep_arguments, load_arguments, load_publication
from zerocopy._run.checks import Parameters, check_options, say_options
from zerocopy._run.copies import warn_if_called_by_ray, warn_of_copies
from zerocopy._run.following import (
    check_can_follow,
    check_options_can_follow,
    follow_in_methods,
    load_newest,
    start_following,
)
from zerocopy._run.methods import GENERATED, Handle
from zerocopy._run.pool import Pool
from zerocopy._store import object_store
from zerocopy.errors import ArgumentError, DeclarationError

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C", bound=type)

_SPEC = "__zerocopy_actor__"


class _Spec:
    """The options of an actor class, and the Ray actor classes that this process has created from it and from its subclasses."""

    def __init__(self, options: dict[str, Any], device: str | None, follow: bool = False) -> None:
        self.options = options
        self.device = device
        self.follow = follow
        self._made: dict[type, tuple[Parameters, Any]] = {}

    def made_of(self, cls: type) -> tuple[Parameters, Any]:
        """The parameters of `cls`, and the Ray actor class created from it."""
        if cls not in self._made:
            parameters = Parameters(cls)  # first, because Ray adds a parameter to the signature
            self._made[cls] = parameters, ray.remote(**self.options)(cls) if self.options else ray.remote(cls)
        return self._made[cls]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Spec, (self.options, self.device, self.follow)


class Launcher(Generic[P, T]):
    """Starts actors of one class with given options of Ray. `options(...)` of an actor class returns it."""

    def __init__(self, cls: type[T], options: dict[str, Any]) -> None:
        self._cls = cls
        self._options = options

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Handle[T]:
        """Start one actor. Pipelines and modules among the arguments are published, and arrive loaded.

        Returns:
            A Ray actor handle. The arguments stay in the store as long as it lives.

        Raises:
            ArgumentError: an argument is missing, unknown, or not an instance of the pipeline class of its annotation.
            As `zerocopy.publish`.
        """
        return self._start(1, args, kwargs)[0]

    def pool(self, size: int, /, *args: P.args, **kwargs: P.kwargs) -> Pool[T]:
        """Start `size` actors with the same arguments, which share one copy of the weights.

        Raises:
            ArgumentError: `size` is not a positive integer.
            As `remote`.
        """
        if not isinstance(size, int) or size < 1:
            raise ArgumentError(
                f"{self._cls.__name__}.pool() expects a number of actors first, got {size!r}.",
                hint=f"write {self._cls.__name__}.pool(4, ...).",
            )
        return Pool(self._cls, self._start(size, args, kwargs))

    def __repr__(self) -> str:
        return f"<zerocopy.Launcher of {self._cls.__name__}{say_options(self._options)}>"

    def _start(self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Handle[T]]:
        cls: Any = self._cls
        parameters, actor_class = getattr(cls, _SPEC).made_of(cls)
        parameters.check(args, kwargs)
        object_store.require()
        spec, handles = getattr(cls, _SPEC), handle_parameters(cls.__init__, is_method=True)
        sent, named = keep_arguments(args, kwargs, lambda which: spec.follow or which in handles)
        if self._options:
            actor_class = actor_class.options(**self._options)
        actors = [actor_class.remote(*sent, **named) for _ in range(count)]
        for handle in actors:
            # A restarted actor loads its arguments again, but Ray keeps no argument until then:
            # https://github.com/ray-project/ray/issues/53727. So the finalizer refers to the arguments, and they live as long as
            # this handle.
            weakref.finalize(handle, _do_nothing, sent, named).atexit = False
        return actors


def _do_nothing(*arguments: object) -> None: ...


class _Remote:
    def __get__(self, instance: object, owner: Callable[P, T]) -> Callable[P, Handle[T]]:
        if is_ray_actor_class(owner):
            # Ray derives a class of its own from each actor class, and warns if that has a `remote` already.
            raise AttributeError("remote")
        return Launcher[P, T](cast("type[T]", owner), {}).remote


class _Options:
    # mypy cannot get the parameters of a class from the owner of a descriptor, so the parameters have no types here.
    def __get__(self, instance: object, owner: Callable[..., T]) -> Callable[..., Launcher[..., T]]:
        def options(**options: Any) -> Launcher[..., T]:
            """Set options of Ray, by name, for the actors that the result starts."""
            check_options(options, "actor", late=True)
            if getattr(owner, _SPEC).follow:
                check_options_can_follow(cast("type[T]", owner), options)
            return Launcher(cast("type[T]", owner), options)

        return options


class _Pool:
    def __get__(self, instance: object, owner: Callable[P, T]) -> Callable[Concatenate[int, P], Pool[T]]:
        return Launcher[P, T](cast("type[T]", owner), {}).pool


class Actor:
    """A base class that makes a class an actor. It is empty, and type checkers see its `.remote`, `.options` and `.pool`.

    To add options of Ray, use `@zerocopy.actor(...)` on the derived class.
    """

    remote = _Remote()
    options = _Options()
    pool = _Pool()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _prepare(cls)


setattr(Actor, _SPEC, _Spec({}, None))


@overload
def actor(cls: C) -> C: ...
@overload
def actor(*, device: str | None = ..., follow: bool = ..., **options: Any) -> Callable[[C], C]: ...
def actor(cls: Any = None, *, device: str | None = None, follow: bool = False, **options: Any) -> Any:
    """Make a class start Ray actors, in which pipelines, modules and publications among the arguments arrive loaded.

    The class stays a plain class: it can be called, subclassed, given to `ds.map_batches` or put under `@serve.deployment`. It
    gets the methods `remote(...)`, `options(...)` and `pool(size, ...)`. A class without an `__init__` gets one from its
    annotations.

    Args:
        device: the device that pipelines are loaded onto. A field's own device has priority.
        follow: whether pipelines that were loaded from a publication with a name change to its newest version between two calls.
            After each change, the method `on_version(self, pipeline)` of the class is called, if there is one, to repeat changes
            that the actor had made to the pipeline.
        options: Ray's options for an actor, such as `num_cpus`.

    Raises:
        DeclarationError: `cls` is not a class; or Ray does not know an option; or the class has a method named `remote`,
            `options` or `pool`; or `follow` is given for a class with async methods, or with options that let several calls run
            at the same time.
    """
    check_device_name(device, "@zerocopy.actor")
    check_options(options, "actor")
    if cls is None:
        return functools.partial(_decorate, options=options, device=device, follow=follow)
    return _decorate(cls, options, device, follow)


def _decorate(cls: Any, options: dict[str, Any], device: str | None, follow: bool) -> Any:
    if not isinstance(cls, type):
        hint = "use @zerocopy.task." if inspect.isfunction(cls) else "decorate the class itself."
        raise DeclarationError(f"@zerocopy.actor expects a class, got {describe(cls)}.", hint=hint)
    if not hasattr(cls, _SPEC):
        _prepare(cls)
        _prepare_subclasses(cls)
        for name, descriptor in zip(GENERATED, (_Remote(), _Options(), _Pool()), strict=True):
            setattr(cls, name, descriptor)
    inherited = getattr(cls, _SPEC, _Spec({}, None))
    spec = _Spec({**inherited.options, **options}, device or inherited.device, follow or inherited.follow)
    setattr(cls, _SPEC, spec)
    if spec.follow:
        check_can_follow(cls, spec.options)
        follow_in_methods(cls)
    return cls


def _prepare(cls: type) -> None:
    """Check a class that becomes an actor, give it an `__init__` if it has none, and make this load its arguments."""
    if is_ray_actor_class(cls):  # Ray derived it from a class that is prepared
        return
    for name in GENERATED:
        if not isinstance(inspect.getattr_static(cls, name, _Remote()), (_Remote, _Options, _Pool)):
            raise DeclarationError(
                f"{cls.__name__} has a method {name!r}, the name of one that @zerocopy.actor generates.",
                hint="rename it.",
            )
    if is_pipeline_class(cls):
        raise DeclarationError(
            f"{cls.__name__} is marked with @zerocopy.pipeline, so it cannot be an actor as well.",
            hint="write an actor class that takes it as an argument.",
        )
    for name, value in vars(cls).items():
        if isinstance(value, Marker):
            raise DeclarationError(
                f"{cls.__name__} is an actor, but {name!r} is a {value.policy}() field.",
                hint="fields belong to a class marked with @zerocopy.pipeline, which an actor takes as an argument.",
            )
    if getattr(cls, _SPEC, _Spec({}, None)).follow:  # an option of a base class
        check_can_follow(cls, {})
        follow_in_methods(cls)
    if class_with_own_init(cls) is None and inspect.get_annotations(cls):
        attr.s(auto_attribs=True, slots=False, eq=False, repr=False)(cls)
    init = cls.__init__  # type: ignore[misc]
    if init is not object.__init__ and not hasattr(init, _SPEC):
        cls.__init__ = _with_arguments_loaded(init)  # type: ignore[misc]


def _with_arguments_loaded(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `init`, so that its arguments arrive loaded. Returns the result of `init`, which Python or Ray awaits or refuses."""
    if inspect.iscoroutinefunction(init):

        @functools.wraps(init)
        async def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
            warn_of_copies(init.__get__(self), args, kwargs)  # only Ray awaits it
            values, named = _loaded_for(self, init, args, kwargs)
            return await init(self, *values, **named)
    else:

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> Any:
            warn_if_called_by_ray(init.__get__(self), args, kwargs)
            values, named = _loaded_for(self, init, args, kwargs)
            result = init(self, *values, **named)
            if getattr(type(self), _SPEC).follow:
                start_following(self, (*values, *named.values()))
            return result

    setattr(__init__, _SPEC, True)
    return __init__


def _loaded_for(
    actor: Any, init: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    spec, handles = getattr(type(actor), _SPEC), handle_parameters(init, is_method=True)
    return load_arguments(args, kwargs, spec.device, load_newest if spec.follow else load_publication, handles)


def _prepare_subclasses(cls: Any) -> None:
    """Prepare each subclass of `cls` when it is created."""
    previous = vars(cls).get("__init_subclass__")

    def __init_subclass__(owner: type, /, **options: Any) -> None:
        if previous is not None:
            previous.__get__(None, owner)(**options)
        else:
            super(cls, owner).__init_subclass__(**options)
        _prepare(owner)

    cls.__init_subclass__ = classmethod(__init_subclass__)
