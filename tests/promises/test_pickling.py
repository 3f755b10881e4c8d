"""Do objects arrive as with Ray's own pickle, also on zerocopy's faster ways, and do actors run every kind of `__init__`?"""

from __future__ import annotations

import asyncio
import contextlib
import copyreg
import functools
import itertools
import logging
import pickle
import sys
import threading
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import hypothesis.strategies as st
import numpy as np
import pipelines
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from observing import difference, observe
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import zerocopy
from zerocopy import copied, shared
from zerocopy._publish.publish import publish_automatically
from zerocopy._split.modules import ModuleReducer
from zerocopy._split.skeleton import Split, graft, strip
from zerocopy._split.zones import Zone
from zerocopy.errors import CannotTravelError
from zerocopy.testing import assert_zero_copy, shares_memory

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),
]  # torch and Ray warn about their own code
WEIGHT = torch.arange(5000.0)


@zerocopy.pipeline
class Holder:
    """A pipeline with one shared field of any kind."""

    value: Any = shared()


# Registered serializers:


@contextlib.contextmanager
def registered(
    cls: type, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any] | None = None
) -> Iterator[None]:
    table: Any = ray.cloudpickle.CloudPickler.dispatch
    brought = table.get(cls) if cls is TextIOWrapper else None
    ray.util.register_serializer(cls, serializer=serializer, deserializer=deserializer or ByThePair)
    try:
        yield
    finally:
        ray.util.deregister_serializer(cls)
        if brought is not None:  # Ray also removes cloudpickle's own reducer for this type
            table[cls] = brought


class ByThePair:
    """The result of a registered pair of serializer and deserializer."""

    def __init__(self, content: Any) -> None:
        self.content = content


