"""Does a plan show what will be shared, without Ray?"""

from __future__ import annotations

import re
import threading

import attrs
import numpy as np
import pipelines
import pytest
import torch
from torch import nn

import zerocopy
from zerocopy import Copied, copied, shared


def by_path(plan: zerocopy.SharePlan) -> dict[str, zerocopy.PlanEntry]:
    return {entry.path: entry for entry in plan.entries}


def test_fields_follow_their_policies() -> None:
    """Each field is an entry with its policy, tensors and bytes."""
    plan = zerocopy.plan(pipelines.search(width=256))
    entries = by_path(plan)
    assert {path: entry.policy for path, entry in entries.items()} == {
        "search.encoder": "shared",
        "search.index": "shared",
        "search.settings": "copied",
        "search.top_k": "copied",
    }
    weights = 2 * (256 * 256 + 256) * 4
    assert (entries["search.encoder"].tensors, entries["search.encoder"].bytes) == (4, weights)
    assert plan.shared_bytes == weights + 2 * 256 * 4
    assert 0 < plan.copied_bytes < 5_000
    assert plan.entangled is None


def test_modules_are_found_anywhere_below() -> None:
    """Without declarations every module is shared, at any depth and also in private attributes; other tensors are copied."""
    plan = zerocopy.plan(pipelines.Assistant(width=64))
    shared_paths = {entry.path for entry in plan.entries if entry.policy == "shared"}
    assert shared_paths == {"assistant.models['draft']", "assistant.models['final'][0]", "assistant._hidden"}
    assert plan.shared_bytes == 3 * 2 * (64 * 64 + 64) * 4
    assert by_path(plan)["assistant.table"].policy == "copied"
    assert by_path(plan)["assistant.table"].tensors == 1


def test_a_copied_field_keeps_its_modules() -> None:
    """A module inside a `copied()` field is copied, unless a shared field also has it."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        own: dict[str, nn.Module] = copied()

    encoder = nn.Linear(32, 32)
    plan = zerocopy.plan(Search(encoder, {"mine": nn.Linear(16, 16), "theirs": encoder}))
    assert plan.shared_bytes == (32 * 32 + 32) * 4
    assert by_path(plan)["search.own"].bytes >= (16 * 16 + 16) * 4
    assert plan.entangled is None


def test_a_module_in_a_copied_field_is_copied() -> None:
    """A module that is the value of a copied field is copied, with `copied()` and with `Copied[...]`."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        head: nn.Module = copied()

    @zerocopy.pipeline
    class Own:
        head: Copied[nn.Module]

        def __init__(self) -> None:
            self.encoder = nn.Linear(32, 32)
            self.head = nn.Linear(16, 16)

    for search in (Search(nn.Linear(32, 32), nn.Linear(16, 16)), Own()):
        plan = zerocopy.plan(search)
        assert {path.split(".")[1]: entry.policy for path, entry in by_path(plan).items()} == {
            "encoder": "shared",
            "head": "copied",
        }
        assert plan.shared_bytes == (32 * 32 + 32) * 4
        assert plan.entangled is None


