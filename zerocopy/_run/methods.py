"""What do type checkers know about the handle of an actor and about its methods? At run time, both are Ray's own objects.

No type can express "the methods of T, each with a `remote`". So a handle accepts every method, without types. In addition, the
class itself can stand for a handle; then the marked methods have types. Ray has the same two ways: `ActorProxy[T]`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

import ray
from ray.actor import ActorHandle

from zerocopy._declare.pipeline import describe
from zerocopy.errors import DeclarationError

GENERATED = ("remote", "options", "pool")  # the methods that an actor class gets

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
Sent = TypeVar("Sent")

if TYPE_CHECKING:

    class RemoteMethod:
        """A method of an actor's handle, with no further types."""

        def remote(self, *args: Any, **kwargs: Any) -> ray.ObjectRef[Any]:
            """Call it in the actor. Returns at once."""
            ...

        def options(self, **options: Any) -> RemoteMethod:
            """The same method with options of Ray, such as `num_returns`."""
            ...

        def bind(self, *args: Any, **kwargs: Any) -> Any:
            """Create a node of a graph of Ray."""
            ...

    class Handle(ActorHandle[T]):
        """The handle of a running actor of class T. It is Ray's own handle, which functions such as `ray.kill` accept."""

        def __getattr__(self, item: str) -> RemoteMethod: ...  # type: ignore[override]  # Ray says Never

    class MarkedMethod(Generic[S, P, R, Sent]):
        """A method marked with `zerocopy.method`. Handles use `remote` and `options`; a direct call is for the class itself."""

        def __call__(self, instance: S, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

        def remote(self, *args: P.args, **kwargs: P.kwargs) -> Sent:
            """Call it in the actor. Returns at once."""
            ...

        def options(self, **options: Any) -> MarkedMethod[S, P, R, Sent]:
            """The same method with options of Ray."""
            ...

        @overload
        def __get__(self, instance: None, owner: type) -> MarkedMethod[S, P, R, Sent]: ...
        @overload
        def __get__(self, instance: S, owner: type) -> Callable[P, R]: ...
        def __get__(self, instance: Any, owner: type) -> Any: ...

    class MethodDecorator(Protocol):
        """The result of `method(...)` with options."""

        @overload
        def __call__(
            self, function: Callable[Concatenate[S, P], Coroutine[Any, Any, R]], /
        ) -> MarkedMethod[S, P, Coroutine[Any, Any, R], ray.ObjectRef[R]]: ...
        @overload
        def __call__(self, function: Callable[Concatenate[S, P], R], /) -> MarkedMethod[S, P, R, ray.ObjectRef[R]]: ...

else:
    Handle = ActorHandle


@overload
def method(
    function: Callable[Concatenate[S, P], Coroutine[Any, Any, R]], /
) -> MarkedMethod[S, P, Coroutine[Any, Any, R], ray.ObjectRef[R]]: ...
@overload
def method(
    function: Callable[Concatenate[S, P], AsyncIterator[R]], /
) -> MarkedMethod[S, P, AsyncIterator[R], ray.ObjectRefGenerator]: ...
@overload
def method(
    function: Callable[Concatenate[S, P], Iterator[R]], /
) -> MarkedMethod[S, P, Iterator[R], ray.ObjectRefGenerator]: ...
@overload
def method(function: Callable[Concatenate[S, P], R], /) -> MarkedMethod[S, P, R, ray.ObjectRef[R]]: ...
@overload
def method(**options: Any) -> MethodDecorator: ...
def method(function: Any = None, /, **options: Any) -> Any:
    """Mark a method of an actor, so that type checkers know its arguments and its result behind `typed(handle)`.

    The method itself does not change. With options, the decorator is the same as `ray.method`.

    Args:
        options: Ray's options for a method, such as `num_returns` and `concurrency_group`.

    Raises:
        DeclarationError: the decorated object is not a function, or Ray does not know an option.
    """
    if function is None:
        return functools.partial(_mark, options=options)
    return _mark(function, options)


def _mark(function: Any, options: dict[str, Any]) -> Any:
    if not callable(function) or isinstance(function, type):
        raise DeclarationError(
            f"@zerocopy.method expects a method, got {describe(function)}.",
            hint="use it inside of a class that starts actors.",
        )
    try:
        return ray.method(**options)(function) if options else function
    except (AssertionError, TypeError, ValueError) as error:
        raise DeclarationError(f"Ray refuses an option of the method {function.__name__!r}: {error}") from error


def typed(handle: ActorHandle[T]) -> type[T]:
    """Return the same handle, with types for its marked methods: `typed(worker).ask.remote("a query")`.

    Methods are marked with `@zerocopy.method` or `@ray.method`. For type checkers, other methods have no `remote` here. At run
    time, this function does nothing.
    """
    same: Any = handle
    return same  # type: ignore[no-any-return]