class Guarded(nn.Module):
    """A module that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.guard = threading.Lock()


def guarded_of(weight: nn.Parameter) -> Guarded:
    module = Guarded()
    module.weight = weight
    return module


class Labelled(torch.Tensor):
    """A tensor subclass."""


class Tagged(nn.Parameter):
    """A parameter subclass."""


class Titled(np.ndarray):
    """An array subclass."""


class Engine:
    """Not a module, but has a module and a lock."""

    def __init__(self) -> None:
        self.net = nn.Linear(2, 2)
        self.guard = threading.Lock()


class Pair(NamedTuple):
    first: Any
    second: Any


@zerocopy.pipeline
class Inner:
    """A pipeline inside another pipeline."""

    net: nn.Module = shared()
    rest: Any = copied(default=1)


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(2, 2))


REGISTRABLE: dict[str, Callable[[], Any]] = {
    "a module": lambda: nn.Linear(2, 2),
    "a module that pickle refuses": Guarded,
    "a parametrized module": parametrized,
    "TorchScript": lambda: torch.jit.script(nn.Linear(2, 2)),
    "an exported program": lambda: torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)),
    "a subclass of tensors": lambda: torch.ones(3).as_subclass(Labelled),
    "a subclass of parameters": lambda: Tagged(torch.ones(3)),
    "a meta tensor of a subclass": lambda: torch.ones(3, device="meta").as_subclass(Labelled),
    "a subclass of arrays": lambda: np.ones(3).view(Titled),
    "a weak reference": lambda: weakref.ref(WEIGHT),
    "an open file": lambda: Path(__file__).open(),  # noqa: SIM115
    "an object that holds a module": Engine,
    "a pipeline inside": lambda: Inner(nn.Linear(2, 2)),
    "a named tuple": lambda: Pair(1, 2),
}


@pytest.mark.parametrize("kind", REGISTRABLE)
@pytest.mark.parametrize("zone", [Zone.SHARED, Zone.AUTO, Zone.COPIED])
def test_a_registered_pair_wins(kind: str, zone: Zone) -> None:
    """A serializer that is registered with Ray is used until it is deregistered, and its result is searched for tensors."""
    # It is used once for an object that occurs twice. After it is deregistered, the object is pickled, or refused, as before.
    obj = REGISTRABLE[kind]()
    holder = nn.Module()
    holder.held = [obj, {"again": obj}]
    before = outcome(holder, zone)
    with registered(type(obj), lambda _: {"weight": WEIGHT}):
        assert pickle.loads(ray.cloudpickle.dumps([obj, obj]))[0].content["weight"] is not WEIGHT
        back = joined(holder, zone)
        assert type(back.held[0]) is ByThePair
        assert back.held[1]["again"] is back.held[0]
        assert back.held[0].content["weight"] is WEIGHT, "a tensor of the pair was not walked on"
    assert outcome(holder, zone) == before
    getattr(obj, "close", lambda: None)()


def joined(obj: Any, zone: Zone, **options: Any) -> Any:
    """The object after `strip` and `graft`, with the same tensors."""
    stripped = strip([obj], zone=zone, split=Split.NOWHERE, **options)
    return graft(stripped.payload, stripped.externals)[0]


def outcome(holder: Any, zone: Zone) -> Any:
    """The type of the held object after the round trip, or the kind of the object that is refused."""
    try:
        return type(joined(holder, zone).held[0]).__name__
    except CannotTravelError as error:
        return error.kind


def test_registered_modules_are_shared() -> None:
    """A module with a lock can be published with a registered pair, in any place; its weights are views of the store."""

    @zerocopy.pipeline
    class Found:
        def __init__(self, module: nn.Module) -> None:
            self.modules = [module]

    module = Guarded()
    with pytest.raises(CannotTravelError, match=r"holder.value.guard' is a 'lock'"):
        zerocopy.publish(Holder(module))
    with registered(Guarded, lambda module: module.weight, guarded_of):
        assert [entry.path for entry in zerocopy.plan(Found(module)).entries if entry.policy == "shared"] == [
            "found.modules[0]"
        ]
        for pipeline in (Holder(module), Found(module), module):
            publication = zerocopy.publish(pipeline)
            assert publication.shared_bytes == WEIGHT.nbytes
            one, other = publication.load(), publication.load()
            assert_zero_copy(one)
            assert shares_memory(one, other)
        assert ray.get(weight_sum.remote(Holder(module))) == float(WEIGHT.sum())  # this worker has registered nothing
    with pytest.raises(CannotTravelError, match="lock"):
        zerocopy.publish(module)


@ray.remote
def weight_sum(holder: Holder) -> float:
    assert type(holder.value) is Guarded
    return float(holder.value.weight.detach().sum())


@pytest.mark.parametrize("cls", [torch.Tensor, nn.Parameter, np.ndarray])
def test_tensors_and_arrays_themselves_are_always_shared(cls: type) -> None:
    """Tensors, parameters and arrays are shared also if a serializer is registered for their type, as Ray does itself."""
    value = {torch.Tensor: WEIGHT, nn.Parameter: nn.Parameter(WEIGHT), np.ndarray: WEIGHT.numpy()}[cls]
    with registered(cls, lambda _: None):
        loaded = zerocopy.publish(Holder([value])).load()
        assert_zero_copy(loaded)
        assert type(loaded.value[0]) is cls


@zerocopy.pipeline
class Sealed:
    """A pipeline for which a user registers a serializer."""

    net: nn.Module = shared()
    own: nn.Module = copied()
    guard: Any = copied(default=None)

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]


def sealed_of(parts: tuple[Any, ...]) -> Sealed:
    net, more = parts
    return Sealed(net, more["own"], "made where it is used")


def test_a_registered_pipeline() -> None:
    """A user's serializer for a pipeline replaces zerocopy's reducer until it is deregistered, and fields keep their policies."""
    sealed = Sealed(nn.Linear(4, 4), nn.Linear(4, 4), threading.Lock())
    with registered(Sealed, lambda sealed: (sealed.net, {"own": sealed.own}), sealed_of):
        publication = zerocopy.publish(sealed)
        one, other = publication.load(), publication.load()
        assert one.guard == "made where it is used"
        assert shares_memory(one.net, other.net)
        assert not shares_memory(one.own, other.own)
        assert publication.shared_bytes == 80
        assert ray.get(ray.put(sealed)).guard == "made where it is used"
    sealed.guard = None
    with pytest.raises(AssertionError, match="not a view"):
        assert_zero_copy(ray.get(ray.put(sealed)).own)
    assert_zero_copy(ray.get(ray.put(sealed)).net)


def test_copyreg_counts_too() -> None:
    """A reducer that `copyreg` has for a module, a pipeline or a tensor subclass is used."""
    made = {nn.Linear: nn.Linear(2, 2), Labelled: torch.ones(3).as_subclass(Labelled), Sealed: None}
    made[Sealed] = Sealed(nn.Linear(2, 2), nn.Linear(2, 2), threading.Lock())
    for cls, obj in made.items():
        copyreg.pickle(cls, lambda _: (ByThePair, (WEIGHT,)))  # type: ignore[arg-type, return-value]
        try:
            assert zerocopy.publish(Holder([obj])).load().value[0].content.sum() == WEIGHT.sum()
        finally:
            copyreg.dispatch_table.pop(cls)


class Frozen(nn.Module):
    """A module whose `__reduce__` returns bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def __reduce__(self) -> Any:
        return frozen_of, (pickle.dumps(self.inner.state_dict()),)


