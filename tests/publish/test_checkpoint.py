"""Does `publish_checkpoint` bring weights from files to the store?"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_python
from safetensors import torch as safetensors
from torch import nn

import zerocopy
from zerocopy import copied, shared
from zerocopy.errors import ArgumentError, CheckpointError, CheckpointWarning
from zerocopy.testing import assert_zero_copy

pytestmark = pytest.mark.usefixtures("cluster")


class Model(nn.Module):
    """A module with a tie, persistent and other buffers, a frozen parameter, mixed dtypes, a scalar and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.low = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(16.0), persistent=False)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        value = self.norm(self.embed(index)) * self.table * self.scale
        return self.head(self.low(value.bfloat16()).float())


def save(model: nn.Module, path: Path, prefix: str = "", leave_out: str = "") -> None:
    content = {prefix + name: tensor for name, tensor in model.state_dict().items() if name != leave_out}
    safetensors.save_file(content, path)


def made() -> Model:
    torch.manual_seed(0)
    model = Model()
    model(torch.arange(4))  # changes the statistics
    return model.eval()


INDEX = torch.arange(8)


def test_as_if_it_had_been_loaded(tmp_path: Path) -> None:
    """A loaded model equals the saved one in weights, ties, buffers, flags and dtypes, and no longer needs its files."""
    model = made()
    save(model, tmp_path / "model.safetensors", leave_out="head.weight")
    publication = zerocopy.publish_checkpoint(Model, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    loaded = publication.load()
    assert_zero_copy(loaded)
    assert loaded.head.weight is loaded.embed.weight
    assert not loaded.scale.requires_grad
    assert loaded.embed.weight.requires_grad
    assert torch.equal(loaded(INDEX), model(INDEX))
    with torch.no_grad():
        loaded.embed.weight.zero_()
    assert publication.load().embed.weight.any()


def test_eval_mode(tmp_path: Path) -> None:
    """A model arrives in eval mode, also if it was built in train mode, unless `train=True`."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    save(net, tmp_path / "model.safetensors")

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))

    ones = torch.ones(3, 4)
    loaded = zerocopy.publish_checkpoint(build, tmp_path).load()
    assert torch.equal(loaded(ones), loaded(ones))
    assert all(module.training for module in zerocopy.publish_checkpoint(build, tmp_path, train=True).load().modules())


def shards(folder: Path) -> Path:
    """A folder with two files and their index, as `save_pretrained` writes it."""
    content = {name: tensor for name, tensor in made().state_dict().items() if name != "head.weight"}
    names = sorted(content)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, some in files.items():
        safetensors.save_file({name: content[name] for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


SAVED: dict[str, Callable[[Path], Any]] = {
    "a folder": shards,
    "an index": lambda folder: shards(folder) / "model.safetensors.index.json",
    "a pattern": lambda folder: str(shards(folder) / "model-*.safetensors"),
    "several": lambda folder: sorted(shards(folder).glob("*.safetensors")),
    "a state dict": lambda folder: torch_file(made().state_dict(), folder / "weights.pt"),
    "a folder with a state dict": lambda folder: torch_file(made().state_dict(), folder / "model.bin").parent,
    "a training checkpoint": lambda folder: torch_file(
        {"epoch": torch.tensor(3), "model": made().state_dict(), "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        folder / "last.ckpt",
    ),
    "a state dict of old": lambda folder: torch_file(made().state_dict(), folder / "weights.pth", zipped=False),
    "of a wrapper": lambda folder: torch_file(nn.DataParallel(made()).state_dict(), folder / "weights.pt"),
}


def torch_file(content: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@contextlib.contextmanager
def warned(*words: str) -> Iterator[None]:
    """Check that each of these words is in a warning of the block; without words, that there is no warning."""
    with warnings.catch_warnings(record=True, action="always", category=CheckpointWarning) as heard:
        yield
    text = " ".join(str(one.message) for one in heard)
    assert all(word in text for word in words)
    assert any(words) or not text


@pytest.mark.parametrize("form", SAVED)
def test_files_as_people_have_them(form: str, tmp_path: Path) -> None:
    """Folders, index files, patterns, state dicts and training checkpoints all give the model that was saved."""
    with warned("'module.'" if form == "of a wrapper" else ""):
        loaded = zerocopy.publish_checkpoint(Model, SAVED[form](tmp_path)).load()
    assert_zero_copy(loaded)
    assert torch.equal(loaded(INDEX), made()(INDEX))
    assert loaded.head.weight is loaded.embed.weight


def test_which_state_dict(tmp_path: Path) -> None:
    """`key=` selects one of several state dicts; without it the one with a usual name is used, else an error lists the keys."""
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    path = torch_file({"model": one.state_dict(), "ema": other.state_dict()}, tmp_path / "last.ckpt")
    build = functools.partial(nn.Linear, 3, 3)
    assert torch.equal(zerocopy.publish_checkpoint(build, path).load().weight, one.weight)
    assert torch.equal(zerocopy.publish_checkpoint(build, path, key="ema").load().weight, other.weight)
    with pytest.raises(CheckpointError, match=r"no state dict under 'best'. Hint: key= takes one of 'model', 'ema'"):
        zerocopy.publish_checkpoint(build, path, key="best")
    torch_file({"first": one.state_dict(), "second": other.state_dict()}, path)
    with pytest.raises(CheckpointError, match="2 state dicts .*key= takes"):
        zerocopy.publish_checkpoint(build, path)


def test_names_that_differ(tmp_path: Path) -> None:
    """A prefix that all names have or lack is detected with a warning; `rename=` maps other names by a dict or a function."""

    def build() -> nn.Module:
        return nn.ModuleDict({"bert": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), "head": nn.Linear(3, 2)})

    torch.manual_seed(0)
    model = build()
    inner = model["bert"]
    save(inner, tmp_path / "inner.safetensors")
    save(model, tmp_path / "whole.safetensors", prefix="module.")
    with warned("'module.'", "rename={'module.': ''}"):
        loaded = zerocopy.publish_checkpoint(build, tmp_path / "whole.safetensors").load()
    assert torch.equal(loaded["head"].weight, model["head"].weight)

    def inside() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))

    ignore = "module.head.*"
    with warned("'module.bert.'"):
        loaded = zerocopy.publish_checkpoint(inside, tmp_path / "whole.safetensors", ignore=ignore).load()
    assert torch.equal(loaded[1].weight, inner[1].weight)
    loaded = zerocopy.publish_checkpoint(
        inside, tmp_path / "whole.safetensors", ignore=ignore, rename={"module.bert.": ""}
    ).load()
    assert torch.equal(loaded[1].weight, inner[1].weight)
    loaded = zerocopy.publish_checkpoint(
        inside,
        tmp_path / "whole.safetensors",
        rename=lambda name: None if "head" in name else name.removeprefix("module.bert."),
    ).load()
    assert torch.equal(loaded[0].bias, inner[0].bias)
    with pytest.raises(CheckpointError) as caught:
        zerocopy.publish_checkpoint(build, tmp_path / "inner.safetensors")
    assert caught.value.missing == ["head.weight", "head.bias"]
    assert "Names in the model begin with 'bert.', and names in the files do not" in str(caught.value)
    with pytest.raises(CheckpointError, match="two tensors"):
        zerocopy.publish_checkpoint(inside, tmp_path / "inner.safetensors", rename=lambda name: "one")


def test_two_heads_are_not_guessed(tmp_path: Path) -> None:
    """If the names of two models in a file fit one model, it is an error, not a silent choice."""
    both = nn.ModuleDict({"query": nn.Linear(3, 3), "passage": nn.Linear(3, 3)})
    save(both, tmp_path / "model.safetensors")
    build = functools.partial(nn.Linear, 3, 3)
    with pytest.raises(CheckpointError, match=r"4 names \("):
        zerocopy.publish_checkpoint(build, tmp_path, strict=True)
    with pytest.raises(CheckpointError, match="2 names"):
        zerocopy.publish_checkpoint(build, tmp_path, rename={"query.": ""})
    loaded = zerocopy.publish_checkpoint(build, tmp_path, rename={"query.": ""}, ignore="passage.*").load()
    assert torch.equal(loaded.weight, both["query"].weight)


def test_what_no_file_has(tmp_path: Path) -> None:
    """With `strict=False` a new head keeps its own initialization, and the base comes from the files."""

    class Net(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4)
            self.again = self.base
            self.head = nn.Linear(4, classes)
            nn.init.constant_(self.head.weight, 0.5)
            self.scale = nn.Parameter(torch.full((2,), 3.0))

    net = Net(5)
    content = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("base")}
    safetensors.save_file({**content, "old": torch.ones(1)}, tmp_path / "model.safetensors")
    with warned("3 names (scale, head.weight, head.bias) missing", "1 name (old) unknown"):
        loaded = zerocopy.publish_checkpoint(lambda: Net(7), tmp_path, strict=False).load()
    assert torch.equal(loaded.base.weight, net.base.weight)
    assert loaded.again is loaded.base
    assert loaded.head.weight.shape == (7, 4)
    assert loaded.head.weight.eq(0.5).all()
    assert loaded.scale.eq(3).all()
    assert loaded.head.bias.isfinite().all()
    with torch.device("meta"):
        never = Net(7)
    with warned("missing"), pytest.raises(CheckpointError, match="on the meta device"):
        zerocopy.publish_checkpoint(lambda: never, tmp_path, strict=False)


def test_ties_are_those_of_the_model(tmp_path: Path) -> None:
    """Ties come from the model, not from the file; two different values for tied tensors are refused."""

    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            if tied:
                self.two.weight = self.one.weight

    torch.save(Pair(tied=True).state_dict(), tmp_path / "tied.pt")
    loaded = zerocopy.publish_checkpoint(lambda: Pair(tied=False), tmp_path / "tied.pt").load()
    with torch.no_grad():
        loaded.one.weight.zero_()
    assert loaded.two.weight.all()
    torch.save(Pair(tied=False).state_dict(), tmp_path / "untied.pt")
    with pytest.raises(CheckpointError, match=r"ties 'one.weight' and 'two.weight', but the files have two values"):
        zerocopy.publish_checkpoint(lambda: Pair(tied=True), tmp_path / "untied.pt")
    big = torch.arange(1000.0)
    torch.save({"weight": big[:12].view(3, 4).t(), "bias": big[12:16]}, tmp_path / "views.pt")
    publication = zerocopy.publish_checkpoint(lambda: nn.Linear(3, 4), tmp_path / "views.pt")
    assert publication.shared_bytes == 16 * 4
    assert torch.equal(publication.load().weight, big[:12].view(3, 4).t())


def test_a_module_that_reads_its_state_in_its_own_way(tmp_path: Path) -> None:
    """A module's own changes in `load_state_dict` apply: here it converts names and values of an older format."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.register_load_state_dict_pre_hook(self._from_older)

        @staticmethod
        def _from_older(module: Any, state: Any, prefix: str, *rest: Any) -> None:
            if prefix + "half" in state:
                state[prefix + "weight"] = 2 * state.pop(prefix + "half")

    safetensors.save_file({"0.half": torch.ones(3)}, tmp_path / "model.safetensors")
    loaded = zerocopy.publish_checkpoint(lambda: nn.Sequential(Scaled()), tmp_path).load()
    assert loaded[0].weight.eq(2).all()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_what_a_hook_writes_is_published(tmp_path: Path, name: str, dtype: torch.dtype | None) -> None:
    """A write of a `load_state_dict` hook to its tensors is published, with a name and without."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.zeros(256, 256)), nn.Parameter(torch.zeros(300, 300))
            self.register_load_state_dict_post_hook(self._double)

        @staticmethod
        def _double(module: Any, keys: Any) -> None:
            module.weight.data.mul_(2)

    path = tmp_path / "state.pt"
    torch.save({"weight": torch.ones(256, 256), "other": torch.ones(300, 300)}, path)
    for options in ({}, {"name": name}):
        loaded = zerocopy.publish_checkpoint(Doubling, path, dtype=dtype, **options).load()
        assert loaded.weight.eq(2).all()
        assert loaded.other.eq(1).all()


def test_threads_build_at_the_same_time(tmp_path: Path) -> None:
    """Two threads publish checkpoints, and a third one builds a model: only the two models have their weights from the files."""
    torch.save(nn.Linear(8, 8).state_dict(), tmp_path / "state.pt")
    inside = {"first": threading.Event(), "second": threading.Event()}
    ended, loaded = threading.Event(), {}

    def build(mine: str, other: str) -> nn.Module:
        inside[mine].set()
        assert inside[other].wait(20)
        if mine == "second":
            assert ended.wait(20)  # it ends after the first, which began before
        return nn.Linear(8, 8)

    def publish(mine: str, other: str) -> None:
        loaded[mine] = zerocopy.publish_checkpoint(lambda: build(mine, other), tmp_path / "state.pt").load()

    first, second = (threading.Thread(target=publish, args=pair) for pair in (("first", "second"), ("second", "first")))
    first.start()
    assert inside["first"].wait(20)
    second.start()
    assert inside["second"].wait(20)
    assert not nn.Linear(2, 2).weight.is_meta
    first.join()
    ended.set()
    second.join()
    assert not nn.Linear(2, 2).weight.is_meta
    assert torch.equal(loaded["first"].weight, loaded["second"].weight)


def test_several_files_and_a_pipeline(tmp_path: Path) -> None:
    """Models of a pipeline are read from files with their paths as prefixes, or each from its own files; copied fields stay."""

    @zerocopy.pipeline
    class Pair:
        first: nn.Module = shared()
        second: nn.Module = shared()
        names: list[str] = copied()

    model = made()
    save(model, tmp_path / "1.safetensors", "first.", "head.weight")
    save(model, tmp_path / "2.safetensors", "second.", "head.weight")
    save(model, tmp_path / "alone.st", leave_out="head.weight")
    build = lambda: Pair(Model(), Model(), ["a"])  # noqa: E731
    for files in (
        str(tmp_path / "*.safetensors"),
        {"first": tmp_path / "alone.st", "second": [tmp_path / "alone.st"]},
    ):
        loaded = zerocopy.publish_checkpoint(build, files).load()
        assert loaded.names == ["a"]
        assert not loaded.first.training
        assert torch.equal(loaded.second(INDEX), model(INDEX))


def test_conversion(tmp_path: Path) -> None:
    """`dtype=` converts floating-point tensors only; without it a warning reports a difference between files and model."""
    model = made()
    save(model.double(), tmp_path / "model.safetensors", leave_out="head.weight")
    with warned("are torch.float64, as in the files; it was built with torch.float32"):
        assert zerocopy.publish_checkpoint(Model, tmp_path).load().embed.weight.dtype is torch.float64
    loaded = zerocopy.publish_checkpoint(Model, tmp_path / "model.safetensors", dtype=torch.float16).load()
    assert loaded.embed.weight.dtype is loaded.low.weight.dtype is torch.float16
    assert loaded.norm.num_batches_tracked.dtype is torch.int64
    assert torch.equal(loaded.embed.weight, model.embed.weight.half())


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    """One short error counts names that are missing, unexpected or of another shape, and its attributes list all of them."""
    content = {name: tensor.clone() for name, tensor in made().state_dict().items()}
    del content["norm.weight"], content["norm.bias"]
    content |= {"low.bias": torch.ones(4), **{f"more.{n}": torch.ones(3) for n in range(200)}}
    safetensors.save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        zerocopy.publish_checkpoint(Model, tmp_path / "model.safetensors")
    assert caught.value.missing == ["norm.weight", "norm.bias"]
    assert len(caught.value.unexpected) == 200
    assert caught.value.misshapen == ["low.bias is [4], not [16]"]
    assert "2 names (norm.weight, norm.bias) missing from the files; 200 names (more." in str(caught.value)
    assert "1 name (low.bias is [4], not [16]) of another shape" in str(caught.value)
    assert len(str(caught.value)) < 500
    # A name that the model has but its state dict has not: `from_pretrained` ignores it too.
    save(made(), tmp_path / "model.safetensors", leave_out="head.weight")
    with_hidden = safetensors.load_file(tmp_path / "model.safetensors") | {"table": torch.zeros(16)}
    safetensors.save_file(with_hidden, tmp_path / "model.safetensors")
    assert zerocopy.publish_checkpoint(Model, tmp_path).load().table[3] == 3


def test_files_that_are_none(tmp_path: Path) -> None:
    """The error for an unusable file names the file and a remedy."""
    refused(str(tmp_path / "*.safetensors"), "No file matches")
    refused(tmp_path / "none", r"none' cannot be read.*snapshot_download")
    refused(tmp_path, "has no weights: 0 entries")
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    for name, content in {
        "empty": b"",
        "text": b"this is no such file at all",
        "cut": struct.pack("<Q", len(header)) + header + b"\0" * 20,
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name}' (is not a safetensors file|cannot be read)")
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path / "lfs", "git lfs pull")
    save(made(), tmp_path / "one", leave_out="head.weight")
    refused([tmp_path / "one", tmp_path / "one"], "have the same .* names")
    (tmp_path / "index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(tmp_path / "index.json", "lists 1 file .*gone.safetensors.* that is not there")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path / "config.json", "has no 'weight_map'")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", r"1 sparse or quantized tensor \(a\).*publish\(model")
    (tmp_path / "sparse.pt").unlink()
    torch.save(made(), tmp_path / "whole.pt")
    refused(tmp_path / "whole.pt", "holds more than weights.*save its state dict alone")
    (tmp_path / "whole.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:900])
    refused(tmp_path / "whole.pt", "cannot be read by torch")
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        torch.jit.trace(nn.Linear(2, 2), torch.ones(2)).save(str(tmp_path / "script.pt"))
    refused(tmp_path / "script.pt", "TorchScript.*torch.jit.load")
    refused(tmp_path, "2 files .*give one of them")


def refused(files: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        zerocopy.publish_checkpoint(Model, files)


def test_arguments_of_another_kind(tmp_path: Path) -> None:
    """An argument of the wrong kind, such as an instance or a state dict, gets an error that says what to write."""
    path = tmp_path / "model.safetensors"
    save(made(), path, leave_out="head.weight")
    with pytest.raises(
        ArgumentError, match=r"a function that makes the model, got a Model. Hint: write `lambda: Model"
    ):
        zerocopy.publish_checkpoint(made(), path)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"got a state dict with \d+ entries. Hint: .*load_state_dict"):
        zerocopy.publish_checkpoint(Model, made().state_dict())
    for wrong in (3, [3], torch.ones(2), {"first": 3}):
        with pytest.raises(ArgumentError, match="expects paths of files"):
            zerocopy.publish_checkpoint(Model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="rename=3"):
        zerocopy.publish_checkpoint(Model, path, rename=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"rename={'head': None} is neither .* or None to leave it out"):
        zerocopy.publish_checkpoint(Model, path, rename={"head": None})  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match=r"dtype='bfloat16' is not a dtype of torch. Hint: write dtype=torch"):
        zerocopy.publish_checkpoint(Model, path, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"got a str. Hint: write publish_checkpoint\(build, files\)"):
        zerocopy.publish_checkpoint(str(path), Model)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="which is not a name"):
        zerocopy.publish_checkpoint(Model, path, rename=lambda name: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"no model to share in this 'int'"):
        zerocopy.publish_checkpoint(lambda: 3, path)


PEAK = """
import sys, threading, time, torch, ray
from torch import nn
import zerocopy
from zerocopy._store import object_store
from zerocopy.memory import memory_report
from safetensors.torch import save_file

def build():
    return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(48)])

