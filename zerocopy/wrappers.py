"""How are models shared from code that cannot be decorated? With plain classes and functions: the imperative interface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import ray

from zerocopy._declare.fields import check_device_name
from zerocopy._load.publication import Publication
from zerocopy._split.models import is_model, models_of
from zerocopy._split.programs import TORCHSCRIPT
from zerocopy._store import object_store
from zerocopy._wrap.prepare import ModelInfo, attributes_to_copy, prepare_for_actors, prepare_for_tasks
from zerocopy._wrap.remote_model import RemoteModel, models_on, on_device, publication_of
from zerocopy.errors import ArgumentError, ModeError

T = TypeVar("T")
Mode = Literal["actor", "task"]


class ModelWrapper(Generic[T]):
    """A small picklable handle to a published model, or to a published object that holds models. Created by `from_model`.

    In actor mode, `load()` returns the live object, with its models in eval mode, ready for inference. In task mode, `load()`
    returns an object that is used like the original, and every call of a model runs as a Ray task.
    """

    def __init__(
        self,
        skeleton: Publication | RemoteModel,
        model_info: Mapping[str, ModelInfo] | None = None,
        is_standalone_module: bool = False,
        mode: Mode = "actor",
        doc: str | None = None,
    ) -> None:
        name = type(self).__name__
        if not isinstance(skeleton, (Publication, RemoteModel)) or model_info is None:
            raise ArgumentError(
                f"{name}() expects the result of serialize(), got {type(skeleton).__name__!r}.",
                hint=f"for a model or an object with models write {name}.from_model(...).",
            )
        self._skeleton = skeleton
        self._model_info = dict(model_info)
        self._is_standalone_module = is_standalone_module
        self._mode = mode
        self.__doc__ = doc

    @classmethod
    def from_model(
        cls,
        model_or_pipeline: T,
        mode: Mode = "actor",
        model_attr_names: Sequence[str] | None = None,
        method_names: Sequence[str] | None = None,
    ) -> ModelWrapper[T]:
        """Publish a model, or the models at any depth of an object. The object itself does not change.

        Args:
            model_or_pipeline: an `nn.Module`, a TorchScript or exported program, or an object that holds some of these.
            mode: `"actor"` or `"task"`.
            model_attr_names: attributes whose models are shared. Everything else is copied. By default, every model is shared;
                in a `@zerocopy.pipeline` class, its fields decide.
            method_names: methods of the models that run as tasks, in addition to `__call__` (default for TorchScript: `forward`).
                A method of the object that holds the models may be named, too. It runs where it is called, like all methods
                of that object, and the models that it calls run as tasks.

        Raises:
            ModeError: `mode` is unknown (a `ValueError`).
            ArgumentError: no model was found, or an attribute or method with one of these names does not exist.
            CannotTravelError: an object inside cannot leave the process. The error names its path.
            StoreTooSmallError: the weights are larger than this node's object store.
        """
        if mode not in ("actor", "task"):
            raise ModeError(f"mode={mode!r} is neither 'actor' nor 'task'.", hint="use one of these.", mode=mode)
        pipeline: Any = model_or_pipeline
        copied = attributes_to_copy(pipeline, model_attr_names)
        cls._check_models(pipeline, models_of(pipeline, copied))
        if mode == "actor":
            skeleton, info = prepare_for_actors(pipeline, copied)
            return cls(skeleton, info, is_model(pipeline), mode, type(pipeline).__doc__)
        in_tasks, info = prepare_for_tasks(pipeline, copied, method_names)
        return cls(in_tasks, info, is_model(pipeline), mode, type(pipeline).__doc__)

    @classmethod
    def _check_models(cls, pipeline: Any, models: Mapping[str, Any]) -> None:
        if not models:
            raise ArgumentError(
                f"{cls.__name__} found no model in this {type(pipeline).__name__}.",
                hint="give it an nn.Module, or an object that holds some.",
            )

    @classmethod
    def for_tasks(cls, model_or_pipeline: T, method_names: Sequence[str] | None = None) -> T:
        """The same as `from_model(..., mode="task").load()`.

        The result is used like the original, and every call of a model runs as a Ray task.

        Raises:
            As `from_model`.
        """
        return cls.from_model(model_or_pipeline, mode="task", method_names=method_names).load()

    def load(self, device: Any = None, _use_fast_load: bool = False) -> T:
        """Load the object. In actor mode, it is the live object. In task mode, its models run in Ray tasks.

        Args:
            device: the device of the models, None for the CPU. In task mode, it is their device in the tasks.
            _use_fast_load: ignored. `ray_zerocopy` has this argument; zerocopy always loads fast.

        Raises:
            As `Publication.load`.
        """
        if self._mode == "task" and device is not None:
            check_device_name(str(device), "load()")
        if isinstance(self._skeleton, RemoteModel):
            pipeline: Any = on_device(self._skeleton, device)
        elif self._mode == "actor":
            pipeline = self._skeleton.load(device)
        else:
            with models_on(device):
                pipeline = self._skeleton.load()
        return pipeline  # type: ignore[no-any-return]

    def close(self) -> None:
        """Release the weights, including those that plain pickle or a closure holds. Loaded objects keep what they use."""
        for publication in [self._published(), *(info.publication for info in self._model_info.values())]:
            publication.close()

    def _published(self) -> Publication:
        if isinstance(self._skeleton, RemoteModel):
            return publication_of(self._skeleton)
        return self._skeleton

    @property
    def model_refs(self) -> dict[str, ray.ObjectRef[Any]]:
        """References to the published weights, by the path of each model. Models that were published together share one."""
        return {path: info.publication.reference for path, info in self._model_info.items()}

    def serialize(self) -> dict[str, Any]:
        """The arguments of `deserialize`, as a dict."""
        return {
            "skeleton": self._skeleton,
            "model_info": self._model_info,
            "is_standalone_module": self._is_standalone_module,
            "mode": self._mode,
            "doc": self.__doc__,
        }

    @classmethod
    def deserialize(
        cls,
        skeleton: Publication | RemoteModel,
        model_info: Mapping[str, ModelInfo],
        is_standalone_module: bool = False,
        mode: Mode = "actor",
        doc: str | None = None,
    ) -> ModelWrapper[T]:
        """Create a wrapper from the result of `serialize`.

        Raises:
            ArgumentError: the arguments are not from `serialize`.
        """
        return cls(skeleton, model_info, is_standalone_module, mode, doc)

    def __repr__(self) -> str:
        published = self._published()
        models = ", ".join(f"{path} ({info.kind})" for path, info in self._model_info.items())
        return f"<zerocopy.{type(self).__name__} in {self._mode} mode: {models}; {published!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.serialize().values())


class JITModelWrapper(ModelWrapper[T]):
    """`ModelWrapper` for TorchScript programs (traced, scripted or frozen), and for objects that hold some."""

    @classmethod
    def _check_models(cls, pipeline: Any, models: Mapping[str, Any]) -> None:
        if not any(isinstance(model, TORCHSCRIPT) for model in models.values()):
            raise ArgumentError(
                f"{cls.__name__} found no TorchScript in this {type(pipeline).__name__}.",
                hint="use ModelWrapper, or compile the model with torch.jit.trace or torch.jit.script.",
            )


class TaskWrapper(Generic[T]):
    """An object that is used like the original that it wraps. Every call of a model in it runs as a Ray task.

    Its calls and its attributes are those of the original. `method_names` names methods of the models that run as tasks, in
    addition to `__call__`. It may also name methods of the original, which run in this process like all its own methods.

    Raises:
        As `ModelWrapper.from_model`.
    """

    _zerocopy_wrapper: type[ModelWrapper[Any]] = ModelWrapper

    def __init__(self, pipeline: T, method_names: Sequence[str] | None = ("__call__",)) -> None:
        _fill(self, self._zerocopy_wrapper.for_tasks(pipeline, method_names), type(pipeline).__doc__)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(vars(self)["_zerocopy_pipeline"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original. Each call of a model runs as a Ray task."""
        return vars(self)["_zerocopy_pipeline"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "_zerocopy_pipeline" not in vars(self) or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # it is being unpickled, or special methods are looked up, for example by `copy`
        return getattr(vars(self)["_zerocopy_pipeline"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_zerocopy_pipeline"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(vars(self)["_zerocopy_pipeline"], name)

    def __repr__(self) -> str:
        pipeline = vars(self)["_zerocopy_pipeline"]
        cls: Any = type(pipeline)
        has_no_repr = cls.__repr__ is object.__repr__
        return f"<zerocopy.{type(self).__name__} of {cls.__name__ if has_no_repr else repr(pipeline)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_task_wrapper, (type(self), vars(self)["_zerocopy_pipeline"], self.__doc__)


class JITTaskWrapper(TaskWrapper[T]):
    """`TaskWrapper` for TorchScript. `__call__` and `forward` run as tasks, in addition to `method_names`."""

    _zerocopy_wrapper = JITModelWrapper

    def __init__(self, pipeline: T, method_names: Sequence[str] | None = None) -> None:
        super().__init__(pipeline, method_names)


class ActorWrapper(Generic[T]):
    """A handle to a published model or pipeline that actors load, onto `device`.

    Raises:
        As `ModelWrapper.from_model`.
        DeviceError: torch knows no such device.
    """

    _zerocopy_wrapper: type[ModelWrapper[Any]] = ModelWrapper

    def __init__(self, pipeline: T, device: str | None = None, model_attr_names: Sequence[str] | None = None) -> None:
        check_device_name(device, f"{type(self).__name__} of {type(pipeline).__name__}")
        self._skeleton: ModelWrapper[T] = self._zerocopy_wrapper.from_model(pipeline, model_attr_names=model_attr_names)
        self.device = device
        self.__doc__ = self._skeleton.__doc__

    def load(self, device: Any = None) -> T:
        """Load the live pipeline, with its models in eval mode.

        Args:
            device: the device of the models. With None, it is the device of the wrapper, and without that the CPU.

        Raises:
            As `Publication.load`.
        """
        return self._skeleton.load(device if device is not None else self.device)

    @property
    def model_refs(self) -> dict[str, ray.ObjectRef[Any]]:
        """See `ModelWrapper.model_refs`."""
        return self._skeleton.model_refs

    @property
    def constructor_kwargs(self) -> dict[str, Any]:
        """The arguments of `load_pipeline_in_actor`, with the names of `ray_zerocopy`, for workers of Ray Data."""
        return {
            "pipeline_skeleton": self._skeleton,
            "model_refs": self.model_refs,
            "device": self.device,
            "use_fast_load": False,
        }

    def __repr__(self) -> str:
        return f"<zerocopy.{type(self).__name__} on {self.device or 'cpu'} of {self._skeleton!r}>"


class JITActorWrapper(ActorWrapper[T]):
    """`ActorWrapper` for TorchScript."""

    _zerocopy_wrapper = JITModelWrapper


def prepare_model_for_actors(model: Any) -> ray.ObjectRef[Any]:
    """Publish a bare model.

    Returns:
        A reference for `load_model_in_actor`, which may be passed to any process.

    Raises:
        ArgumentError: `model` is not a model.
        As `ModelWrapper.from_model`.
    """
    if not is_model(model):
        raise ArgumentError(
            f"prepare_model_for_actors expects a model, got {type(model).__name__!r}.",
            hint="use rewrite_pipeline_for_actors for an object that holds some.",
        )
    return object_store.put(ModelWrapper.from_model(model))


def load_model_in_actor(model_ref: Any, device: Any = None, use_fast_load: bool = False) -> Any:
    """Load the model of a reference that `prepare_model_for_actors` returned.

    Args:
        model_ref: the reference, or the object that Ray passed to a task or an actor in its place.
        device: the device of the model, None for the CPU.
        use_fast_load: ignored. `ray_zerocopy` has this argument; zerocopy always loads fast.

    Raises:
        ArgumentError: the reference is not from `prepare_model_for_actors`.
        As `Publication.load`.
    """
    wrapper = object_store.get(model_ref) if isinstance(model_ref, ray.ObjectRef) else model_ref
    return _wrapper_of(wrapper, "load_model_in_actor", "prepare_model_for_actors").load(device, use_fast_load)


def rewrite_pipeline_for_actors(
    pipeline: Any, model_attr_names: Sequence[str] | None = None
) -> tuple[ModelWrapper[Any], dict[str, ray.ObjectRef[Any]]]:
    """Publish the models of an object.

    Args:
        pipeline: the object that holds the models.
        model_attr_names: as in `ModelWrapper.from_model`.

    Returns:
        The arguments of `load_pipeline_in_actor`: a skeleton, and references to the weights by the path of each model.

    Raises:
        As `ModelWrapper.from_model`.
    """
    wrapper: ModelWrapper[Any] = ModelWrapper.from_model(pipeline, model_attr_names=model_attr_names)
    return wrapper, wrapper.model_refs


def load_pipeline_in_actor(
    skeleton: Any, model_refs: Mapping[str, ray.ObjectRef[Any]], device: Any = None, use_fast_load: bool = False
) -> Any:
    """Load the live object that `rewrite_pipeline_for_actors` published, with its models in eval mode.

    Args:
        skeleton: the first result of `rewrite_pipeline_for_actors`.
        model_refs: its second result.
        device: the device of the models, None for the CPU.
        use_fast_load: ignored. `ray_zerocopy` has this argument; zerocopy always loads fast.

    Raises:
        ArgumentError: the skeleton and the references do not belong to the same pipeline.
        As `Publication.load`.
    """
    wrapper = _wrapper_of(skeleton, "load_pipeline_in_actor", "rewrite_pipeline_for_actors")
    if not isinstance(model_refs, Mapping) or dict(model_refs) != wrapper.model_refs:
        raise ArgumentError(
            "load_pipeline_in_actor got references that are not those of this skeleton.",
            hint="pass both results of one call of rewrite_pipeline_for_actors.",
        )
    return wrapper.load(device, use_fast_load)


def rewrite_pipeline(pipeline: T, method_names: Sequence[str] | None = ("__call__",)) -> T:
    """The same as `ModelWrapper.for_tasks(pipeline, method_names)`."""
    return ModelWrapper.for_tasks(pipeline, method_names)


def _wrapper_of(found: Any, what: str, source: str) -> ModelWrapper[Any]:
    if not isinstance(found, ModelWrapper):
        raise ArgumentError(
            f"{what} expects the result of {source}, got {type(found).__name__!r}.", hint=f"call {source} first."
        )
    return found


def _fill(wrapper: TaskWrapper[Any], pipeline: Any, doc: str | None) -> None:
    vars(wrapper).update(_zerocopy_pipeline=pipeline, __doc__=doc)


def _rebuild_task_wrapper(cls: type[TaskWrapper[Any]], pipeline: Any, doc: str | None) -> TaskWrapper[Any]:
    wrapper = cls.__new__(cls)
    _fill(wrapper, pipeline, doc)
    return wrapper