def test_what_a_class_leaves_out_is_not_looked_at() -> None:
    """An attribute that `__getstate__` leaves out may be any object, and is not pickled."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        settings: dict = copied(factory=dict)

        def __getstate__(self) -> dict:
            return {**vars(self), "_lock": None, "_cache": None}

    search = Search(nn.Linear(4, 4))
    search._lock, search._cache = threading.Lock(), bytearray(5_000_000)
    plan = zerocopy.plan(search)
    assert plan.copied_bytes < 10_000
    assert by_path(plan)["search._lock"].note == "left out by its class"


def test_hooks_that_reach_the_pipeline() -> None:
    """If a hook is a method of the pipeline, the pipeline is loaded as a whole, and the plan says so."""

    @zerocopy.pipeline
    class Search:
        def __init__(self) -> None:
            self.encoder = nn.Linear(2, 2)
            self.seen: list = []
            self.encoder.register_forward_hook(self.hook)

        def hook(self, module: nn.Module, args: object, output: object) -> None:
            self.seen.append(output)

    assert "hooks" in str(zerocopy.plan(Search()).entangled)


def test_ties_are_named_and_counted_once() -> None:
    """Bytes of a tied parameter, and of a view of it in another field, count once."""

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        view: torch.Tensor = shared()

    encoder = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    encoder[1].weight = encoder[0].weight
    plan = zerocopy.plan(Search(encoder, encoder[0].weight.detach()[2:4]))
    assert plan.shared_bytes == 8 * 8 * 4
    assert plan.entries[0].ties == ("search.encoder[0].weight = search.encoder[1].weight = search.view",)
    assert plan.entries[1].bytes == 0


def test_what_cannot_be_shared_is_said() -> None:
    """A value that cannot be shared, such as an array of Python objects, is copied, and the plan gives the reason."""

    @zerocopy.pipeline
    class Search:
        names: object = shared()

    plan = zerocopy.plan(Search({"words": np.array(["a", None], dtype=object)}))
    assert plan.entries[0].note == "search.names['words'] is copied: an array of Python objects"
    assert plan.shared_bytes == 0


def test_entangled_pipelines_are_named() -> None:
    """If a mutable object is reachable from a shared and a copied field, the plan names its path."""
    config = {"threshold": 0.5}

    @zerocopy.pipeline
    class Search:
        encoder: nn.Module = shared()
        config: dict = copied()

    encoder = nn.Linear(2, 2)
    encoder.config = config
    plan = zerocopy.plan(Search(encoder, config))
    assert plan.entangled == "search.config"
    assert "Loaded whole for each call: 'search.config'" in str(plan)


def test_nested_pipelines_follow_their_own_policies() -> None:
    """For a pipeline inside a pipeline, the plan lists its own fields with their policies."""

    @zerocopy.pipeline
    class Outer:
        inner: pipelines.Search = shared()
        more: list = copied()

    plan = zerocopy.plan(Outer(pipelines.search(width=16), [pipelines.search(width=8)]))
    shared_paths = {entry.path for entry in plan.entries if entry.policy == "shared"}
    assert shared_paths == {
        "outer.inner.encoder",
        "outer.inner.index",
        "outer.more[0].encoder",
        "outer.more[0].index",
    }


def test_a_bare_module_is_a_pipeline() -> None:
    """The plan of a bare module has one entry, which is shared."""
    plan = zerocopy.plan(nn.Linear(4, 4, dtype=torch.bfloat16))
    assert [(entry.path, entry.policy, entry.dtypes) for entry in plan.entries] == [("linear", "shared", ("bfloat16",))]


def test_prints_as_a_table() -> None:
    """The table has every column, on a terminal and in a notebook."""
    plan = zerocopy.plan(pipelines.search(width=256))
    text = str(plan)
    assert text.splitlines()[0].startswith("search: 528.4 kB shared once per node")
    for word in ("path", "policy", "kind", "tensors", "bytes", "ties", "search.encoder", "Sequential", "526.3 kB"):
        assert word in text
    page = plan._repr_html_()
    assert page.count("<table>") == 1
    assert re.findall("<td.*?>(.*?)</td>", page)[:5] == ["search.encoder", "shared", "Sequential", "4", "526.3 kB"]


def test_holds_no_tensor_and_is_frozen() -> None:
    """A plan keeps no weights alive and cannot be changed."""
    plan = zerocopy.plan(pipelines.search(width=16))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        plan.shared_bytes = 0
    assert not any(isinstance(value, torch.Tensor) for entry in plan.entries for value in attrs.astuple(entry))


def test_a_module_that_two_fields_hold_is_a_tie() -> None:
    """The bytes of a module in two fields count once, and both rows list the tie; a cycle is not a tie."""

    @zerocopy.pipeline
    class Two:
        first: nn.Module = shared()
        second: nn.Module = shared()

    layer = nn.Linear(8, 8)
    layer.__dict__["itself"] = layer
    one, other = zerocopy.plan(Two(nn.Sequential(layer), nn.Sequential(layer))).entries
    assert (one.bytes, other.bytes) == ((64 + 8) * 4, 0)
    assert one.ties == other.ties == ("two.first[0] = two.second[0]",)
    (only,) = zerocopy.plan(Two(layer, layer)).entries
    assert only.ties == ("two.first = two.second",)
    assert zerocopy.plan(layer).entries[0].ties == ()
    buffers, plain = nn.BatchNorm1d(4, affine=False), nn.ReLU()
    (only,) = zerocopy.plan(nn.Sequential(buffers, plain, buffers, plain)).entries
    assert only.ties == ("sequential[0] = sequential[2]",)
