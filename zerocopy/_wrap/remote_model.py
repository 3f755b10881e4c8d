"""Which object replaces a model in a pipeline, so that each call of the model runs as a Ray task?"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import ray
import torch
from torch.export import ExportedProgram

from zerocopy._compat.torch import is_parametrized_class
from zerocopy._load.publication import Publication
from zerocopy._run.task import Task
from zerocopy.errors import NotExposedError


class RemoteModel:
    """Replaces a model. A call of one of its methods runs as a Ray task, with the model loaded there, and waits for the result.

    `isinstance` treats it as an instance of the model's class, and `inspect.signature` shows the signature of `forward`. It has
    no other attributes of the model.
    """

    def __init__(self, publication: Publication, cls: type, methods: Sequence[str], device: Any = None) -> None:
        self._publication = publication
        self._cls = cls
        self._methods = tuple(methods)
        self._device = device

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._cls

    @property
    def __signature__(self) -> inspect.Signature:
        return _signature_of(self._cls, "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", args, kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in self._methods:
            return _Method(self, name)
        exposed = ", ".join(self._methods)
        raise NotExposedError(
            f"This {self._cls.__name__} runs in Ray tasks, which expose {exposed} and no {name!r}.",
            hint=f"name it in method_names={(*self._methods, name)!r}, if it is a method of the model.",
            attribute=name,
        )

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method not in self._methods:
            self.__getattr__(method)
        self._publication.reference  # noqa: B018 (raises here what a task would raise only after it was scheduled)
        task = _task(None if self._device is None else str(self._device))
        result = ray.get(task.remote(self._publication, method, *args, **kwargs))
        # Arrays from Ray are read-only views of its store. Arrays of the model itself are writable.
        return result.copy() if isinstance(result, np.ndarray) and not result.flags.writeable else result

    def __repr__(self) -> str:
        return f"<zerocopy: {self._cls.__name__} in Ray tasks: {', '.join(self._methods)}>"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (self._publication, self._cls, self._methods, self._device)


_device_of_load: ContextVar[Any] = ContextVar("device_of_load", default=None)


@contextlib.contextmanager
def models_on(device: Any) -> Iterator[None]:
    """In this context, rebuilt remote models load their models on `device`; with None, on the device that they had."""
    token = _device_of_load.set(device)
    try:
        yield
    finally:
        _device_of_load.reset(token)


def _rebuilt(publication: Publication, cls: type, methods: Sequence[str], device: Any) -> RemoteModel:
    wanted = _device_of_load.get()
    return RemoteModel(publication, cls, methods, device if wanted is None else wanted)


class _Method:
    """A method of a model, to be called as a Ray task."""

    def __init__(self, model: RemoteModel, name: str) -> None:
        self._model = model
        self.__name__ = name
        self.__doc__ = getattr(inspect.getattr_static(model._cls, name, None), "__doc__", None)
        self.__signature__ = _signature_of(model._cls, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model._run(self.__name__, args, kwargs)


def publication_of(model: RemoteModel) -> Publication:
    """The publication of the model that a remote model replaces."""
    return model._publication


def on_device(model: RemoteModel, device: Any) -> RemoteModel:
    """The same model, loaded on `device` in its tasks."""
    return RemoteModel(model._publication, model._cls, model._methods, device)


def class_of(model: Any) -> type:
    """The class of a model. If a parametrization created the class for this model only, its base class."""
    cls = type(model)
    return cls.__bases__[0] if is_parametrized_class(cls) else cls


def _signature_of(cls: type, method: str) -> inspect.Signature:
    try:
        signature = inspect.signature(getattr(cls, method))
    except (AttributeError, TypeError, ValueError):  # a method of compiled code
        return inspect.signature(_any_call)
    if isinstance(inspect.getattr_static(cls, method), (staticmethod, classmethod)):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _any_call(*args: Any, **kwargs: Any) -> Any: ...


def _call(model: Any, method: str, /, *args: Any, **kwargs: Any) -> Any:
    if isinstance(model, ExportedProgram):
        model = model.module()
    with torch.no_grad():
        return getattr(model, method)(*args, **kwargs)


@functools.cache
def _task(device: str | None) -> Task[..., Any]:
    # The caller waits for each call, and may hold the last CPU: the caller's CPU is enough for both.
    return Task(_call, {"name": "zerocopy.model", "num_cpus": 0}, device)
