"""Do the wrappers work with unchanged code of `ray_zerocopy` users, and what do they offer in addition?"""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import CPUS, ORDINARY, run_python, wait_until
from torch import nn

import zerocopy
from zerocopy import (
    ActorWrapper,
    JITActorWrapper,
    JITModelWrapper,
    JITTaskWrapper,
    ModelWrapper,
    TaskWrapper,
    load_model_in_actor,
    load_pipeline_in_actor,
    prepare_model_for_actors,
    rewrite_pipeline,
    rewrite_pipeline_for_actors,
)
from zerocopy.errors import CannotTravelError, DeviceError, PublicationClosedError
from zerocopy.memory import private_bytes
from zerocopy.testing import assert_zero_copy, shares_memory

WIDTH = 300
INPUT = torch.ones(2, WIDTH)

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class Model(nn.Module):
    """A model with a linear layer and dropout."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, value: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.dropout(self.linear(value)) * scale

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """Encode, and say where."""
        return torch.tensor([os.getpid(), int(self.training)])


class Pipeline:
    """A pipeline with an encoder, a decoder and a config dict."""

    def __init__(self) -> None:
        self.encoder = Model(1)
        self.decoder = Model(2)
        self.config = {"bias": 3.0}

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(value)) + self.config["bias"]

    def where(self) -> int:
        return os.getpid()

    def describe(self, value: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return the process of this method, and the result of the encoder's method."""
        return os.getpid(), self.encoder.encode(value)


class Nested:
    """A pipeline with models at every depth; one model occurs twice and two models are tied."""

    def __init__(self) -> None:
        self.stages = {"first": {"model": Model(1)}, "rest": [Model(2), (Model(3),)]}
        self._hidden = Model(4)
        self.again = self._hidden
        self.stages["rest"][0].linear.weight = self._hidden.linear.weight
        self.half = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        value = self.stages["first"]["model"](value)
        return self.again(self.stages["rest"][1][0](self.stages["rest"][0](value)))


class Compiled:
    """A pipeline of TorchScript programs."""

    def __init__(self) -> None:
        self.encoder = torch.jit.script(Model(1).eval())
        self.decoder = torch.jit.trace(Model(2).eval(), INPUT)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(value))


