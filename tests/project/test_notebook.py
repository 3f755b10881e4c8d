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
    """The outputs of each cell, by the last line of its code. The notebook starts its own cluster."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240).execute()
    return {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


TABLES = {  # the first column of the only table of a cell; a memory report has two tables
    "zerocopy.plan(search)": ["search.encoder", "search.index", "search.labels"],
    "publication": ["search"],
    "zerocopy.publications()": ["search", "search"],
}


@pytest.mark.parametrize("cell", TABLES)
def test_tables_show_once(cell: str, outputs: dict[str, list[Any]]) -> None:
    """Each object shows one output with a text and one table, neither of them empty."""
    (shown,) = outputs[cell]
    page = shown.data["text/html"]
    assert page.count("<table") == 1
    assert re.findall("<tr><td.*?>(.*?)</td>", page) == TABLES[cell]
    assert shown.data["text/plain"].count(TABLES[cell][0]) >= 1


def test_the_report_tells_of_workers(outputs: dict[str, list[Any]]) -> None:
    """The memory report shows two tables in one output, and the two actors that have loaded."""
    (shown,) = outputs["zerocopy.memory_report()"]
    page = shown.data["text/html"]
    assert page.count("<table") == 2
    assert page.count('<td style="text-align: left">ray::Worker</td>') == 2
    assert shown.data["text/plain"].count("ray::Worker") == 2


def test_progress_is_drawn_without_widgets(outputs: dict[str, list[Any]]) -> None:
    """A map shows one progress bar, which ends full, and the result of the cell; both have a text form."""
    for cell, described in (("answers[:5]", "answer"), ("pool", "Worker.ask")):
        bar, result = outputs[cell]
        assert re.fullmatch(
            f'{described} <progress value="20" max="20"></progress> 20/20, \\d+ s', bar.data["text/html"]
        )
        assert bar.data["text/plain"].startswith(f"{described}: 20/20")
        assert result.output_type == "execute_result"
    assert result.data["text/plain"] == "<zerocopy.Pool of 2 Worker actors>"


def test_the_class_that_was_defined_again(outputs: dict[str, list[Any]]) -> None:
    """An instance of the old class still works and answers as before; an instance of the new class has the new code."""
    (result,) = outputs["answer(search, queries[0]), answer(improved, queries[0])"]
    old, new = re.fullmatch(r"\('(\w+)', '(\w+)'\)", result.data["text/plain"]).groups()  # type: ignore[union-attr]
    assert new == old.upper() != old


def test_nothing_else_is_said(outputs: dict[str, list[Any]]) -> None:
    """Only the cell that starts Ray writes a line: Ray reports packages that are not installed."""
    first, *others = outputs.values()
    assert [shown for cell in others for shown in cell if shown.output_type == "stream"] == []
    assert "zerocopy" not in "".join(shown.text for shown in first)
    assert outputs["ray.shutdown()"] == []
