"""What does `@task` generate? A function whose calls run as Ray tasks, with pipelines that arrive loaded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import ray
import ray.cloudpickle
import wrapt

from zerocopy._declare.fields import check_device_name
from zerocopy._declare.pipeline import describe
from zerocopy._run import short_calls
from zerocopy._run.arguments import (
    copy_arguments,
    handle_parameters,
    keep_arguments,
    pack_argument,
    pack_arguments,
    resolve_references,
)
from zerocopy._run.checks import PLACEHOLDER, Parameters, check_in_flight, check_items, check_options, say_options
from zerocopy._run.copies import warn_if_called_by_ray
from zerocopy._run.results import default_in_flight, in_order
from zerocopy._run.worker import address_of, call, object_at, run, run_generator, run_short
from zerocopy._store import object_store
from zerocopy.errors import ArgumentError, DeclarationError

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")

if TYPE_CHECKING:

    class _FunctionWrapper(Generic[P, R]):
        """Type checkers see this class instead of wrapt's wrapper, which is the base class at run time."""

        __wrapped__: Callable[P, R]
        __name__: str
        __qualname__: str

        def __init__(self, wrapped: Callable[P, R], wrapper: Any) -> None: ...

    class _BoundFunctionWrapper(Generic[P, R]):
        _self_parent: Any
        _self_instance: Any
else:

    class _Subscriptable:
        def __class_getitem__(cls, item):
            return cls

    class _BoundFunctionWrapper(_Subscriptable, wrapt.BoundFunctionWrapper):
        pass

    class _FunctionWrapper(_Subscriptable, wrapt.FunctionWrapper):
        pass


_ITEMS_LAST = "pass a list, or any other iterable, last; name the arguments after it."


class BoundTask(_BoundFunctionWrapper[P, R]):
    """A task that is a method, bound to its instance. The instance is passed as the first argument."""

    # cloudpickle recognizes functions by their class, and wrapt would return the class of the wrapped function.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self)

    def _arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if self._self_instance is None else (self._self_instance, *args)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self._self_parent(*self._arguments(args), **kwargs)
        return result

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> ray.ObjectRef[R]:
        """See `Task.remote`."""
        ref: ray.ObjectRef[R] = self._self_parent.remote(*self._arguments(args), **kwargs)
        return ref

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """See `Task.local`."""
        result: R = self._self_parent.local(*self._arguments(args), **kwargs)
        return result

    def map(self, *args: Any, max_in_flight: int | None = None, progress: bool = True, **kwargs: Any) -> Iterator[R]:
        """See `Task.map`."""
        bounds = {"max_in_flight": max_in_flight, "progress": progress}
        results: Iterator[R] = self._self_parent.map(*self._arguments(args), **bounds, **kwargs)
        return results

    def options(self, **options: Any) -> BoundTask[P, R]:
        """See `Task.options`."""
        changed = self._self_parent.options(**options)
        bound: BoundTask[P, R] = changed.__get__(self._self_instance, type(self._self_instance))
        return bound

    def __repr__(self) -> str:
        return f"{self._self_parent!r}"[:-1] + f", bound to a {type(self._self_instance).__name__}>"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class holds a private method under a mangled name.
        held = (vars(base).items() for base in type(self._self_instance).__mro__)
        names = (name for members in held for name, value in members if value is self._self_parent)
        return getattr, (self._self_instance, next(names, self._self_parent.__name__))


