"""Which error does each misuse raise? The table lists them; each is raised as early as possible."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import pipelines
import pytest
import ray
import torch
from torch import nn

import zerocopy
from zerocopy import Copied, Shared, copied, errors, shared
from zerocopy._store import object_store
from zerocopy.testing import assert_zero_copy


def actor_on_a_function() -> None:
    @zerocopy.actor
    def answer() -> None: ...


def task_on_a_class() -> None:
    @zerocopy.task
    class Worker: ...


def pipeline_on_a_function() -> None:
    @zerocopy.pipeline
    def answer() -> None: ...


def task_on_async() -> None:
    @zerocopy.task
    async def answer() -> None: ...


def task_on_staticmethod() -> None:
    class Search:
        @zerocopy.task
        @staticmethod
        def answer() -> None: ...


def method_with_an_option_unknown_to_ray() -> None:
    class Worker(zerocopy.Actor):
        @zerocopy.method(num_return=2)
        def ask(self) -> None: ...


def method_on_a_class() -> None:
    zerocopy.method(nn.Linear)


def task_on_an_object() -> None:
    zerocopy.task(SimpleNamespace())


def unknown_task_option() -> None:
    @zerocopy.task(num_cpu=1)
    def answer() -> None: ...


def unknown_actor_option() -> None:
    @zerocopy.actor(color="red")
    class Worker: ...


def unknown_late_option() -> None:
    pipelines.Worker.options(max_restart=1)


def refused_value() -> None:
    zerocopy.task(num_cpus=-1)


def method_named_remote() -> None:
    @zerocopy.actor
    class Worker:
        def remote(self) -> None: ...


def method_named_pool_in_a_subclass() -> None:
    class Worker(pipelines.Worker):
        def pool(self) -> None: ...


def field_in_an_actor() -> None:
    @zerocopy.actor
    class Worker:
        search: Any = shared()


def two_policies() -> None:
    @zerocopy.pipeline
    class Search:
        encoder: Shared[nn.Module] = copied()


def policy_on_a_property() -> None:
    @zerocopy.pipeline
    class Search:
        encoder: Shared[nn.Module]

        @property
        def encoder(self) -> nn.Module: ...


def default_with_an_own_init() -> None:
    @zerocopy.pipeline
    class Search:
        top_k: int = copied(default=5)

        def __init__(self) -> None: ...


def annotated_default_with_an_own_init() -> None:
    @zerocopy.pipeline
    class Search:
        top_k: Annotated[int, copied(default=5)]

        def __init__(self) -> None: ...


def mandatory_after_default() -> None:
    @zerocopy.pipeline
    class Search:
        top_k: int = copied(default=5)
        encoder: nn.Module = shared()


def decorated_twice() -> None:
    @zerocopy.pipeline
    @zerocopy.pipeline
    class Search: ...


def marker_taken_by_a_dataclass() -> None:
    @zerocopy.pipeline
    @dataclass
    class Search:
        encoder: nn.Module = shared()


def actor_of_a_pipeline() -> None:
    @zerocopy.actor
    @zerocopy.pipeline
    class Search: ...


def slots_without_weakref() -> None:
    @zerocopy.pipeline
    class Search:
        __slots__ = ("encoder",)


def device_that_no_torch_knows() -> None:
    zerocopy.actor(device="gpu0")


def field_device_that_no_torch_knows() -> None:
    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared(device="gpu")


def missing_pipeline() -> None:
    pipelines.answer(query=1.0)


def missing_pipeline_of_an_actor() -> None:
    pipelines.Worker.remote(limit=3)


def missing_plain_argument() -> None:
    pipelines.answer(pipelines.search(width=2))


def wrong_class() -> None:
    pipelines.answer(pipelines.Assistant(), 1.0)


def wrong_class_of_an_actor() -> None:
    pipelines.Annotated.remote("search")


def pool_without_size() -> None:
    pipelines.Worker.pool(pipelines.search(width=2))


def map_over_a_string() -> None:
    pipelines.answer.map(pipelines.search(width=2), "queries")


def map_without_bound() -> None:
    pipelines.answer.map(pipelines.search(width=2), [1.0], max_in_flight=0)


def policy_without_parentheses() -> None:
    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = zerocopy.shared


def policy_without_parentheses_in_an_annotation() -> None:
    @zerocopy.pipeline
    class Search:
        encoder: Annotated[nn.Module, zerocopy.shared]


def annotation_without_policy() -> None:
    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = zerocopy.shared()
        of_all: ClassVar[int] = 3
        top_k: int = 5


def missing_field() -> None:
    pipelines.Search(index=torch.ones(1))


def unknown_field() -> None:
    pipelines.Search(encodr=nn.Linear(1, 1))


def publish_something_else() -> None:
    zerocopy.publish({"encoder": torch.ones(1)})


def publish_a_class() -> None:
    zerocopy.publish(pipelines.Search)


def fields_of_another_class() -> None:
    zerocopy.fields(dict)


def fields_of_an_instance() -> None:
    zerocopy.fields(pipelines.search(width=2))


def default_and_factory() -> None:
    copied(default=[], factory=list)


def factory_that_is_a_value() -> None:
    copied(factory=[])


def size_of_a_pool_as_text() -> None:
    pipelines.Worker.pool("4", pipelines.search(width=2))


def adopt_in_words() -> None:
    zerocopy.publish(nn.Linear(1, 1), adopt="yes")


def the_pipeline_as_its_source() -> None:
    search = pipelines.search(width=2)
    zerocopy.publish(search, name="search", source=search)


def a_source_with_arguments() -> None:
    zerocopy.publish(nn.Linear(1, 1), name="linear", source=nn.Linear)


def source_that_brings_the_weights() -> None:
    model = nn.Linear(2000, 2000)
    zerocopy.publish(model, name="linear", source=lambda: model)


def source_that_cannot_be_pickled() -> None:
    lock = threading.Lock()
    zerocopy.publish(nn.Linear(1, 1), name="linear", source=lambda: lock)


def lookup_of_a_number() -> None:
    zerocopy.lookup(3)


def version_as_text() -> None:
    zerocopy.set_alias("search", "latest", version="1")


def alias_of_nothing() -> None:
    zerocopy.set_alias("search", "latest")


def refresh_of_what_was_never_loaded() -> None:
    zerocopy.refresh(nn.Linear(1, 1))


def unshare_of_what_was_never_loaded() -> None:
    zerocopy.unshare(nn.Linear(1, 1))


def files_before_the_function() -> None:
    zerocopy.publish_checkpoint("model/", nn.Linear)


def dtype_as_text() -> None:
    zerocopy.publish_checkpoint(nn.Linear, "model/", dtype="bfloat16")


def one_process_id() -> None:
    zerocopy.memory_report(3)


def wrapper_without_from_model() -> None:
    zerocopy.ModelWrapper(nn.Linear(1, 1))


def attribute_names_as_a_number() -> None:
    zerocopy.ActorWrapper(pipelines.search(width=2), model_attr_names=[3])


def extracted_in_the_wrong_order() -> None:
    skeleton, tensors = zerocopy.extract_tensors(nn.Linear(1, 1))
    zerocopy.replace_tensors(tensors, skeleton)


def state_dict_instead_of_tensors() -> None:
    zerocopy.replace_tensors(nn.Linear(1, 1), nn.Linear(1, 1).state_dict())


def lock_in_a_copied_field() -> None:
    zerocopy.plan(pipelines.search(width=2, settings={"deep": [SimpleNamespace(guard=threading.Lock())]}))


def generator_in_a_module() -> None:
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].stream = (number for number in range(3))
    zerocopy.plan(module)


def meta_tensor() -> None:
    zerocopy.plan(pipelines.search(width=2, encoder=nn.Sequential(nn.Linear(2, 2, device="meta"))))


MISUSES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        actor_on_a_function,
        TypeError,
        "@zerocopy.actor expects a class, got function 'answer'. Hint: use @zerocopy.task.",
    ),
    (task_on_a_class, TypeError, "@zerocopy.task expects a function, got class 'Worker'. Hint: use @zerocopy.actor."),
    (
        pipeline_on_a_function,
        TypeError,
        "@zerocopy.pipeline expects a class, got function 'answer'. Hint: decorate the class; for a function use "
        "@zerocopy.task.",
    ),
    (
        task_on_async,
        TypeError,
        "@zerocopy.task cannot run the async function 'answer': Ray's tasks are not async. Hint: make it a plain "
        "function, or an async method of a @zerocopy.actor.",
    ),
    (
        task_on_staticmethod,
        TypeError,
        "@zerocopy.task cannot wrap a staticmethod. Hint: write @staticmethod above @zerocopy.task.",
    ),
    (method_with_an_option_unknown_to_ray, TypeError, "Ray refuses an option of the method 'ask': "),
    (
        method_on_a_class,
        TypeError,
        "@zerocopy.method expects a method, got class 'Linear'. Hint: use it inside of a class that starts actors.",
    ),
    (
        task_on_an_object,
        TypeError,
        "@zerocopy.task expects a function, got SimpleNamespace 'namespace()'. Hint: decorate a function or a method.",
    ),
    (
        unknown_task_option,
        TypeError,
        "'num_cpu' is not an option of Ray for a task. Hint: did you mean 'num_cpus'?",
    ),
    (
        unknown_actor_option,
        TypeError,
        "'color' is not an option of Ray for an actor. Hint: there are accelerator_type, ",
    ),
    (
        unknown_late_option,
        TypeError,
        "'max_restart' is not an option of Ray for an actor. Hint: did you mean 'max_restarts'?",
    ),
    (refused_value, TypeError, "Ray refuses an option of this task: "),
    (
        method_named_remote,
        TypeError,
        "Worker has a method 'remote', the name of one that @zerocopy.actor generates. Hint: rename it.",
    ),
    (
        method_named_pool_in_a_subclass,
        TypeError,
        "Worker has a method 'pool', the name of one that @zerocopy.actor generates. Hint: rename it.",
    ),
    (
        field_in_an_actor,
        TypeError,
        "Worker is an actor, but 'search' is a shared() field. Hint: fields belong to a class marked with "
        "@zerocopy.pipeline, which an actor takes as an argument.",
    ),
    (
        two_policies,
        TypeError,
        "Field 'encoder' of Search has two policies: its annotation says shared, its value copied(). Hint: keep one of "
        "them.",
    ),
    (
        policy_on_a_property,
        TypeError,
        "Field 'encoder' of Search has a policy, but it is a property, which holds no data of its own. Hint: annotate "
        "the attribute that the property reads instead.",
    ),
    (
        default_with_an_own_init,
        TypeError,
        "Search uses the __init__ of Search, so 'default' of field 'top_k' would have no effect. Hint: set the attribute "
        "in that __init__, or leave the __init__ out.",
    ),
    (
        annotated_default_with_an_own_init,
        TypeError,
        "Search uses the __init__ of Search, so 'default' of field 'top_k' would have no effect. Hint: ",
    ),
    (
        mandatory_after_default,
        TypeError,
        "Field 'encoder' of Search is mandatory, but a field before it has a default. Hint: declare 'encoder' with "
        "kw_only=True, or all of them with @zerocopy.pipeline(kw_only=True).",
    ),
    (decorated_twice, TypeError, "Search is marked with @zerocopy.pipeline already. Hint: decorate it once."),
    (
        marker_taken_by_a_dataclass,
        TypeError,
        "Field 'encoder' of Search was taken by @dataclass as a default value. Hint: use the annotations Shared[...] and "
        "Copied[...], or leave @dataclass out.",
    ),
    (
        actor_of_a_pipeline,
        TypeError,
        "Search is marked with @zerocopy.pipeline, so it cannot be an actor as well. Hint: write an actor class that takes it "
        "as an argument.",
    ),
    (
        slots_without_weakref,
        TypeError,
        "Search has __slots__ without '__weakref__', so zerocopy cannot recognize its instances again. Hint: add '__weakref__' "
        "to __slots__, or leave __slots__ out.",
    ),
    (
        device_that_no_torch_knows,
        ValueError,
        "@zerocopy.actor has device='gpu0', which torch does not know. Hint: use 'auto', 'cpu', or a name such as 'cuda:0'.",
    ),
    (
        field_device_that_no_torch_knows,
        ValueError,
        "Field 'encoder' of Search has device='gpu', which torch does not know. Hint: ",
    ),
    (
        missing_pipeline,
        TypeError,
        "answer() is missing its argument 'pipeline'. Hint: pass an instance of pipelines.Search, or a "
        "publication of one; its signature is answer(pipeline: 'Search', query: 'float') -> 'float'.",
    ),
    (
        missing_pipeline_of_an_actor,
        TypeError,
        "Worker() is missing its argument 'pipeline'. Hint: pass an instance of pipelines.Search, or a "
        "publication of one; its signature is Worker(pipeline: 'Search', limit: 'int' = 10)",
    ),
    (
        missing_plain_argument,
        TypeError,
        "answer() was called with arguments that do not fit: missing a required argument: 'query'. Hint: its signature is "
        "answer(pipeline: 'Search', query: 'float') -> 'float'.",
    ),
    (
        wrong_class,
        TypeError,
        "answer() expects pipelines.Search for 'pipeline', got 'pipelines.Assistant'. Hint: pass an instance of "
        "pipelines.Search, or a publication of one.",
    ),
    (wrong_class_of_an_actor, TypeError, "Annotated() expects pipelines.Search for 'pipeline', got 'str'. Hint: "),
    (pool_without_size, TypeError, "Worker.pool() expects a number of actors first, got <pipelines.Search object at "),
    (
        map_over_a_string,
        TypeError,
        "answer.map() iterates its last positional argument, which is 'str'. Hint: pass a list, or any other iterable, "
        "last; name the arguments after it.",
    ),
    (map_without_bound, TypeError, "max_in_flight=0 is not a positive number. Hint: leave it out, or give 1 or more."),
    (
        policy_without_parentheses,
        TypeError,
        "Field 'encoder' of Search has shared without parentheses. Hint: write shared().",
    ),
    (
        policy_without_parentheses_in_an_annotation,
        TypeError,
        "Field 'encoder' of Search has shared without parentheses. Hint: write shared().",
    ),
    (
        annotation_without_policy,
        TypeError,
        "'top_k' of Search has an annotation but no policy, so the generated __init__ would not take it. "
        "Hint: write copied(default=5)",
    ),
    (
        missing_field,
        TypeError,
        "Search() is missing the fields 'encoder' and 'settings'. Hint: its fields are Search(encoder, index, settings, ",
    ),
    (
        unknown_field,
        TypeError,
        "Search has no field 'encodr'. Hint: did you mean 'encoder'?",
    ),
    (
        publish_something_else,
        TypeError,
        "zerocopy.publish found no model to share in this 'dict'. Hint: give an nn.Module, or an object that holds some; ",
    ),
    (
        publish_a_class,
        TypeError,
        "zerocopy.publish expects an instance, got the class 'Search'. Hint: make an instance of it.",
    ),
    (
        fields_of_another_class,
        TypeError,
        "class 'dict' is not marked with @zerocopy.pipeline. Hint: decorate the class itself.",
    ),
    (
        fields_of_an_instance,
        TypeError,
        "zerocopy.fields expects a class, got an instance of Search. Hint: write zerocopy.fields(Search).",
    ),
    (default_and_factory, TypeError, "copied() takes default= or factory=, got both. Hint: leave one out."),
    (
        factory_that_is_a_value,
        TypeError,
        "factory=[] of copied() cannot be called. Hint: write factory=list, or use default=.",
    ),
    (
        size_of_a_pool_as_text,
        TypeError,
        "Worker.pool() expects a number of actors first, got '4'. Hint: write Worker.pool(4, ...).",
    ),
    (adopt_in_words, TypeError, "adopt='yes' is neither True nor False."),
    (
        the_pipeline_as_its_source,
        TypeError,
        "source= got a Search, not a function that makes it. Hint: give a function without arguments that makes it again.",
    ),
    (
        a_source_with_arguments,
        TypeError,
        "source=<class 'torch.nn.modules.linear.Linear'> needs arguments: missing a required argument: 'in_features'. Hint: ",
    ),
    (
        source_that_brings_the_weights,
        TypeError,
        "source=<function source_that_brings_the_weights.<locals>.<lambda> at ",
    ),
    (source_that_cannot_be_pickled, TypeError, "source=<function source_that_cannot_be_pickled.<locals>.<lambda> at "),
    (lookup_of_a_number, TypeError, "name=3 is not a name. Hint: give a string that is not empty."),
    (version_as_text, TypeError, "version='1' is not the number of a version. Hint: write version=1, say."),
    (
        alias_of_nothing,
        TypeError,
        "set_alias() takes a version or an alias to point at, got none. Hint: write version=1 or to='latest', say.",
    ),
    (
        refresh_of_what_was_never_loaded,
        TypeError,
        "This Linear was not loaded from a publication with a name. Hint: pass a pipeline that zerocopy.lookup(...).load() "
        "returned.",
    ),
    (
        unshare_of_what_was_never_loaded,
        TypeError,
        "This Linear was not loaded from a publication in this process. Hint: pass a pipeline that publication.load() "
        "returned, ",
    ),
    (
        files_before_the_function,
        TypeError,
        "publish_checkpoint() expects a function that makes the model, got a str. Hint: write publish_checkpoint(build, files), "
        "where build() makes the model.",
    ),
    (dtype_as_text, TypeError, "dtype='bfloat16' is not a dtype of torch. Hint: write dtype=torch.bfloat16, say."),
    (one_process_id, TypeError, "pids=3 is not a list of process ids. Hint: write pids=[os.getpid()], say."),
    (
        wrapper_without_from_model,
        TypeError,
        "ModelWrapper() expects the result of serialize(), got 'Linear'. Hint: for a model or an object with models write "
        "ModelWrapper.from_model(...).",
    ),
    (attribute_names_as_a_number, TypeError, "model_attr_names=[3] is not a list of names. Hint: "),
    (
        extracted_in_the_wrong_order,
        TypeError,
        "replace_tensors expects an nn.Module first, got 'list'. Hint: pass both results of one call of extract_tensors: "
        "replace_tensors(skeleton, tensors).",
    ),
    (
        state_dict_instead_of_tensors,
        TypeError,
        "replace_tensors expects a list of {'params': {name: array}, 'buffers': {name: array}}, one for each module. Hint: ",
    ),
    (
        lock_in_a_copied_field,
        TypeError,
        "\"search.settings['deep'][0].guard\" is a 'lock', which cannot leave its process: cannot pickle "
        "'_thread.lock' object. Hint: leave it out with __getstate__, or make it where it is used.",
    ),
    (generator_in_a_module, TypeError, "'sequential[0].stream' is a 'generator', which cannot leave its process: "),
    (
        meta_tensor,
        TypeError,
        "'search.encoder[0].weight' is a meta tensor: it has no data to share. Hint: load its weights first, as "
        "with load_state_dict(weights, assign=True).",
    ),
]


@pytest.mark.parametrize(("misuse", "builtin", "text"), MISUSES, ids=[misuse.__name__ for misuse, _, _ in MISUSES])
def test_misuse(misuse: Callable[[], object], builtin: type[Exception], text: str) -> None:
    """Each misuse raises, without Ray, an error with this message that is also a builtin error and can be pickled."""
    with pytest.raises(errors.ZeroCopyError) as caught:
        misuse()
    assert isinstance(caught.value, builtin)
    assert str(caught.value).startswith(text)
    if text.endswith("."):
        assert str(caught.value) == text
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), vars(again)) == (type(caught.value), str(caught.value), vars(caught.value))


def test_every_error_is_ours() -> None:
    """All errors have one base class, and each is also a builtin error."""
    tree = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    tree = [cls for cls in tree if cls.__module__ == errors.__name__ and not issubclass(cls, Warning)]
    assert len(tree) > 8
    for cls in tree:
        assert issubclass(cls, errors.ZeroCopyError)
        if cls is not errors.ZeroCopyError:
            assert any(base.__module__ == "builtins" for base in cls.__bases__)


def test_ray_client(monkeypatch: pytest.MonkeyPatch, cluster: None) -> None:
    """Every way to publish refuses a connection through Ray Client."""
    search = pipelines.search(width=2)
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    for use in (lambda: zerocopy.publish(search), lambda: pipelines.answer.remote(search, 1.0), object_store.require):
        with pytest.raises(
            errors.RayClientError, match=r"cannot work through Ray Client \(ray://\).*ray.init\(address='auto'\)"
        ):
            use()


def test_closed_publication(cluster: None) -> None:
    """A closed publication is also refused as an argument."""
    publication = zerocopy.publish(pipelines.search(width=2))
    publication.close()
    for use in (
        publication.load,
        lambda: pipelines.answer(publication, 1.0),
        lambda: pipelines.Worker.remote(publication),
    ):
        with pytest.raises(errors.PublicationClosedError, match="This publication of Search was closed"):
            use()


def test_a_publication_in_the_place_of_its_pipeline(cluster: None) -> None:
    """A function that needs a live pipeline refuses a publication with a hint."""
    publication = zerocopy.publish(pipelines.search(width=2))
    for use in (zerocopy.publish, zerocopy.plan, zerocopy.version_of, assert_zero_copy):
        with pytest.raises(errors.ArgumentError, match="got a publication. Hint: "):
            use(publication)
    with pytest.raises(
        errors.ArgumentError, match=r"zerocopy.publish expects .* got an ObjectRef. Hint: pass the object that ray.get"
    ):
        zerocopy.publish(publication.reference)
    with pytest.raises(
        errors.NotExposedError, match=r"A publication of Search has no attribute 'encoder'. .*load\(\).encoder"
    ):
        publication.encoder
    with pytest.raises(errors.NotExposedError, match=r"has no attribute 'version'. .*publish\(..., name=...\)"):
        publication.version


def test_copied_annotation_is_a_policy() -> None:
    """`Shared[...]` and `Copied[...]` are ordinary `Annotated` types."""
    assert Copied[int] == Annotated[int, Copied[int].__metadata__[0]]
    assert isinstance(Shared[torch.Tensor].__metadata__[0], type(shared()))
