"""A direct call of a task carries no reference to weights that workers have loaded already."""

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
    """Drops all that this worker keeps, as a worker does some seconds after its last call."""
    from zerocopy._run import reuse

    reuse.CACHE._entries.clear()


@zerocopy.task(num_cpus=1)
def pass_on(model: nn.Module) -> str:
    """The publication as which this process passes on a pipeline that was loaded for this call."""
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
    """How each short call was answered."""
    told: list[str] = []
    unpack_reply = short_calls.unpack_reply

    def noted(packed: Any) -> short_calls.Reply:
        reply = unpack_reply(packed)
        told.append("known" if reply.is_known else "unknown")
        return reply

    monkeypatch.setattr(short_calls, "unpack_reply", noted)
    return told


def warm(publication: Any, answers: list[str]) -> None:
    """Call until a short call is answered: any worker may run it, and not each has the weights."""
    for _ in range(200):
        short_calls._trust.clear()
        give(publication, 0)
        give(publication, 0)
        if answers[-1:] == ["known"]:
            answers.clear()
            return
    raise AssertionError("no call was short")


def test_trust_ends_and_is_withdrawn() -> None:
    """A publication is trusted for a while after each call; once a worker did not have it, not until a while later."""
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
    """No result is taken for the reply of a worker that does not have the weights."""
    assert short_calls.unpack_reply(short_calls.pack_reply(result)) == (True, result)
    assert not short_calls.unpack_reply(short_calls.UNKNOWN).is_known


def test_the_next_call_is_short(answers: list[str]) -> None:
    """The first call carries a reference, the next ones a name; results are the same, by any kind of argument."""
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
    """Brief values arrive unchanged, and come back unchanged."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    result = give(publication, value)
    assert answers
    assert (type(result), result) == (type(value), value)


def test_other_values_travel_as_always(answers: list[str]) -> None:
    """A call with any other value is an ordinary call of Ray."""
    publication, reference = zerocopy.publish(model()), ray.put("behind")
    warm(publication, answers)
    assert give(publication, [1, 2]) == [1, 2]
    assert give(publication, reference) == "behind"
    assert give(publication, "x" * 100_000) == "x" * 100_000
    np.testing.assert_array_equal(give(publication, np.arange(5)), np.arange(5))
    assert not answers


def test_a_worker_without_the_weights_is_called_again(answers: list[str]) -> None:
    """A worker without the weights says so, which the caller does not see. For a while no call is short then."""
    module = model()
    publication = zerocopy.publish(module)
    warm(publication, answers)
    forget.options(num_cpus=1)(publication)
    for _ in range(50):
        assert total(publication) == float(module[0].weight.detach().double().sum())
    assert answers.count("unknown") <= 1


def test_copied_fields_arrive_as_they_are() -> None:
    """Short calls see what the caller has changed in copied fields, and nothing that earlier calls did to them."""
    search = Search(model())
    assert [note(search, "a") for _ in range(4)] == [["a"]] * 4
    search.notes.append("mine")
    assert note(search, "b") == ["mine", "b"]


def test_a_changed_weight_arrives(answers: list[str]) -> None:
    """A call after a write sees what was written."""
    module = model()
    warm(module, answers)
    with torch.no_grad():
        module[0].weight.fill_(2)
    assert total(module) == 2 * 300 * 300


def test_what_a_short_call_loads_is_known(answers: list[str]) -> None:
    """A pipeline that a short call has loaded is passed on as the publication that it came from."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    assert {pass_on(publication) for _ in range(4)} == {publication.reference.hex()}
    assert "known" in answers


def test_an_error_is_the_functions(answers: list[str]) -> None:
    """An error of the function arrives with its class and its text."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    for _ in range(3):
        with pytest.raises(ValueError, match="wrong"):
            fail(publication, "wrong")


def test_a_closed_publication_is_refused(answers: list[str]) -> None:
    """A closed publication is refused, though a worker may still have it loaded."""
    publication = zerocopy.publish(model())
    warm(publication, answers)
    publication.close()
    with pytest.raises(zerocopy.errors.PublicationClosedError):
        give(publication, 1)


def test_several_results_are_references() -> None:
    """With `num_returns` a call is never short."""
    publication = zerocopy.publish(model())
    for split in (give.options(num_returns=2), halves, halves.options(num_cpus=1)):
        for _ in range(3):
            assert split(publication, "ab") == ["a", "b"]