def frozen_of(content: bytes) -> Frozen:
    module = Frozen()
    module.inner.load_state_dict(pickle.loads(content))
    return module


@pytest.mark.parametrize("cls", [nn.Linear, Labelled, Frozen], ids=["registered", "a tensor", "a reduction of its own"])
def test_what_is_pickled_as_bytes_is_published_again_when_it_changes(cls: Any) -> None:
    """A change of a module or tensor that pickles as bytes is detected by its own tensors."""
    obj = torch.ones(3).as_subclass(Labelled) if cls is Labelled else cls(2, 2) if cls is nn.Linear else cls()
    tensor = obj if cls is Labelled else next(obj.parameters())
    holder = nn.ModuleList([nn.Linear(1, 1)])
    holder.held = obj
    pair = registered(cls, lambda obj: pickle.dumps(tensor.tolist())) if cls is not Frozen else contextlib.nullcontext()
    with pair:
        first, again = publish_automatically(holder), publish_automatically(holder)
        assert first.reference == again.reference
        with torch.no_grad():
            tensor.add_(1)
        changed = publish_automatically(holder)
        assert changed.reference != first.reference
        held = changed.load().held
        content = next(held.parameters()).tolist() if cls is Frozen else pickle.loads(held.content)
        assert content == tensor.tolist()


def test_wrapped_objects_are_registered_too() -> None:
    """A registered pair also applies to an object in a `ModelWrapper`."""
    engine = Engine()
    with registered(Engine, lambda engine: engine.net):
        wrapper = zerocopy.ModelWrapper.from_model(engine, mode="actor")
        assert type(wrapper.load().content) is nn.Linear
        wrapper.close()


# Classes with unusual bases, reducers, slots and states:

T = TypeVar("T")


class Described(Protocol):
    def describe(self) -> str: ...


class Mixed:
    """A base class with empty slots."""

    __slots__ = ()


BASES: dict[str, tuple[Any, ...]] = {
    "a module": (nn.Module,),
    "a generic module": (nn.Module, Generic[T]),
    "a module with a protocol": (nn.Module, Described),
    "a module with a mixin": (Mixed, nn.Module),
    "a linear module": (nn.Linear,),
    "a dict": (nn.Module, dict),
    "a list": (nn.Module, list),
    "an ordered dict": (nn.Module, OrderedDict),
    "a user's dict": (nn.Module, UserDict),
    "a set": (nn.Module, set),
    "a deque": (nn.Module, deque),
    "an exception": (nn.Module, Exception),
    "a tuple": (nn.Module, tuple),
    "a string": (nn.Module, str),
    "a number": (nn.Module, int),
    "an object": (object,),
    "an object that is a list": (list,),
    "an object that is a tuple": (tuple,),
    "a named tuple": (Pair,),
    "a tensor": (torch.Tensor,),
}
CONTENTS = {dict: ({"a": WEIGHT},), list: ([WEIGHT, 1],), set: ({1, 2},), deque: ([WEIGHT],), Exception: ("a", WEIGHT)}
NEW = {Pair: (WEIGHT, 1), tuple: ((WEIGHT, 1),), str: ("text",), int: (5,), torch.Tensor: (torch.ones(3),)}
SLOTTED = ("none", "filled", "empty", "inherited")
STATES = ("its own", "less", "more", "tuple", "none", "another", "set by itself")
REDUCERS = ("none", "reduce", "reduce_ex", "copyreg", "registered", "getnewargs", "getnewargs_ex", "new")
SPECS = st.tuples(*map(st.sampled_from, (tuple(BASES), SLOTTED, STATES, REDUCERS)), st.booleans())
_count = itertools.count()


class WithSlot:
    __slots__ = ("inherited",)


@functools.cache
def class_of(base: str, slots: str, state: str, reducer: str) -> Any:
    """A class with these properties, in this module so that it is pickled by reference; None if Python does not allow it."""
    body: dict[str, Any] = {"__module__": __name__, "__hash__": object.__hash__, **state_methods(state)}
    bases = BASES[base]
    if slots != "none":
        body["__slots__"] = ("kept", "unset") if slots != "inherited" else ()
        bases = (*bases, WithSlot) if slots == "inherited" else bases
    body |= reducing_methods(reducer, dict(NEW).get(bases[0], ()))
    name = f"Odd{next(_count)}"
    try:
        cls = types.new_class(name, bases, exec_body=lambda members: members.update(body))
    except TypeError:  # variable-size types allow no slots, and two layouts conflict
        return None
    return globals().setdefault(name, cls)