class Task(_FunctionWrapper[P, R]):
    """A function whose direct call runs as a Ray task and waits for the result. `zerocopy.task` returns it.

    Pipelines, modules and publications among the arguments arrive loaded.
    """

    __bound_function_wrapper__ = BoundTask

    def __init__(
        self,
        wrapped: Callable[P, R],
        options: dict[str, Any],
        device: str | None,
        reuse: bool = True,
        base: Task[P, R] | None = None,
    ) -> None:
        super().__init__(wrapped, lambda function, _, args, kwargs: function(*args, **kwargs))
        self._self_options = options
        self._self_device = device
        self._self_reuse = reuse
        self._self_base = base  # the task that `options` was called on: both use its Ray function
        self._self_parameters: Parameters = Parameters(wrapped) if base is None else base._self_parameters
        self._self_remotes: dict[Any, Any] = {}
        is_plain = not inspect.isgeneratorfunction(wrapped) and options.get("num_returns") in (None, 1)
        is_plain = is_plain and not handle_parameters(wrapped)
        self._self_may_be_short: bool = is_plain and reuse and (base is None or base._self_may_be_short)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self)

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type) -> Task[P, R]: ...
        @overload
        def __get__(self: Task[Concatenate[S, Q], R], instance: S, owner: type) -> BoundTask[Q, R]: ...
        def __get__(self, instance: Any, owner: type) -> Any: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run as a Ray task and wait for the result. Inside a worker, run in place, so that no worker waits for another.

        A call of a generator function returns Ray's `ObjectRefGenerator`.
        """
        if object_store.is_running() and object_store.is_worker():
            warn_if_called_by_ray(self.__wrapped__, args, kwargs)
            given, named = resolve_references(args, kwargs)
            result: R = call(self.__wrapped__, self._self_device, self._self_reuse, given, named)
            return result
        self._self_parameters.check(args, kwargs)
        object_store.require()
        sent, named = pack_arguments(args, kwargs)
        short = short_calls.pack_call(sent, named) if self._self_may_be_short else None
        if short is not None:
            reply = short_calls.unpack_reply(ray.get(self._ray_function(run_short).remote(short)))
            short_calls.note_reply((*sent, *named.values()), is_known=reply.is_known)
            if reply.is_known:
                return cast("R", reply.result)
        ref = self._submit(sent, named)
        if isinstance(ref, ray.ObjectRefGenerator):
            return cast("R", ref)
        result = ray.get(ref)
        short_calls.note_reply((*sent, *named.values()), is_known=True)
        return result

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> ray.ObjectRef[R]:
        """Schedule a Ray task.

        Returns:
            A reference to the result; with `num_returns`, a list of references; for a generator function, a generator.

        Raises:
            ArgumentError: an argument is missing, unknown, or not an instance of the pipeline class of its annotation.
            As `zerocopy.publish`.
        """
        self._self_parameters.check(args, kwargs)
        ref: ray.ObjectRef[R] = self._submit(*pack_arguments(args, kwargs))
        return ref

    def options(self, **options: Any) -> Task[P, R]:
        """Return the same task with other options of Ray.

        Raises:
            DeclarationError: Ray does not know an option, or refuses its value.
        """
        check_options(options, "task", late=True)
        late = options if self._self_base is None else {**self._self_options, **options}
        return Task(self.__wrapped__, late, self._self_device, self._self_reuse, self._self_base or self)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run in this process. The arguments are copied or loaded, like the arguments of a remote call.

        Raises:
            ArgumentError: an argument is missing, unknown, or not an instance of the pipeline class of its annotation.
        """
        self._self_parameters.check(args, kwargs)
        values, named = copy_arguments(args, kwargs, self._self_device, handle_parameters(self.__wrapped__))
        return self.__wrapped__(*values, **named)

    def map(self, *args: Any, max_in_flight: int | None = None, progress: bool = True, **kwargs: Any) -> Iterator[R]:
        """Call the function for each item of the last positional argument. The other arguments are the same in all calls.

        The items are iterated lazily. Yields the results in order. The first error cancels the calls in flight and is raised.

        Args:
            args: arguments of the function. The last one is an iterable of items.
            max_in_flight: the maximum number of calls in flight. The default is twice the CPUs of the cluster.
            progress: whether to show a progress bar on a terminal or in a notebook.
            kwargs: arguments of the function by name.

        Raises:
            ArgumentError: the last argument cannot be iterated or is a string, or `max_in_flight` is not a positive number.
        """
        if not args:
            raise ArgumentError(
                f"{self.__name__}.map() needs something to iterate, as its last positional argument.",
                hint=_ITEMS_LAST,
            )
        *constant, items = args
        check_items(items, f"{self.__name__}.map() iterates its last positional argument", _ITEMS_LAST)
        if inspect.isgeneratorfunction(self.__wrapped__):
            raise ArgumentError(
                f"{self.__name__} is a generator function, whose results map() cannot put in one order.",
                hint=f"call {self.__name__}.remote() for each item.",
            )
        check_in_flight(max_in_flight)
        self._self_parameters.check((*constant, PLACEHOLDER), kwargs)
        object_store.require()
        sent, named = keep_arguments(constant, kwargs)
        limit = max_in_flight or default_in_flight()

        def submit(item: Any) -> Any:
            return self._submit([*sent, pack_argument(item)], named)

        return in_order(submit, items, limit, self.__name__, progress=progress)

    def _submit(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        object_store.require()
        runs = run_generator if inspect.isgeneratorfunction(self.__wrapped__) else run
        return self._ray_function(runs).remote(*args, **kwargs)

    def _ray_function(self, runs: Callable[..., Any]) -> Any:
        """The Ray function whose calls `runs` executes, created only once. `runs` is a function of the module `worker`."""
        if runs in self._self_remotes:
            return self._self_remotes[runs]
        if self._self_base is not None:
            remote = self._self_base._ray_function(runs).options(**self._self_options)
        else:
            function = self.__wrapped__
            address = address_of(self, function.__module__, function.__qualname__)
            runner = functools.partial(runs, address or function, self._self_device, self._self_reuse)
            options = {"name": self.__qualname__, **self._self_options}
            remote = ray.remote(**options)(_named_after(function, runner))
        self._self_remotes[runs] = remote
        return remote

    def __repr__(self) -> str:
        return (
            f"<zerocopy.Task {self.__qualname__}{inspect.signature(self.__wrapped__)}{say_options(self._self_options)}>"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        address = address_of(self, self.__wrapped__.__module__, self.__wrapped__.__qualname__)
        if address is not None:
            return object_at, address
        return Task, (self.__wrapped__, self._self_options, self._self_device, self._self_reuse, self._self_base)


def _named_after(function: Callable[..., Any], runs: Callable[..., Any]) -> Callable[..., Any]:
    """`runs` as a function that Ray accepts, with the name and the docstring of `function`."""
    if inspect.isgeneratorfunction(function):

        def runner(*args: Any, **kwargs: Any) -> Any:
            yield from runs(*args, **kwargs)
    else:

        def runner(*args: Any, **kwargs: Any) -> Any:
            return runs(*args, **kwargs)

    runner.__name__ = function.__name__
    runner.__qualname__ = function.__qualname__
    runner.__doc__ = function.__doc__
    return runner


@overload
def task(function: Callable[P, R]) -> Task[P, R]: ...
@overload
def task(*, device: str | None = ..., reuse: bool = ..., **options: Any) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def task(function: Any = None, *, device: str | None = None, reuse: bool = True, **options: Any) -> Any:
    """Make a function run as a Ray task, in which pipelines, modules and publications among the arguments arrive loaded.

    A method of a pipeline can be a task, too: it runs remotely, with `self` loaded.

    Args:
        device: the device that pipelines are loaded onto. A field's own device has priority.
        reuse: whether a call may use the modules that an earlier call in its worker process has loaded, if they have not changed
            since. Copied fields are fresh in every call.
        options: Ray's options for a task, such as `num_cpus`.

    Raises:
        DeclarationError: the decorated object is not a function; or it is `async def`, a `staticmethod` or a `classmethod`; or
            Ray does not know an option.
    """
    check_device_name(device, "@zerocopy.task")
    check_options(options, "task")
    if function is None:
        return functools.partial(_decorate, options=options, device=device, reuse=reuse)
    return _decorate(function, options, device, reuse)


def _decorate(function: Any, options: dict[str, Any], device: str | None, reuse: bool) -> Task[Any, Any]:
    if isinstance(function, (staticmethod, classmethod)):
        kind = type(function).__name__
        raise DeclarationError(f"@zerocopy.task cannot wrap a {kind}.", hint=f"write @{kind} above @zerocopy.task.")
    if isinstance(function, type):
        raise DeclarationError(
            f"@zerocopy.task expects a function, got {describe(function)}.", hint="use @zerocopy.actor."
        )
    if not inspect.isfunction(function):
        raise DeclarationError(
            f"@zerocopy.task expects a function, got {describe(function)}.", hint="decorate a function or a method."
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise DeclarationError(
            f"@zerocopy.task cannot run the async function {function.__name__!r}: Ray's tasks are not async.",
            hint="make it a plain function, or an async method of a @zerocopy.actor.",
        )
    return Task(function, dict(options), device, reuse)
