"""Does `zerocopy plan` show bytes, totals and the object store size that they need, without a cluster?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from zerocopy._cli.checkpoints import by_part, folder_of
from zerocopy._cli.plan import _notes_on_store
from zerocopy._cli.sizing import Weights, on_node, on_nodes, store_bytes
from zerocopy._compat.ray import LEAST_STORE
from zerocopy._tables import bytes_in, format_bytes
from zerocopy.errors import CheckpointError

MODEL = "models_to_name"
NBYTES = (512 * 512 + 512) * (4 + 2)


def saved(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder like those of Hugging Face: two weight files with an index."""
    folder.mkdir()
    files = {"one.safetensors": ["model.embed.weight", "model.layers.0.weight"], "two.safetensors": ["lm_head.weight"]}
    for file, names in files.items():
        save_file({name: torch.zeros(64, 64, dtype=dtype) for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"architectures": ["Llama"], "torch_dtype": "bfloat16"}))
    save_file({"other": torch.zeros(4)}, folder / "not-in-the-index.safetensors")
    return folder


def test_an_object_is_planned(told: Callable[..., Any]) -> None:
    """The plan of an object has bytes per field and per dtype, and totals; output that its function prints is left out."""
    plan = told("plan", f"{MODEL}:build", "--workers", 3, "--nodes", 2)
    assert plan["shared_bytes"] == NBYTES
    assert plan["dtypes"] == {"float32": (512 * 512 + 512) * 4, "float16": (512 * 512 + 512) * 2}
    copied = plan["copied_bytes"]
    assert plan["per_node"] == {
        "zerocopy": NBYTES + 3 * copied,
        "plain": 3 * (NBYTES + copied),
        "saved": 2 * NBYTES,
    }
    assert plan["all_nodes"]["saved"] == 4 * NBYTES
    assert plan["object_store_memory"] == LEAST_STORE


def test_a_table_says_what_to_set(zerocopy_command: Callable[..., Result]) -> None:
    """The table uses the requested unit and shows the `ray start` command with the right store size."""
    done = zerocopy_command("plan", f"{MODEL}:instance", "--workers", 2, "--units", "KB")
    assert done.exit_code == 0
    assert "0.080 KB" in done.output
    assert f"ray start --object-store-memory {LEAST_STORE}" in done.output


def test_a_folder_is_planned(tmp_path: Path, told: Callable[..., Any]) -> None:
    """Only the files that the index names count; a state dict saved by torch works too."""
    folder = saved(tmp_path / "llama")
    plan = told("plan", folder, "--sort-by", "name")
    assert (plan["kind"], plan["files"]) == ("Llama", ["one.safetensors", "two.safetensors"])
    assert {one["path"]: one["bytes"] for one in plan["entries"]} == {
        "lm_head": 8192,
        "model.embed": 8192,
        "model.layers": 8192,
    }
    assert plan["dtypes"] == {"bfloat16": 3 * 8192}
    assert plan["notes"] == []
    (tmp_path / "older").mkdir()
    torch.save({"embed.weight": torch.zeros(8, 8)}, tmp_path / "older/pytorch_model.bin")
    assert told("plan", tmp_path / "older")["dtypes"] == {"float32": 256}


def test_a_folder_that_would_be_converted_is_told(tmp_path: Path, told: Callable[..., Any]) -> None:
    """The plan reports when the config names a dtype that differs from the dtype of the files."""
    (note,) = told("plan", saved(tmp_path / "llama", dtype=torch.float32))["notes"]
    assert "config.json names bfloat16, the files hold float32" in note


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """The error names the file."""
    with pytest.raises(CheckpointError, match="has no weights"):
        folder_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="model.safetensors' is not a safetensors file"):
        folder_of(tmp_path)
    folder = saved(tmp_path / "llama")
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match="two.safetensors.* that is not there"):
        folder_of(folder)
    (folder / "config.json").write_text("{")
    save_file({"a": torch.zeros(1)}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match="config.json' cannot be read"):
        folder_of(folder)


def test_numbered_layers_are_one_part() -> None:
    """Other parameters are grouped by the modules around them."""
    layers = {f"model.layers.{number}.mlp.weight": 2 for number in range(3)}
    assert by_part({"model.embed.weight": 7, **layers}) == (("model.embed", 7), ("model.layers", 6))
    assert by_part({"model.a.x": 1, "model.a.y": 2, "model.b.x": 5}) == (("model.b", 5), ("model.a", 3))
    assert by_part({"weight": 4}) == (("weight", 4),)
    assert by_part({}) == ()


def test_totals_and_the_store() -> None:
    """Shared bytes count once per node and copied bytes once per worker; both must fit in 70 % of the object store."""
    weights = Weights(shared=7_000_000_000, copied=70_000_000)
    assert on_node(weights, 10).zerocopy == 7_700_000_000
    assert on_node(weights, 10).plain == 70_700_000_000
    assert on_nodes(weights, 10, 3).saved == 3 * 63_000_000_000
    assert store_bytes(weights, 10, 0.7) == 11_000_000_000
    assert store_bytes(weights, 10, 0.7, versions=2) == 21_000_000_000
    assert store_bytes(Weights(0, 0), 1, 0.7) == LEAST_STORE


def test_a_small_shared_memory_is_told() -> None:
    """A note is shown only if the shared memory is too small."""
    (note,) = _notes_on_store(1_000_000_000, 64_000_000)
    assert "64.0 MB free" in note
    assert "--shm-size=1100000000" in note
    assert not [*_notes_on_store(1_000_000_000, 1_000_000_000), *_notes_on_store(1_000_000_000, None)]


def test_bytes_in_a_unit() -> None:
    """All numbers of bytes within the context use its unit; after it each number has its own unit again."""
    with bytes_in("MB"):
        assert (format_bytes(1_500_000), format_bytes(3_000_000_000)) == ("1.500 MB", "3,000.000 MB")
    with bytes_in("B"):
        assert format_bytes(1500) == "1,500 B"
    assert (format_bytes(1500), format_bytes(-1500)) == ("1.5 kB", "-1.5 kB")