def state_methods(state: str) -> dict[str, Any]:
    def shown(self: Any) -> dict[str, Any]:
        return dict(getattr(self, "__dict__", {}))

    def set_state(self: Any, state: Any) -> None:
        members = state if isinstance(state, dict) else state[0] if isinstance(state, (tuple, list)) else {}
        getattr(self, "__dict__", {}).update(members or {})
        object.__setattr__(self, "seen_state", repr(type(state)))

    methods: dict[str, Any] = {
        "less": {"__getstate__": lambda self: {k: v for k, v in shown(self).items() if k != "extra"}},
        "more": {"__getstate__": lambda self: {**shown(self), "more": WEIGHT}},
        "tuple": {"__getstate__": lambda self: (shown(self), {}), "__setstate__": set_state},
        "none": {"__getstate__": lambda self: None},
        "another": {"__getstate__": lambda self: [shown(self)], "__setstate__": set_state},
        "set by itself": {"__setstate__": set_state},
    }
    return methods.get(state, {})


def made_bare(cls: Any, *content: Any) -> Any:
    return cls.__new__(cls, *content)


def reducing_methods(reducer: str, content: tuple[Any, ...]) -> dict[str, Any]:
    def reduced(self: Any) -> Any:
        return made_bare, (type(self), *new_arguments(type(self))), dict(getattr(self, "__dict__", {}))

    def new(cls: Any, *args: Any) -> Any:
        obj = super(cls, cls).__new__(cls, *args)
        with contextlib.suppress(AttributeError):  # a class with slots only
            object.__setattr__(obj, "by_new", 1)
        return obj

    methods: dict[str, Any] = {
        "reduce": {"__reduce__": reduced},
        "reduce_ex": {"__reduce_ex__": lambda self, protocol: reduced(self)},
        "getnewargs": {"__getnewargs__": lambda self: new_arguments(type(self))},
        "getnewargs_ex": {"__getnewargs_ex__": lambda self: (new_arguments(type(self)), {})},
        "new": {"__new__": new},
    }
    return methods.get(reducer, {})


def new_arguments(cls: Any) -> tuple[Any, ...]:
    return next((content for base, content in NEW.items() if issubclass(cls, base)), ())


def instance_of(cls: Any, slots: str, initialized: bool) -> Any:
    """An instance with a value in every attribute and slot that its class allows."""
    obj = cls.__new__(cls, *new_arguments(cls))
    if issubclass(cls, nn.Module) and initialized:
        with contextlib.suppress(
            TypeError
        ):  # if torch.compile was used before, `__init__` needs weak references at its end
            nn.Linear.__init__(obj, 2, 2) if issubclass(cls, nn.Linear) else nn.Module.__init__(obj)
        obj.child = nn.Linear(2, 2)
        obj.tied = obj.child
    for base, content in CONTENTS.items():
        if issubclass(cls, base):
            base.__init__(obj, *content)
    if slots in ("filled", "inherited"):
        object.__setattr__(obj, "kept" if slots == "filled" else "inherited", ["in a slot", WEIGHT])
    for name, value in (("extra", [WEIGHT]), ("by_new", 2)):
        with contextlib.suppress(AttributeError, TypeError):  # a class with slots only
            object.__setattr__(obj, name, value)
    return obj


@contextlib.contextmanager
def reducer_registered(cls: Any, reducer: str) -> Iterator[None]:
    def reduce(obj: Any) -> Any:
        return ByThePair, ([WEIGHT, dict(getattr(obj, "__dict__", {}))],)

    if reducer == "registered":
        with registered(cls, lambda obj: reduce(obj)[1][0]):
            yield
    elif reducer == "copyreg":
        copyreg.pickle(cls, reduce)
        yield
        copyreg.dispatch_table.pop(cls)
    else:
        yield


def by_ray(obj: Any) -> Any:
    """The observed result of Ray's pickle for an object; None if it cannot be pickled."""
    try:
        return observe(pickle.loads(ray.cloudpickle.dumps(obj)))
    except Exception:
        return None


