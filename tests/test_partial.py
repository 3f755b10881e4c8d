"""Do partial loads leave anything on the user's class? These tests need no Ray."""

from __future__ import annotations

import gc
import pickle
import threading
from typing import Any

import pytest
import ray.cloudpickle

from zerocopy._load.partial import keep_only


def instance_of(cls: Any, **attributes: Any) -> Any:
    made = cls.__new__(cls)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_nothing_stays_on_the_class() -> None:
    """The explanation of a missing attribute leaves the class with the last instance that lacks the attribute."""

    class Search:
        pass

    before = dict(vars(Search))
    one, other = instance_of(Search, a=1, b=2, c=3), instance_of(Search, a=1, b=2, c=3)
    keep_only(one, ["a"])
    keep_only(other, ["a", "b"])
    with pytest.raises(
        AttributeError, match=r"'Search' object has no attribute 'b': it was loaded with fields=\['a'\]"
    ):
        _ = one.b
    assert other.b == 2
    del one
    gc.collect()
    assert "b" not in vars(Search)
    with pytest.raises(AttributeError, match=r"no attribute 'c': it was loaded with fields=\['a', 'b'\] only"):
        _ = other.c
    del other
    gc.collect()
    assert dict(vars(Search)) == before


def test_instances_of_a_subclass_have_their_own_reasons() -> None:
    """Instances of a class and of its subclass each show the fields that they were loaded with."""

    class Base:
        pass

    class Derived(Base):
        pass

    base, derived = instance_of(Base, a=1, b=2), instance_of(Derived, a=1, b=2)
    keep_only(base, ["a"])
    keep_only(derived, [])
    with pytest.raises(AttributeError, match=r"fields=\[\] only"):
        _ = derived.b
    del base
    gc.collect()
    with pytest.raises(AttributeError, match=r"fields=\[\] only"):
        _ = derived.b
    assert "b" not in vars(Base)


def test_what_the_class_has_is_left_alone() -> None:
    """A partial load changes no slot, default or descriptor of the class, and no attribute that the user adds later."""

    class Unreadable:
        def __get__(self, instance: object, owner: type) -> None:
            raise AttributeError("not now")

    class Search:
        __slots__ = ("__dict__", "__weakref__", "slot")
        default = 5
        unreadable = Unreadable()

    before = dict(vars(Search))
    search = instance_of(Search, slot=1, default=6, unreadable=7, late=8)
    keep_only(search, [])
    assert search.default == 5
    with pytest.raises(AttributeError):
        _ = search.slot
    assert {name: value for name, value in vars(Search).items() if name != "late"} == before
    Search.late = 9
    del search
    gc.collect()
    assert dict(vars(Search)) == {**before, "late": 9}


def test_a_class_that_travels_by_value() -> None:
    """A class that is pickled by value can be pickled after a partial load, without the explanations."""

    class Search:
        pass

    search = instance_of(Search, a=1, b=2)
    keep_only(search, ["a"])
    again = pickle.loads(ray.cloudpickle.dumps(search))
    assert again.a == 1
    with pytest.raises(AttributeError, match="no attribute 'b'$"):
        _ = again.b


def test_threads_that_load_and_drop() -> None:
    """If threads load and drop many instances, each missing attribute is explained and nothing stays on the class."""

    class Search:
        pass

    before, failures = dict(vars(Search)), []

    def load_and_drop() -> None:
        for _ in range(300):
            search = instance_of(Search, a=1, b=2)
            search.myself = search  # a cycle, which the garbage collector frees at any moment
            keep_only(search, ["a", "myself"])
            try:
                _ = search.b
            except AttributeError as error:
                if "it was loaded with" not in str(error):
                    failures.append(str(error))

    threads = [threading.Thread(target=load_and_drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not failures
    assert dict(vars(Search)) == before
