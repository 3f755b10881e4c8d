"""Do direct task calls omit the object reference when workers have already loaded the weights?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy._run import short_calls

pytestmark = pytest.mark.usefixtures("cluster")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3)).eval()


@zerocopy.pipeline
class Search:
    encoder: nn.Module = shared()
    notes: list[str] = copied(factory=list)


@zerocopy.task(num_cpus=1)
def give(model: Any, value: Any) -> Any:
    return value


@zerocopy.task(num_cpus=1)
def total(model: nn.Module, *, scale: float = 1.0) -> float:
    return scale * float(model[0].weight.double().sum())


@zerocopy.task(num_cpus=1)
def note(search: Search, word: str) -> list[str]:
    search.notes.append(word)
    return search.notes


@zerocopy.task(num_cpus=1)
def forget(model: nn.Module) -> None:
    """Drop all loads of this worker, as a worker does some seconds after its last call."""
    from zerocopy._run import reuse

    reuse.CACHE._entries.clear()


@zerocopy.task(num_cpus=1)
def pass_on(model: nn.Module) -> str:
    """The reference of the publication that this process uses to pass on the pipeline of this call."""
    from zerocopy._publish.publish import publish_automatically

    return publish_automatically(model).reference.hex()


@zerocopy.task(num_returns=2)
def halves(model: nn.Module, value: str) -> Any:
    return tuple(value)


@zerocopy.task(num_cpus=1)
def fail(model: nn.Module, word: str) -> None:
    raise ValueError(word)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kind of each reply to a short call."""
    told: list[str] = []
    unpack_reply = short_calls.unpack_reply

    def noted(packed: Any) -> short_calls.Reply:
        reply = unpack_reply(packed)
        told.append("known" if reply.is_known else "unknown")
        return reply

    monkeypatch.setattr(short_calls, "unpack_reply", noted)
    return told


def warm(publication: Any, answers: list[str]) -> None:
    """Call until a short call succeeds: any worker may run it, and some do not have the weights."""
    for _ in range(200):
        short_calls._trust.clear()
        give(publication, 0)
        give(publication, 0)
        if answers[-1:] == ["known"]:
            answers.clear()
            return
    raise AssertionError("no call was short")


def test_trust_ends_and_is_withdrawn() -> None:
    """A publication is trusted for some time after each call; after a worker did not have it, it is not trusted for some time."""
    trust = short_calls.Trust()
    assert not trust.holds_at(10.0)
    trust = trust.confirmed(10.0)
    assert [trust.holds_at(now) for now in (10.0, 11.9, 12.1)] == [True, True, False]
    trust = trust.withdrawn(11.0)
    assert not any(trust.holds_at(now) for now in (11.0, 13.0, 20.0))
    trust = trust.confirmed(12.0)
    assert [trust.holds_at(now) for now in (12.0, 13.0, 14.0, 14.1)] == [False, True, True, False]


@pytest.mark.parametrize("result", [b"", b"text", None, [1, 2], short_calls.UNKNOWN], ids=repr)
def test_replies_are_tagged(result: Any) -> None:
    """No result of a task can be confused with the reply of a worker that does not have the weights."""
    assert short_calls.unpack_reply(short_calls.pack_reply(result)) == (True, result)
    assert not short_calls.unpack_reply(short_calls.UNKNOWN).is_known


def test_the_next_call_is_short(answers: list[str]) -> None:
    """The first call has a reference and later calls only a name, with the same results, for every kind of argument."""
    module = model()
    for given in (zerocopy.publish(module), module, Search(module)):
        warm(given, answers)
        assert give(given, 5) == 5
        assert answers
    expected = float(module[0].weight.detach().double().sum())
    assert total(module) == expected
    assert total(module, scale=2) == total(model=module, scale=2.0) == 2 * expected


@pytest.mark.parametrize("value", [b"", b"text", "text", None, 1.5, 2**70, True, 3j], ids=repr)
def test_brief_values_travel(answers: list[str], value: Any) -> None:
    """Arguments and results with brief values are unchanged in a short call."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    result = give(publication, value)
    assert answers
    assert (type(result), result) == (type(value), value)


def test_other_values_travel_as_always(answers: list[str]) -> None:
    """A call with another value, such as a list, an array or a long text, is an ordinary Ray call."""
    publication, reference = zerocopy.publish(model()), ray.put("behind")
    warm(publication, answers)
    assert give(publication, [1, 2]) == [1, 2]
    assert give(publication, reference) == "behind"
    assert give(publication, "x" * 100_000) == "x" * 100_000
    np.testing.assert_array_equal(give(publication, np.arange(5)), np.arange(5))
    assert not answers


def test_a_worker_without_the_weights_is_called_again(answers: list[str]) -> None:
    """If a worker does not have the weights, the call is repeated invisibly, and for some time no call is short."""
    module = model()
    publication = zerocopy.publish(module)
    warm(publication, answers)
    forget.options(num_cpus=1)(publication)
    for _ in range(50):
        assert total(publication) == float(module[0].weight.detach().double().sum())
    assert answers.count("unknown") <= 1


def test_copied_fields_arrive_as_they_are() -> None:
    """A short call gets the caller's current copied fields, without the changes of earlier calls."""
    search = Search(model())
    assert [note(search, "a") for _ in range(4)] == [["a"]] * 4
    search.notes.append("mine")
    assert note(search, "b") == ["mine", "b"]


def test_a_changed_weight_arrives(answers: list[str]) -> None:
    """A call after a write gets the written weights."""
    module = model()
    warm(module, answers)
    with torch.no_grad():
        module[0].weight.fill_(2)
    assert total(module) == 2 * 300 * 300


def test_what_a_short_call_loads_is_known(answers: list[str]) -> None:
    """A pipeline that a short call has loaded is passed on as its original publication."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    assert {pass_on(publication) for _ in range(4)} == {publication.reference.hex()}
    assert "known" in answers


def test_an_error_is_the_functions(answers: list[str]) -> None:
    """An error of the function arrives with its class and text."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"):
            fail(publication, "wrong")


def test_a_closed_publication_is_refused(answers: list[str]) -> None:
    """A closed publication is refused, also if a worker still has it loaded."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    publication.close()
    with pytest.raises(zerocopy.errors.PublicationClosedError):
        give(publication, 1)


def test_several_results_are_references() -> None:
    """A call with `num_returns` always returns references to Ray's objects and is never short."""
    publication = zerocopy.publish(model())
    for split in (give.options(num_returns=2), halves, halves.options(num_cpus=1)):
        for _ in range(3):
            assert split(publication, "ab") == ["a", "b"]