WAYS: dict[str, dict[str, Any]] = {
    "the short way": {"zone": Zone.SHARED},
    "the long way": {"zone": Zone.SHARED, "number_code": True},
    "copied": {"zone": Zone.COPIED},
    "found": {"zone": Zone.AUTO},
}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(SPECS)
def test_what_pickle_keeps_is_kept(spec: tuple[str, str, str, str, bool]) -> None:
    """An object of an unusual class arrives as with Ray's pickle: with its type, items, attributes, bytes and identities."""
    *described, initialized = spec
    _, slots, _, reducer = described
    cls = class_of(*described)
    if cls is None:
        return
    obj = instance_of(cls, slots, initialized)
    held = [obj, WEIGHT, {"again": obj}]
    with reducer_registered(cls, reducer):
        expected = by_ray(held)
        if expected is None:
            return
        for way, options in WAYS.items():
            assert not difference(expected, observe(joined(held, **options))), (way, cls.__bases__)
        if next(_count) % 5 == 0:
            loaded = zerocopy.publish(Holder(held)).load()
            assert not difference(expected, observe(loaded.value)), cls.__bases__


def test_most_of_the_odd_classes_travel() -> None:
    """Ray's pickle takes some classes of each base and each reducer, so the test above does compare objects."""
    compared = set()
    for base, slots, state, reducer in itertools.product(BASES, ("none",), ("its own", "more"), REDUCERS):
        cls = class_of(base, slots, state, reducer)
        with reducer_registered(cls, reducer):
            if by_ray(instance_of(cls, slots, True)) is not None:
                compared |= {base, reducer}
    assert compared >= {*BASES, *REDUCERS} - {"a tuple", "a number"}, "these may fail after torch.compile was used"


def test_modules_without_weak_references() -> None:
    """A module that allows no weak references, such as a tuple, is published only once until it changes."""
    module = instance_of(class_of("a tuple", "none", "its own", "none"), "none", True)
    assert not type(module).__weakrefoffset__
    holder = Holder([module])
    first, again = publish_automatically(holder), publish_automatically(holder)
    module.child.bias = nn.Parameter(torch.ones(2))
    changed = publish_automatically(holder)
    assert first.reference == again.reference != changed.reference


class Slotted:
    """An object with slots."""

    __slots__ = ("cache", "unset")


class SlottedTensor(torch.Tensor):
    __slots__ = ("label",)


class StatedTensor(torch.Tensor):
    def __getstate__(self) -> Any:
        return "stated"

    def __setstate__(self, state: Any) -> None:
        self.set_by = state


class DictModule(nn.Module, dict):
    """A module that is also a dict."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def test_states_of_tensors() -> None:
    """A tensor subclass keeps its slots and attributes, and its own `__setstate__` is used."""
    slotted, stated = WEIGHT.clone().as_subclass(SlottedTensor), WEIGHT.clone().as_subclass(StatedTensor)
    slotted.label, slotted.more = "in a slot", "an attribute"
    first, second = zerocopy.publish(Holder([slotted, stated])).load().value
    assert (first.label, first.more, second.set_by) == ("in a slot", "an attribute", "stated")
    assert_zero_copy([first, second])


def test_parametrized_modules_of_odd_classes() -> None:
    """A parametrized module that is a dict and has its own state methods keeps its parametrization, items and state."""

    class Odd(nn.Linear, dict):
        __hash__ = object.__hash__  # type: ignore[assignment]

        def __getstate__(self) -> Any:
            return {name: value for name, value in vars(self).items() if name != "guard"}

        def __setstate__(self, state: Any) -> None:
            super().__setstate__({**state, "set_by": "itself"})

    module = parametrizations.weight_norm(Odd(3, 3))
    module["item"], module.guard = WEIGHT, threading.Lock()
    loaded = zerocopy.publish(Holder(module)).load().value
    assert parametrize.is_parametrized(loaded, "weight")
    assert torch.equal(loaded.weight, module.weight)
    assert torch.equal(loaded["item"], WEIGHT)
    assert loaded.set_by == "itself"
    assert not hasattr(loaded, "guard")


def test_what_new_makes_stays() -> None:
    """Attributes that `__new__` sets and the state leaves out exist after loading."""

    class Locked(nn.Module):
        def __new__(cls) -> Locked:
            module = super().__new__(cls)
            object.__setattr__(module, "guard", threading.Lock())
            return module

        def __init__(self) -> None:
            made = self.guard
            super().__init__()
            object.__setattr__(self, "guard", made)

        def __getstate__(self) -> dict[str, Any]:
            return {name: value for name, value in vars(self).items() if name != "guard"}

    assert zerocopy.publish(Locked()).load().guard.acquire()


def test_a_reducer_of_one_instance() -> None:
    """A `__reduce_ex__` that is set on one instance is used, as in pickle."""
    module = nn.Linear(2, 2)
    module.__reduce_ex__ = lambda _: (ByThePair, (WEIGHT,))  # type: ignore[method-assign, assignment]
    assert pickle.loads(ray.cloudpickle.dumps(module)).content.shape == WEIGHT.shape
    for zone in (Zone.SHARED, Zone.AUTO):
        assert joined([module], zone)[0].content is WEIGHT


def test_arrays_that_set_themselves() -> None:
    """An array subclass with its own `__setstate__` is loaded with it."""

    class Set(np.ndarray):
        def __reduce__(self) -> Any:
            function, arguments, state = super().__reduce__()
            return function, arguments, (*state, "own")

        def __setstate__(self, state: Any) -> None:
            self.label = state[-1]
            super().__setstate__(state[:-1])

    loaded = zerocopy.publish(Holder(np.arange(9.0).view(Set))).load().value
    assert (loaded.label, loaded.tolist()) == ("own", np.arange(9.0).tolist())


def test_ordinary_modules_take_the_short_way() -> None:
    """Modules with generic bases are reduced in the fast way; modules with content besides their members are not."""
    reduce = ModuleReducer().reduce
    cls = class_of("a generic module", "none", "its own", "none")
    assert reduce(nn.Linear(2, 2)) is not None
    assert reduce(instance_of(cls, "none", True)) is not None
    assert reduce(DictModule()) is None


@zerocopy.pipeline
class Shelf(dict):
    """A pipeline that is a dict."""

    net: nn.Module = shared()
    own: Any = copied()

    def __init__(self, net: nn.Module, own: Any) -> None:
        self.net, self.own = net, own


@zerocopy.pipeline
class Chain(nn.Module, list):
    """A pipeline that is a module and a list."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    net: nn.Module = shared()
    own: Any = copied()

    def __init__(self, net: nn.Module, own: Any) -> None:
        super().__init__()
        self.net, self.own = net, own