model = build()
save_file(model.state_dict(), sys.argv[1])
size = sum(parameter.nbytes for parameter in model.parameters())
del model
ray.init("local", num_cpus=1, object_store_memory=600_000_000, include_dashboard=False, log_to_driver=False)
zerocopy.publish(nn.Linear(300, 300), adopt=True)
total = lambda: memory_report(pids).total
import os
from pathlib import Path
parent = lambda pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
# Other clusters may run on this machine.
raylets = [p.pid for p in memory_report().processes if p.name == "raylet" and parent(p.pid) == os.getpid()]
assert len(raylets) == 1
pids = [os.getpid(), *raylets]
put = object_store.put
def watching(value):
    peaks.append(total() - base)
    ref = put(value)
    peaks.append(total() - base)
    return ref
object_store.put = watching
publications = []  # all of them stay: the next one takes other pages of the store
for dtype, written in ((None, size), (torch.float16, size // 2)):
    base, peaks = total(), []
    publications.append(zerocopy.publish_checkpoint(build, sys.argv[1], dtype=dtype))
    print(max(peaks) / written, (total() - base) / written, len(peaks))
"""


@pytest.mark.long
@pytest.mark.alone  # next to other tests the raylet itself grows by some megabytes
def test_the_peak_is_the_weights(tmp_path: Path) -> None:
    """Driver and store together need hardly more memory than the weights, with and without conversion."""
    done = run_python(PEAK, "-", str(tmp_path / "model.safetensors"))
    assert done.returncode == 0, done.stderr[-2000:]
    told = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(told) == 2
    for peak, after, count in told:
        assert count > 16
        assert after < 1.06
        assert peak < 1.15  # of 200 and 100 MB, including other growth of the processes
