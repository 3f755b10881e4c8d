"""How is a wrapped object published? For actors, as a whole. For tasks, each model separately, then the object around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch.export import ExportedProgram

from zerocopy._load.partial import names_of
from zerocopy._load.publication import Publication
from zerocopy._publish.publish import publish_subject
from zerocopy._split import paths
from zerocopy._split.introspect import Subject
from zerocopy._split.models import callable_models, models_in_train_mode, models_of
from zerocopy._split.programs import TORCHSCRIPT
from zerocopy._store import object_store
from zerocopy._wrap.remote_model import RemoteModel, class_of
from zerocopy.errors import ArgumentError


@attrs.frozen
class ModelInfo:
    """One model of a wrapper: the name of its class, its weights, and the methods that run as tasks."""

    kind: str
    publication: Publication
    methods: tuple[str, ...] = ()


def prepare_for_actors(pipeline: Any, copied: Sequence[str]) -> tuple[Publication, dict[str, ModelInfo]]:
    """Publish a pipeline for loads that put its models into eval mode. Also returns the information about each model, by path.

    Raises:
        As `publish`, except ArgumentError.
    """
    models = models_of(pipeline, copied)
    subject = Subject(pipeline, copied, to_eval=models_in_train_mode(pipeline))
    publication = publish_subject(subject, pipeline, (type(pipeline).__name__, "actor", *copied))
    return publication, {path: ModelInfo(class_of(model).__name__, publication) for path, model in models.items()}


def prepare_for_tasks(
    pipeline: Any, copied: Sequence[str], method_names: Sequence[str] | None
) -> tuple[Publication | RemoteModel, dict[str, ModelInfo]]:
    """Publish each model, and the pipeline with remote models instead. Also returns the information about each model, by path.

    Raises:
        ArgumentError: neither the pipeline nor a model has a method with one of these names.
        As `publish`.
    """
    models = callable_models(models_of(pipeline, copied))
    _check_methods(pipeline, models, method_names)
    object_store.require()
    remote, info = {}, {}
    for path, model in models.items():
        cls, methods = class_of(model), _exposed(model, method_names)
        publication = publish_subject(Subject(model, to_eval=models_in_train_mode(model)), model, ("model",))
        remote[path] = RemoteModel(publication, cls, methods)
        info[path] = ModelInfo(cls.__name__, publication, methods)
    if models.get("model") is pipeline:
        return remote["model"], info
    replaced = {id(model): remote[path] for path, model in models.items()}
    staying = [
        module
        for module in models_in_train_mode(pipeline)
        if not any(id(part) in replaced for part in module.modules())
    ]
    subject = Subject(pipeline, copied, replaced, to_eval=staying)
    return publish_subject(subject, pipeline, (type(pipeline).__name__, "task", *copied)), info


def attributes_to_copy(pipeline: Any, model_attr_names: Sequence[str] | None) -> list[str]:
    """The attributes that hold none of the models to share.

    Raises:
        ArgumentError: `pipeline` is a class, or it has no such attribute, or the attribute holds no model.
    """
    if isinstance(pipeline, type):
        raise ArgumentError(
            f"A model or an object with models is expected, got the class {pipeline.__name__!r}.",
            hint="make an instance of it.",
        )
    if model_attr_names is None:
        return []
    model_attr_names = names_of(model_attr_names, "model_attr_names")
    held = paths.attributes_of(pipeline)
    holding = [name for name, value in held.items() if models_of(value)]
    for name in model_attr_names:
        if name not in holding:
            problem = f"holds no model in {name!r}" if name in held else f"has no attribute {name!r}"
            raise ArgumentError(
                f"model_attr_names: this {type(pipeline).__name__} {problem}.",
                hint=f"it holds models in {', '.join(map(repr, holding))}." if holding else None,
            )
    listed = {id(held[name]) for name in model_attr_names}  # another attribute may hold a listed model too
    return [name for name, value in held.items() if name not in model_attr_names and id(value) not in listed]


def _check_methods(pipeline: Any, models: Mapping[str, Any], method_names: Sequence[str] | None) -> None:
    """Refuse names of missing methods. A method of the pipeline runs where it is called; its models run in tasks."""
    for name in () if method_names is None else names_of(method_names, "method_names"):
        if not _has_method(pipeline, name) and not any(_has_method(model, name) for model in models.values()):
            kinds = ", ".join(dict.fromkeys(class_of(model).__name__ for model in models.values()))
            raise ArgumentError(
                f"Neither this {class_of(pipeline).__name__} nor a model of it has a method {name!r} (models: {kinds}).",
                hint="name methods of the models or of the object that holds them, as in method_names=['encode'].",
            )


def _has_method(obj: Any, name: str) -> bool:
    return callable(getattr(obj, name, None))


def _exposed(model: Any, method_names: Sequence[str] | None) -> tuple[str, ...]:
    """The methods of a model that run as tasks."""
    if isinstance(model, ExportedProgram):
        return ("__call__",)
    if method_names is None:
        method_names = ("forward",) if isinstance(model, TORCHSCRIPT) else ()
    wanted = ("__call__", *method_names)
    return tuple(dict.fromkeys(name for name in wanted if _has_method(model, name)))