@pytest.mark.parametrize("cls", [Shelf, Chain])
def test_pipelines_that_are_containers(cls: Any) -> None:
    """In a pipeline that is a container, items that are modules are shared, and items that a copied field also has are copied."""
    pipeline = cls(nn.Linear(4, 4), nn.Linear(4, 4))
    items = [nn.Linear(4, 4), pipeline.own, pipeline.net, WEIGHT, pipeline]
    pipeline.extend(items) if cls is Chain else pipeline.update(enumerate(items))
    publication = zerocopy.publish(pipeline)
    one, other = publication.load(), publication.load()
    assert type(one) is cls
    assert len(one) == 5
    assert one[4] is one
    assert shares_memory(one[0], other[0])
    assert one[2] is one.net
    assert one[1] is one.own
    assert not shares_memory(one.own, other.own)
    assert torch.equal(one[3], WEIGHT)
    (found,) = [entry.path for entry in zerocopy.plan(pipeline).entries if entry.path.endswith("[0]")]
    assert found == f"{cls.__name__.lower()}[0]"
    assert len(ray.get(ray.put(pipeline))) == 5


def test_classes_by_value() -> None:
    """Instances of unusual classes that no worker can import arrive with all their content."""

    class Local(nn.Module, dict):
        __hash__ = object.__hash__  # type: ignore[assignment]

    class Named(Pair):
        pass

    held = Local()
    held["item"], held.inner = [WEIGHT, held], nn.Linear(2, 2)
    named = Named(held, WEIGHT)
    named.note = "an attribute"
    expected = observe([held, named])
    assert ray.get(observed.remote(zerocopy.publish(Holder([held, named])))) == expected


@ray.remote
def observed(publication: zerocopy.Publication) -> Any:
    return observe(publication.load().value)


def test_an_object_with_attributes_is_one_in_both_parts() -> None:
    """A tuple subclass with attributes stays one object if a shared and a copied field both have it."""

    class Named(Pair):
        pass

    @zerocopy.pipeline
    class Both:
        first: Any = shared()
        second: Any = copied()

    named = Named(WEIGHT, 1)
    named.note = "an attribute"
    loaded = zerocopy.publish(Both([named], [named])).load()
    assert loaded.first[0] is loaded.second[0]


# Refused objects and their paths:


def exported() -> Any:
    return torch.export.export(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),))


def exported_with(lock: Any) -> Any:
    program = exported()
    program.constants["table"] = lock
    return program


def exported_on_meta(_: Any) -> Any:
    program = exported()
    program.state_dict["0.weight"] = nn.Parameter(torch.empty(2, 2, device="meta"))
    return program