class Loader:
    """A worker for Ray Data, as users of `ray_zerocopy` write it."""

    def __init__(self, model_wrapper: Any) -> None:
        self.model = model_wrapper.load()
        assert_zero_copy(self.model.encoder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            return {"sum": self.model(torch.tensor(batch["value"])).sum(1).numpy()}


def expected(pipeline: Any) -> torch.Tensor:
    """The result of the original in eval mode."""
    twin = pickle.loads(pickle.dumps(pipeline))
    for model in vars(twin).values():
        if isinstance(model, nn.Module):
            model.eval()
    with torch.no_grad():
        return twin(INPUT)


# Actors.


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray Data warns about its own settings
@pytest.mark.parametrize(("wrap", "actors"), [(ModelWrapper.from_model, 2), (ActorWrapper, 1)])
def test_ray_data(wrap: Callable[[Any], Any], actors: int) -> None:
    """`map_batches` takes a wrapper as an argument of the constructor."""
    pipeline = Pipeline()
    rows = ray.data.from_items([{"value": INPUT[0].numpy()} for _ in range(16)])
    answers = rows.map_batches(
        Loader,
        fn_constructor_kwargs={"model_wrapper": wrap(pipeline)},
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=4,
        num_cpus=0.5,
    ).take_all()
    assert len(answers) == 16
    np.testing.assert_allclose([row["sum"] for row in answers], float(expected(pipeline)[0].sum()), rtol=1e-4)


@pytest.mark.long
def test_four_actors_share_one_copy_and_no_write() -> None:
    """Four plain Ray actors with one wrapper read one copy of the weights, and a write of one never reaches another."""

    @ray.remote(num_cpus=0.1)
    class Worker:
        def __init__(self, wrapper: Any) -> None:
            self.pipeline = wrapper.load()

        def answer(self) -> torch.Tensor:
            assert_zero_copy(self.pipeline.encoder)
            return self.pipeline(INPUT).detach()

        def write(self) -> None:
            with torch.no_grad():
                self.pipeline.encoder.linear.weight.zero_()

    pipeline = Pipeline()
    wrapper = ModelWrapper.from_model(pipeline, mode="actor")
    workers = [Worker.remote(wrapper) for _ in range(4)]
    ray.get(workers[0].write.remote())
    for answer in ray.get([worker.answer.remote() for worker in workers[1:]]):
        torch.testing.assert_close(answer, expected(pipeline))


def test_only_eval_mode_differs() -> None:
    """A loaded object differs from the original only in its models' eval mode, and the original is unchanged."""
    pipeline = Nested()
    pipeline.half.weight.requires_grad_(False)
    pipeline.again.linear.weight.tag = ["mine"]
    tag = pipeline.again.linear.weight.tag
    loaded = ModelWrapper.from_model(pipeline).load()
    models = [loaded.stages["first"]["model"], *loaded.stages["rest"][:1], loaded.stages["rest"][1][0], loaded._hidden]
    assert not any(module.training for model in models for module in model.modules())
    assert pipeline._hidden.training
    assert pipeline.again.dropout.training
    assert loaded.again is loaded._hidden
    assert loaded.stages["rest"][0].linear.weight is loaded._hidden.linear.weight
    assert loaded.half.weight.dtype is torch.bfloat16
    assert not loaded.half.weight.requires_grad
    assert loaded.again.linear.weight.tag == ["mine"]
    assert pipeline.again.linear.weight.tag is tag
    assert_zero_copy(loaded._hidden)
    assert_zero_copy(loaded.half)


def test_a_bare_model_and_what_is_said_of_it() -> None:
    """A wrapped bare model loads as this model; the wrapper lists and prints its models, and cannot be called."""
    wrapper = ModelWrapper.from_model(Model())
    assert isinstance(wrapper.load(), Model)
    assert wrapper._is_standalone_module
    assert wrapper._mode == "actor"
    assert wrapper.__doc__ == Model.__doc__
    assert list(wrapper._model_info) == list(wrapper.model_refs) == ["model"]
    assert all(isinstance(ref, ray.ObjectRef) for ref in wrapper.model_refs.values())
    assert not callable(wrapper)
    assert "Model" in repr(wrapper)
    assert "actor mode" in repr(wrapper)
    of_pipeline = ModelWrapper.from_model(Nested())
    assert set(of_pipeline._model_info) == {
        "stages['first']['model']", "stages['rest'][0]", "stages['rest'][1][0]", "_hidden", "half",
    }  # fmt: skip
    assert not of_pipeline._is_standalone_module


def test_attribute_names_limit_what_is_shared() -> None:
    """With `model_attr_names` only the models in these attributes are shared, and all models are in eval mode."""
    pipeline = Pipeline()
    wrapper = ModelWrapper.from_model(pipeline, model_attr_names=["encoder"])
    assert list(wrapper.model_refs) == ["encoder"]
    one, other = wrapper.load(), wrapper.load()
    assert shares_memory(one.encoder, other.encoder)
    assert not shares_memory(one.decoder, other.decoder)
    assert not one.decoder.training
    torch.testing.assert_close(one(INPUT).detach(), expected(pipeline))
    nested = ModelWrapper.from_model(Nested(), model_attr_names=["stages"])
    assert len(nested.model_refs) == 3
    task_mode = ModelWrapper.from_model(pipeline, mode="task", model_attr_names=["encoder"]).load()
    assert type(task_mode.decoder) is Model
    assert "in Ray tasks" in repr(task_mode.encoder)


def test_fields_of_a_pipeline_class_rule() -> None:
    """A wrapped instance of a pipeline class is shared and copied as its fields declare."""

    @zerocopy.pipeline
    class Declared:
        model: nn.Module = zerocopy.shared()
        index: torch.Tensor = zerocopy.shared()
        own: nn.Module = zerocopy.copied()

        def __call__(self, value: torch.Tensor) -> torch.Tensor:
            return self.own(self.model(value)) + self.index

    declared = Declared(Model(1), torch.ones(WIDTH), Model(2))
    loaded = ModelWrapper.from_model(declared).load()
    assert_zero_copy(loaded)
    assert not loaded.own.training
    answer = loaded(INPUT).detach()
    in_tasks = ModelWrapper.for_tasks(declared)
    assert_zero_copy(in_tasks)
    assert type(in_tasks.own) is Model
    torch.testing.assert_close(in_tasks(INPUT), answer)


@pytest.mark.alone
@pytest.mark.parametrize("pickler", [pickle, ray.cloudpickle])
def test_pickles(pickler: Any) -> None:
    """Wrappers work after plain pickle and Ray's pickle, also in another process."""

    @ray.remote
    def load(content: bytes) -> Any:
        return pickle.loads(content).load()(INPUT).detach()

    pipeline = Pipeline()
    for wrapper in (ModelWrapper.from_model(pipeline), ActorWrapper(pipeline)):
        content = pickler.dumps(wrapper)
        assert repr(pickle.loads(content)) == repr(wrapper)
        torch.testing.assert_close(ray.get(load.remote(content)), expected(pipeline))
    tasks = pickle.loads(pickler.dumps(TaskWrapper(pipeline)))
    torch.testing.assert_close(tasks(INPUT), expected(pipeline))


def test_serialize_and_deserialize() -> None:
    """`deserialize` makes an equal wrapper from the result of `serialize`, in both modes."""
    for mode in ("actor", "task"):
        wrapper = ModelWrapper.from_model(Pipeline(), mode=mode)
        again = ModelWrapper.deserialize(**wrapper.serialize())
        assert repr(again) == repr(wrapper)
        assert again.model_refs == wrapper.model_refs
        torch.testing.assert_close(again.load()(INPUT).detach(), expected(Pipeline()))


def test_weights_are_written_once(store_use: Callable[[], int]) -> None:
    """Wrapping again in another mode or for other attributes, or publishing, writes no weights again."""
    pipeline = Pipeline()
    weights = 2 * 4 * WIDTH * WIDTH
    kept = [ModelWrapper.from_model(pipeline), ModelWrapper.from_model(pipeline)]
    kept += [ModelWrapper.from_model(pipeline, mode="task"), ActorWrapper(pipeline, model_attr_names=["decoder"])]
    kept += [zerocopy.publish(pipeline.encoder)]
    assert weights < store_use() < 1.3 * weights


def test_the_wrapper_keeps_no_model_alive() -> None:
    """A wrapped model can be dropped, because the wrapper has only references to the store."""
    weakly = []
    for mode in ("actor", "task"):
        model = Model()
        wrapper = ModelWrapper.from_model(model, mode=mode)
        weakly.append((__import__("weakref").ref(model), wrapper))
        del model
    __import__("gc").collect()
    assert [ref() for ref, _ in weakly] == [None, None]


class Merging(nn.Linear):
    """Merges its adapter into its weight when it changes to eval mode, like LoRA layers."""

    merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if not mode and not self.merged:
            self.weight.data += 1
            self.requires_grad_(False)
            self.merged = True
        return self


class Restoring(nn.Linear):
    """Writes to its buffer when it is unpickled."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("cache", torch.ones(4))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.cache.zero_()


def test_the_original_is_never_touched() -> None:
    """Changes that models make to themselves in eval mode or when unpickled affect only the loaded object, not the original."""
    merging, restoring = Merging(4, 4), Restoring()
    holder = {"merging": merging, "restoring": restoring}
    before = merging.weight.detach().clone()
    for given in (merging, holder):
        for wrap in (ModelWrapper.from_model, ModelWrapper.for_tasks):
            wrapped = wrap(given)
            loaded = wrapped.load() if isinstance(wrapped, ModelWrapper) else None
            if isinstance(loaded, Merging):
                assert torch.equal(loaded.weight, before + 1)
    zerocopy.extract_tensors(merging)
    zerocopy.extract_tensors(restoring)
    assert torch.equal(merging.weight, before)
    assert merging.weight.requires_grad
    assert merging.training
    assert not merging.merged
    assert restoring.cache.all()


def test_classes_of_a_script_stay_themselves(address: str) -> None:
    """Wrapping changes no class, function or global of `__main__`, because it unpickles nothing."""
    done = run_python(
        "import sys, ray, torch, zerocopy\n"
        "from torch import nn\n"
        "ray.init(sys.argv[1], log_to_driver=False)\n"
        "COUNT = 0\n"
        "class Model(nn.Linear):\n"
        "    seen = []\n"
        "class P:\n"
        "    registry = []\n"
        "    def __init__(self): self.encoder = Model(4, 4)\n"
        "    def __call__(self, x):\n"
        "        global COUNT\n"
        "        COUNT += 1\n"
        "        return self.encoder(x)\n"
        "p, call, registry, seen = P(), P.__call__, P.registry, Model.seen\n"
        "zerocopy.ModelWrapper.from_model(p)\n"
        "zerocopy.ModelWrapper.from_model(p, mode='task')\n"
        "zerocopy.extract_tensors(p.encoder)\n"
        "p(torch.ones(1, 4))\n"
        "assert (P.__call__ is call, P.registry is registry, Model.seen is seen, COUNT) == (True, True, True, 1)\n",
        "-",
        address,
    )
    assert done.returncode == 0, done.stderr


def test_a_dict_is_written_once(store_use: Callable[[], int]) -> None:
    """Wrapping a dict, which allows no weak references, several times also writes its weights once."""
    pipeline = {"model": Model()}
    kept = [ModelWrapper.from_model(pipeline) for _ in range(3)]
    assert store_use() < 1.5 * 4 * WIDTH * WIDTH
    assert isinstance(kept[0].load()["model"], Model)


@pytest.mark.alone
def test_close_frees_what_plain_pickle_holds(store_use: Callable[[], int]) -> None:
    """`close()` also frees weights for which plain pickles have references, which Ray cannot count."""
    wrapper = ModelWrapper.from_model(Pipeline())
    pickle.dumps(wrapper)
    assert store_use() > 4 * WIDTH * WIDTH
    wrapper.close()
    assert wait_until(lambda: store_use() < 100_000)


def test_a_listed_model_may_have_another_name() -> None:
    """`model_attr_names` shares a model also if another attribute refers to it."""
    pipeline = Pipeline()
    pipeline.alias = pipeline.encoder
    wrapper = ModelWrapper.from_model(pipeline, model_attr_names=["encoder"])
    one, other = wrapper.load(), wrapper.load()
    assert one.alias is one.encoder
    assert shares_memory(one.encoder, other.encoder)


def test_devices() -> None:
    """The device of `load` has priority over the wrapper's device; a device that does not exist is refused by `load`."""
    wrapper = ActorWrapper(Pipeline(), device="cpu")
    assert wrapper.load().encoder.linear.weight.device.type == "cpu"
    for load in (wrapper.load, ModelWrapper.from_model(Model()).load):
        with pytest.raises(ValueError, match="This process has no device 'cuda:77'"):
            load(device="cuda:77")
    with pytest.raises(DeviceError, match="This process has no device 'cuda:77'"):
        ActorWrapper(Pipeline(), device="cuda:77").load()
    with pytest.raises(DeviceError, match="does not know"):
        ActorWrapper(Pipeline(), device="nonsense")
    tasks = ModelWrapper.from_model(Pipeline(), mode="task").load(device="cuda:77")
    with pytest.raises(DeviceError, match="This process has no device 'cuda:77'"):
        tasks(INPUT)


# Tasks.


@pytest.mark.parametrize("wrap", [ModelWrapper.for_tasks, TaskWrapper, rewrite_pipeline])
def test_each_call_of_a_model_is_a_task(wrap: Callable[..., Any]) -> None:
    """The pipeline's own code runs in this process, and each call of a model runs in a Ray task, in eval mode."""
    pipeline = Pipeline()
    wrapped = wrap(pipeline, method_names=("__call__", "encode"))
    torch.testing.assert_close(wrapped(INPUT), expected(pipeline))
    assert wrapped.where() == os.getpid()
    pid, training = wrapped.encoder.encode(INPUT).tolist()
    assert pid != os.getpid()
    assert not training
    assert wrapped.config == {"bias": 3.0}
    wrapped.config = {"bias": 4.0}
    torch.testing.assert_close(wrapped(INPUT), expected(pipeline) + 1)
    assert pipeline.config == {"bias": 3.0}
    assert pipeline.encoder.training


def test_what_stands_for_a_model() -> None:
    """The object in place of a model is an instance of its class, has its signatures, and refuses methods that it lacks."""
    wrapped = ModelWrapper.for_tasks(Pipeline(), method_names=("encode",))
    assert isinstance(wrapped.encoder, nn.Module)
    assert isinstance(wrapped.encoder, Model)
    assert str(inspect.signature(wrapped.encoder)) == "(value: 'torch.Tensor', scale: 'float' = 1.0) -> 'torch.Tensor'"
    assert str(inspect.signature(wrapped.encoder.encode)) == "(value: 'torch.Tensor') -> 'torch.Tensor'"
    assert wrapped.encoder.encode.__doc__ == "Encode, and say where."
    with pytest.raises(AttributeError, match=r"in Ray tasks, which expose __call__, encode and no 'parameters'"):
        wrapped.encoder.parameters()
    torch.testing.assert_close(wrapped.encoder(INPUT, scale=2.0), 2 * ModelWrapper.for_tasks(Model(1))(INPUT))


def test_nested_models_in_tasks() -> None:
    """Models at any depth become tasks, each found once; references as arguments are resolved, as in Ray."""
    pipeline = Nested()
    wrapped = ModelWrapper.for_tasks(pipeline)
    assert wrapped.again is wrapped._hidden
    loaded = ModelWrapper.from_model(pipeline).load()
    torch.testing.assert_close(wrapped(INPUT), loaded(INPUT).detach())
    torch.testing.assert_close(wrapped._hidden(ray.put(INPUT)), loaded._hidden(INPUT).detach())


@pytest.mark.long
def test_tasks_from_a_worker() -> None:
    """A task-mode pipeline that is passed to a task calls its models from there, each in its own task."""

    @ray.remote
    def answer(wrapped: Any) -> tuple[int, int, torch.Tensor]:
        return os.getpid(), int(wrapped.encoder.encode(INPUT)[0]), wrapped(INPUT)

    pipeline = Pipeline()
    for wrapped in (
        TaskWrapper(pipeline, ("encode",)),
        ModelWrapper.for_tasks(pipeline, ("encode",)),
    ):
        caller, callee, found = ray.get(answer.remote(wrapped))
        assert caller != callee
        torch.testing.assert_close(found, expected(pipeline))


class Layers:
    """A pipeline with models in a `ModuleList`, and with a bound method of one of them."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList([Model(1), Model(2)])
        self.run = self.layers[0].encode

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            value = layer(value)
        return value + len(self.layers)


def test_containers_and_bound_methods() -> None:
    """The modules in a `ModuleList` become tasks, and a bound method of one of them runs as a task."""
    pipeline = Layers()
    wrapped = ModelWrapper.for_tasks(pipeline, method_names=("encode",))
    torch.testing.assert_close(wrapped(INPUT), ModelWrapper.from_model(pipeline).load()(INPUT).detach())
    assert wrapped.run(INPUT)[0] != os.getpid()
    assert [type(layer) is not Model for layer in wrapped.layers] == [True, True]
    assert list(ModelWrapper.from_model(pipeline, mode="task").model_refs) == ["layers[0]", "layers[1]"]


class Keywords(nn.Module):
    def forward(self, value: torch.Tensor, model: str, method: str) -> tuple[str, str]:
        return model, method

    def numbers(self) -> np.ndarray:
        return np.arange(100_000)


def test_calls_are_like_the_original() -> None:
    """Keyword arguments may have any name, and returned arrays are writable."""
    wrapped = ModelWrapper.for_tasks(Keywords(), ("numbers",))
    assert wrapped(INPUT, model="a", method="b") == ("a", "b")
    numbers = wrapped.numbers()
    numbers += 1


def test_exported_programs() -> None:
    """An exported program can run in tasks."""
    program = torch.export.export(Model().eval(), (INPUT,))
    torch.testing.assert_close(ModelWrapper.for_tasks(program)(INPUT), program.module()(INPUT).detach())


@pytest.mark.long
def test_actors_that_hold_every_cpu() -> None:
    """A model call from an actor runs even if actors hold all CPUs, because it uses the CPU of its waiting caller."""

    @ray.remote(num_cpus=CPUS / 2)
    class Caller:
        def __init__(self, wrapped: Any) -> None:
            self.wrapped = wrapped

        def go(self) -> torch.Tensor:
            return self.wrapped(INPUT)

    pipeline = Pipeline()
    callers = [Caller.remote(TaskWrapper(pipeline)) for _ in range(2)]
    for answer in ray.get([caller.go.remote() for caller in callers], timeout=60):
        torch.testing.assert_close(answer, expected(pipeline))


def test_a_task_wrapper_is_itself() -> None:
    """A task wrapper allows setting, reading and deleting any attribute, and its deep copy is also a wrapper."""
    wrapped = TaskWrapper(Pipeline())
    wrapped._pipeline = 3
    assert wrapped._pipeline == 3
    del wrapped._pipeline
    assert not hasattr(wrapped, "_pipeline")
    assert type(copy.deepcopy(wrapped)) is TaskWrapper


def test_an_error_in_a_model_arrives() -> None:
    """A call raises the error that the model raised in its task."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ModelWrapper.for_tasks(Pipeline())(torch.ones(1, 7))


# TorchScript.


def programs() -> dict[str, Any]:
    return {
        "scripted": torch.jit.script(Model().eval()),
        "traced": torch.jit.trace(Model().eval(), INPUT),
        "frozen": torch.jit.freeze(torch.jit.script(Model().eval())),
    }


@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen"])
@pytest.mark.parametrize("wrapper", [JITModelWrapper, ModelWrapper])
def test_torchscript(kind: str, wrapper: type[ModelWrapper[Any]]) -> None:
    """Every kind of program loads, and runs in tasks by `__call__` and `forward`, also with `ModelWrapper`."""
    program = programs()[kind]
    answer = program(INPUT).detach()
    torch.testing.assert_close(wrapper.from_model(program).load()(INPUT).detach(), answer)
    tasks = wrapper.for_tasks(program)
    torch.testing.assert_close(tasks(INPUT), answer)
    torch.testing.assert_close(tasks.forward(INPUT), answer)
    assert isinstance(tasks, torch.jit.ScriptModule)


def test_torchscript_pipelines() -> None:
    """A pipeline of programs works in both wrappers, and its loads share memory."""
    pipeline = Compiled()
    answer = pipeline(INPUT).detach()
    torch.testing.assert_close(JITTaskWrapper(pipeline)(INPUT), answer)
    wrapper = JITActorWrapper(pipeline, device="cpu")
    torch.testing.assert_close(wrapper.load()(INPUT).detach(), answer)
    assert list(wrapper.model_refs) == ["encoder", "decoder"]
    one, other = wrapper.load(), wrapper.load()
    assert shares_memory(one.encoder, other.encoder)


class Wide(nn.Module):
    """A model of 40 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(10)])

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.layers(value)


@pytest.mark.long
def test_torchscript_is_zero_copy() -> None:
    """A worker that loads and runs a program, frozen or not, needs less than 2 % of its weights as private memory."""

    @ray.remote(num_cpus=0.1)
    class Worker:
        def warm_up(self, wrapper: Any) -> None:
            for _ in range(3):
                wrapper.load()(torch.ones(1, 1000))

        def growth(self, wrapper: Any) -> int:
            before = private_bytes()
            self.program = wrapper.load()
            self.program(torch.ones(1, 1000))
            return private_bytes() - before

    worker = Worker.remote()
    for finish in (lambda program: program, torch.jit.freeze):
        other, wrapper = (JITModelWrapper.from_model(finish(torch.jit.script(Wide().eval()))) for _ in range(2))
        ray.get(worker.warm_up.remote(other))
        growths = [ray.get(worker.growth.remote(wrapper)) for _ in range(3)]
        assert min(growths) < 0.02 * 40_000_000, growths


# Functions.


def test_functions_for_models() -> None:
    """A reference from `prepare_model_for_actors` can be loaded in any process, also after Ray resolved it as an argument."""

    @ray.remote
    def load(given: Any) -> torch.Tensor:
        reference = given["model_ref"] if isinstance(given, dict) else given
        model = load_model_in_actor(reference, device="cpu", use_fast_load=True)
        assert_zero_copy(model)
        return model(INPUT).detach()

    model = Model()
    reference = prepare_model_for_actors(model)
    assert isinstance(reference, ray.ObjectRef)
    answers = ray.get([load.remote({"model_ref": reference}), load.remote(reference)])
    for answer in answers:
        torch.testing.assert_close(answer, model.eval()(INPUT).detach())


@pytest.mark.long
def test_functions_for_pipelines() -> None:
    """A pipeline can be loaded from its skeleton and references, passed by hand or from `constructor_kwargs`."""
    pipeline = Pipeline()
    skeleton, model_refs = rewrite_pipeline_for_actors(pipeline)
    assert list(model_refs) == ["encoder", "decoder"]

    class Worker:
        def __init__(self, pipeline_skeleton: Any, model_refs: Any, device: Any, use_fast_load: bool) -> None:
            self.pipeline = load_pipeline_in_actor(pipeline_skeleton, model_refs, device, use_fast_load)

        def answer(self) -> torch.Tensor:
            return self.pipeline(INPUT).detach()

    actors = [
        ray.remote(num_cpus=0.1)(Worker).remote(skeleton, model_refs, None, False),
        ray.remote(num_cpus=0.1)(Worker).remote(**ActorWrapper(pipeline).constructor_kwargs),
    ]
    for answer in ray.get([actor.answer.remote() for actor in actors]):
        torch.testing.assert_close(answer, expected(pipeline))


def test_methods_of_the_pipeline_may_be_named() -> None:
    """`method_names` may name a method of the pipeline: it runs in this process, and its model calls run in tasks."""
    pipeline = Pipeline()
    for wrapped in (
        TaskWrapper(pipeline, ("__call__", "describe", "encode")),
        ModelWrapper.for_tasks(pipeline, method_names=["describe", "where", "encode"]),
        rewrite_pipeline(pipeline, ("encode", "describe")),
    ):
        where, of_encoder = wrapped.describe(INPUT)
        assert where == os.getpid()
        assert int(of_encoder[0]) != os.getpid()
        torch.testing.assert_close(wrapped(INPUT), expected(pipeline))
    in_actor = ModelWrapper.from_model(pipeline, mode="actor", method_names=["describe"]).load()
    assert in_actor.where() == os.getpid()


# Misuse.


MISUSES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ModelWrapper.from_model(Model(), mode="both"), ValueError, "mode='both' is neither 'actor' nor 'task'"),
    (lambda: ModelWrapper.from_model({"no": "model"}), TypeError, "found no model in this dict"),
    (lambda: TaskWrapper(object()), TypeError, "found no model in this object"),
    (lambda: ModelWrapper.from_model(Model), TypeError, "class 'Model'.*make an instance"),
    (
        lambda: ModelWrapper.from_model(Pipeline(), model_attr_names=["encoder", "decodr"]),
        TypeError,
        "this Pipeline has no attribute 'decodr'.*holds models in 'encoder', 'decoder'",
    ),
    (
        lambda: ModelWrapper.from_model(Pipeline(), model_attr_names=["config"]),
        TypeError,
        "this Pipeline holds no model in 'config'",
    ),
    (lambda: ModelWrapper.from_model(Pipeline(), model_attr_names="encoder"), TypeError, "is a string"),
    (lambda: TaskWrapper(Pipeline(), "forward"), TypeError, "is a string"),
    (lambda: ModelWrapper.from_model(Model(), mode="task").load(device="nonsense"), ValueError, "does not know"),
    (
        lambda: TaskWrapper(Pipeline(), ("generate",)),
        TypeError,
        "Neither this Pipeline nor a model of it has a method 'generate' .models: Model.",
    ),
    (lambda: JITModelWrapper.from_model(Model()), TypeError, "no TorchScript in this Model.*use ModelWrapper"),
    (lambda: JITTaskWrapper(Pipeline()), TypeError, "no TorchScript in this Pipeline.*use ModelWrapper"),
    (lambda: JITActorWrapper(Model()), TypeError, "no TorchScript in this Model.*use ModelWrapper"),
    (lambda: prepare_model_for_actors(Pipeline()), TypeError, "rewrite_pipeline_for_actors"),
    (lambda: load_model_in_actor(ray.put(3)), TypeError, "expects the result of prepare_model_for_actors, got 'int'"),
    (
        lambda: load_pipeline_in_actor(rewrite_pipeline_for_actors(Pipeline())[0], {}),
        TypeError,
        "not those of this skeleton",
    ),
]


@pytest.mark.parametrize(("call", "kind", "words"), MISUSES, ids=[words[:40] for _, _, words in MISUSES])
def test_misuse(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    """Each misuse raises an error at once, with a clear message."""
    with pytest.raises(kind, match=words):
        call()


def test_what_cannot_travel_is_named() -> None:
    """A wrapped object with a lock is refused with the path of the lock."""
    pipeline = Pipeline()
    pipeline.encoder.lock = __import__("threading").Lock()
    with pytest.raises(CannotTravelError, match=r"pipeline\.encoder\.lock"):
        ModelWrapper.from_model(pipeline)


@pytest.mark.long
def test_without_ray_and_after_it(tmp_path: Path) -> None:
    """A wrapper raises a clear error in a process without Ray, and after its cluster has ended."""
    content = tmp_path / "wrapper.pickle"
    writer = (
        "import pickle, ray, torch, zerocopy\n"
        "ray.init('local', num_cpus=1, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)\n"
        "wrapper = zerocopy.ModelWrapper.from_model(torch.nn.Linear(300, 300))\n"
        f"open({str(content)!r}, 'wb').write(pickle.dumps(wrapper))\n"
        "ray.shutdown()\n"
        "try: wrapper.load()\n"
        "except zerocopy.errors.PublicationLostError as error: print(error)\n"
    )
    done = run_python(writer, **ORDINARY)
    assert "belongs to a connection to Ray that has ended" in done.stdout, done.stderr
    reader = f"import pickle, zerocopy\npickle.load(open({str(content)!r}, 'rb')).load()\n"
    done = run_python(reader)
    assert "This publication of Linear needs Ray, which is not running in this process. Hint: connect" in done.stderr
    with pytest.raises(zerocopy.errors.PublicationLostError, match="another cluster"):
        pickle.loads(content.read_bytes()).load()


def test_a_closed_store() -> None:
    """A closed wrapper raises an error."""
    wrapper = ModelWrapper.from_model(Model())
    wrapper.close()
    with pytest.raises(PublicationClosedError):
        wrapper.load()
