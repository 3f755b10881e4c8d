"""Does the notebook run, and does each of its outputs appear once?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.long

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def outputs() -> dict[str, list[Any]]:
    """What each cell shows, by the last line of its code. The notebook starts a cluster of its own."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240).execute()
    return {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


TABLES = {  # what the only table of a cell has in its first column; a report has two
    "zerocopy.plan(search)": ["search.encoder", "search.index", "search.labels"],
    "publication": ["search"],
    "zerocopy.publications()": ["search", "search"],
}


@pytest.mark.parametrize("cell", TABLES)
def test_tables_show_once(cell: str, outputs: dict[str, list[Any]]) -> None:
    """One output, which has a text and one table, and neither is empty."""
    (shown,) = outputs[cell]
    page = shown.data["text/html"]
    assert page.count("<table") == 1
    assert re.findall("<tr><td.*?>(.*?)</td>", page) == TABLES[cell]
    assert shown.data["text/plain"].count(TABLES[cell][0]) >= 1


def test_the_report_tells_of_workers(outputs: dict[str, list[Any]]) -> None:
    """Two tables, in one output: two actors have loaded one copy."""
    (shown,) = outputs["zerocopy.memory_report()"]
    page = shown.data["text/html"]
    assert page.count("<table") == 2
    assert page.count('<td style="text-align: left">ray::Worker</td>') == 2
    assert shown.data["text/plain"].count("ray::Worker") == 2


def test_progress_is_drawn_without_widgets(outputs: dict[str, list[Any]]) -> None:
    """One bar for a map, which ends full, and what the cell gives; both can be read as text."""
    for cell, described in (("answers[:5]", "answer"), ("pool", "Worker.ask")):
        bar, result = outputs[cell]
        assert re.fullmatch(
            f'{described} <progress value="20" max="20"></progress> 20/20, \\d+ s', bar.data["text/html"]
        )
        assert bar.data["text/plain"].startswith(f"{described}: 20/20")
        assert result.output_type == "execute_result"
    assert result.data["text/plain"] == "<zerocopy.Pool of 2 Worker actors>"


def test_the_class_that_was_defined_again(outputs: dict[str, list[Any]]) -> None:
    """The old instance is taken, and answers as before; the new one has the new code."""
    (result,) = outputs["answer(search, queries[0]), answer(improved, queries[0])"]
    old, new = re.fullmatch(r"\('(\w+)', '(\w+)'\)", result.data["text/plain"]).groups()  # type: ignore[union-attr]
    assert new == old.upper() != old


def test_nothing_else_is_said(outputs: dict[str, list[Any]]) -> None:
    """No cell writes a line but the one that starts Ray, which tells of packages that it misses."""
    first, *others = outputs.values()
    assert [shown for cell in others for shown in cell if shown.output_type == "stream"] == []
    assert "zerocopy" not in "".join(shown.text for shown in first)
    assert outputs["ray.shutdown()"] == []