def scripted_on_meta(_: Any) -> Any:
    with torch.device("meta"):
        return torch.jit.script(nn.Sequential(nn.Linear(2, 2)))


def keyword_default(lock: Any) -> Any:
    def function(*, key: Any = lock) -> None: ...

    return function


def default(lock: Any) -> Any:
    def function(key: Any = lock) -> None: ...

    return function


def with_attribute(lock: Any) -> Any:
    def function() -> None: ...

    function.lock = lock  # type: ignore[attr-defined]
    return function


def closure(lock: Any) -> Any:
    return lambda: lock


def with_hook(lock: Any) -> Any:
    module = nn.Linear(2, 2)
    module.register_state_dict_post_hook(lambda *_: lock)
    return module


def with_parametrization(lock: Any) -> Any:
    module = parametrized()
    module.parametrizations.weight[0].lock = lock
    return module


def in_an_array(lock: Any) -> Any:
    array = np.empty(2, object)
    array[1] = lock
    return array


def in_a_dict_module(lock: Any) -> Any:
    module = DictModule()
    module["item"] = lock
    return module


class Giving(nn.Module):
    """A module whose `__reduce__` adds a lock that the module itself does not have."""

    def __init__(self, _: Any = None) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))

    def __reduce__(self) -> Any:
        return Giving, (None,), {**vars(self), "made": {"deep": threading.Lock()}}


def local_class(lock: Any) -> Any:
    class Local:
        held = lock

    return Local


PATHS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a constant of an exported program": (exported_with, ".constants['table']"),
    "a meta tensor of an exported program": (exported_on_meta, ".state_dict['0.weight']"),
    "a meta tensor of TorchScript": (scripted_on_meta, "[0].weight"),
    "a default of a function": (default, ".__defaults__[0]"),
    "a keyword's default": (keyword_default, ".__kwdefaults__['key']"),
    "an attribute of a function": (with_attribute, ".lock"),
    "a closure": (closure, ".<closure 'lock'>"),
    "a partial": (lambda lock: functools.partial(max, lock), ".args[0]"),
    "a slot": (lambda lock: with_slot(lock), ".cache"),
    "a hook": (with_hook, "._state_dict_hooks["),
    "a parametrization": (with_parametrization, ".parametrizations.weight[0].lock"),
    "an array of objects": (in_an_array, ".flat[1]"),
    "an exception": (lambda lock: ValueError("text", lock), ".args[1]"),
    "a dict module": (in_a_dict_module, "['item']"),
    "a factory of defaults": (lambda lock: defaultdict(lambda: lock), ".default_factory."),
    "a mapping proxy": (lambda lock: types.MappingProxyType({"a": lock}), "['a']"),
    "the reduction of a module": (Giving, ""),
    "the keys of a dict": (lambda lock: {lock: 1}.keys(), ""),
    "a local class": (local_class, ""),
}


def with_slot(lock: Any) -> Any:
    module = Slotted()
    module.cache = lock
    return module


@pytest.mark.parametrize("kind", PATHS)
def test_what_is_refused_has_a_path(kind: str) -> None:
    """The error has the path of the refused object, or of the object whose pickle contains it."""
    make, below = PATHS[kind]
    culprit = make(threading.Lock())
    for pipeline, start in ((Holder({"net": culprit}), "holder.value['net']"), (Holder(culprit), "holder.value")):
        with pytest.raises(CannotTravelError) as caught:
            zerocopy.plan(pipeline)
        assert caught.value.path.startswith(start + below)
        assert below or str(caught.value).startswith(
            f"{start!r} brings along a 'lock', which cannot leave its process: "
        )
        assert caught.value.kind in ("lock", "Tensor", "Parameter")


def test_a_program_alone_has_a_path() -> None:
    """An error about an exported program that is published directly has a path too."""
    with pytest.raises(
        CannotTravelError, match=r"^\"exportedprogram.constants\['table'\]\" is a 'lock', which cannot leave"
    ):
        zerocopy.publish(exported_with(threading.Lock()))


def test_what_a_registered_pair_gives_has_a_path() -> None:
    """If a user's serializer returns a lock, the error has the path of the serialized object."""
    engine = Engine()
    with (
        registered(Engine, lambda engine: [engine.net, threading.Lock()]),
        pytest.raises(CannotTravelError, match=r"^'holder.value\[1\]' brings along a 'lock', which cannot leave"),
    ):
        zerocopy.publish(Holder([engine.net, engine]))


def test_hints_for_meta_tensors() -> None:
    """The hint for meta tensors is to load the weights, or, after offloading by accelerate, to load without offloading."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(
        CannotTravelError, match=r"Hint: load its weights first, as with load_state_dict\(weights, assign=True\)"
    ):
        zerocopy.publish(Holder(model))
    model[0]._hf_hook = "an AlignDevicesHook, as accelerate's add_hook_to_module leaves it"
    with pytest.raises(
        CannotTravelError, match="Hint: accelerate has offloaded its weights: load the model without"
    ) as caught:
        zerocopy.publish(Holder(model))
    assert "to_empty" not in str(caught.value)
    model[0].to_empty(device="cpu")
    with pytest.raises(CannotTravelError, match=r"'holder.value\[1\].weight'.*Hint: load its weights first"):
        zerocopy.publish(Holder(model))


# The `__init__` of actors, and Ray's advice to async actors:


class Base:
    """An undecorated class with an async `__init__`."""

    async def __init__(self, pipeline: Any) -> None:
        await asyncio.sleep(0)
        self.pipeline = pipeline


@zerocopy.actor(num_cpus=0.1)
class Derived(Base):
    """Inherits the async `__init__`."""


class Further(Derived):
    """Overrides the async `__init__`, and has an async method that loads."""

    async def __init__(self, pipeline: pipelines.Search, limit: int = 3) -> None:
        await super().__init__(pipeline)
        self.limit = limit

    async def loaded(self, publication: zerocopy.Publication, passed: pipelines.Search) -> Any:
        """Load in every way, and return results and the messages of Ray's logger before and after a `ray.get` in this method."""
        with logged() as texts:
            here = publication.load()
            there = await asyncio.to_thread(publication.load)
            for pipeline in (self.pipeline, passed, here, there):
                assert_zero_copy(pipeline)
            local = pipelines.answer.local(here, 2.0)
            advice_before = ray._private.worker.blocking_get_inside_async_warned or bool(texts)
            ray.get(ray.put(1))
        return self.limit, local, there(2.0), advice_before, [text for text in texts if "blocking ray.get" in text]


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ray._private.worker").addHandler(handler)
    yield texts
    logging.getLogger("ray._private.worker").removeHandler(handler)


def test_async_init_and_quiet_loads() -> None:
    """An async `__init__` gets its arguments loaded, and no load causes Ray's advice against a blocking `ray.get`."""
    search = pipelines.search(width=32)
    publication = zerocopy.publish(search)
    actor = Further.remote(search, limit=4)
    limit, local, there, advice_before, texts = ray.get(actor.loaded.remote(publication, search))
    assert (limit, local, there) == (4, search(2.0), search(2.0))
    assert not advice_before
    assert len(texts) == 1, "the author's own ray.get is still told"


def test_what_init_gives_is_handed_on() -> None:
    """Python refuses a wrong `__init__`, such as a generator, with the same error as in a plain class."""

    def generator(self: Any) -> Iterator[int]:
        yield 1

    async def coroutine(self: Any) -> None: ...

    async def async_generator(self: Any) -> Any:
        yield 1

    @functools.wraps(coroutine)
    def wrapped(self: Any) -> Any:
        return coroutine(self)

    def refused(cls: Any) -> str:
        with pytest.raises(TypeError) as caught:
            cls()
        return str(caught.value)

    for init in (generator, coroutine, async_generator, wrapped, lambda _: 5):
        plain = type("Some", (), {"__init__": init})
        ours: Any = zerocopy.actor(type("Some", (), {"__init__": init}))
        assert refused(ours) == refused(plain)


class Called(type):
    """A metaclass with its own `__call__`, which Ray's actors do not use."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.called = True
        return made


@zerocopy.actor(num_cpus=0.1)
class Partial(metaclass=Called):
    """Its `__init__` is a `partialmethod`."""

    called = False

    def prepare(self, pipeline: pipelines.Search, flag: bool = False) -> None:
        self.flag, self.pipeline = flag, pipeline

    __init__ = functools.partialmethod(prepare, flag=True)  # type: ignore[assignment]

    def told(self) -> Any:
        assert_zero_copy(self.pipeline)
        return self.flag, self.called


@pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="Python 3.14 cannot unpickle a partialmethod, not even by itself"
)
def test_a_partial_method_as_init_and_a_metaclass() -> None:
    """A `partialmethod` as `__init__` and a metaclass work as in plain actors."""
    search = pipelines.search(width=8)
    here = Partial(search)
    assert (here.flag, here.called) == (True, True)
    assert ray.get(Partial.remote(search).told.remote()) == (True, False)
