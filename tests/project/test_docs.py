"""Does the code in the README and the pages run exactly as printed there?"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_python
from typed_pages import program_of

import zerocopy

ROOT = Path(__file__).parents[2]
PAGES = {
    "docs/checkpoints.md": "110",
    "docs/guide.md": "shared once per node",
    "docs/howto-versions.md": "three fine-tunings of a model of 8,429,600 bytes took",
    "docs/howto-workers.md": "MB more of its own",
    "docs/index.md": "Linear(in_features=1024",
    "docs/migration.md": "torch.Size([1, 8])",
    "docs/names.md": "both have version 3",
    "docs/nodes.md": "100%",
    "docs/questions.md": "without a name: owner ended",
    "docs/quick-start.md": "two workers save",
    "docs/serve.md": "class: ",
    "docs/seeing.md": "encoder is loaded in 3 processes and saves",
}


def program(page: str, folder: Path) -> Path:
    """A program of all blocks of a page that are marked `python`. Blocks marked `py` are shown but not run."""
    path = folder / "page.py"
    path.write_text(program_of(ROOT / page))
    return path


def test_the_readme_runs(tmp_path: Path) -> None:
    """The README runs as a separate program, on the cluster that it starts."""
    done = run_python("", str(program("README.md", tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shared once per node" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str, tmp_path: Path, run_as_main: Callable[..., str]) -> None:
    """The code of each page is a program that runs."""
    assert PAGES[page] in run_as_main(program(page, tmp_path))


def test_the_badges_are_true() -> None:
    """The README's badges say what `pyproject.toml` says of Python, Ray, torch and the license."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    minors = [int(line.rpartition(".")[2]) for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    lowest = dict(one.split(">=") for one in project["dependencies"] if one.startswith(("ray>=", "torch>=")))
    told = {
        f"Python 3.{min(minors)} to 3.{max(minors)}": f"python-3.{min(minors)}_to_3.{max(minors)}",
        f"Ray {lowest['ray']} or later": f"ray-{lowest['ray']}_or_later",
        f"torch {lowest['torch']} or later": f"torch-{lowest['torch']}_or_later",
        f"License {project['license']}": f"license-{project['license'].replace('-', '--')}",
    }
    assert (
        dict(re.findall(r"!\[(.+)\]\(https://img\.shields\.io/badge/(.+)-blue\)", (ROOT / "README.md").read_text()))
        == told
    )


def test_every_page_with_code_is_run() -> None:
    """No page has Python code that these tests would leave out."""
    with_code = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if program_of(page).strip()}
    assert with_code == {*PAGES}


def test_links_lead_somewhere() -> None:
    """Every relative link of a page names a file that exists, and a heading of it."""
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", _without_code(page)):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(path), f"{page.name}: {target}"


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", _without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_of_the_house_is_complete() -> None:
    """The table in the docs has each wing once, with the text of the wing's docstring."""
    page = (ROOT / "docs/how-it-works.md").read_text()
    named = dict(re.findall(r"^\| `(\w+)/` \| (.*?) \|", page, re.MULTILINE))
    wings = {path.parent.name: path.read_text() for path in (ROOT / "zerocopy").glob("_*/__init__.py")}
    assert {wing: f'"""{question}"""\n' for wing, question in named.items()} == wings


def test_the_reference_has_every_public_name() -> None:
    """Each name of `zerocopy.__all__` has an entry of its own in the API reference."""
    entries = set(re.findall(r"^\.\. [\w:]+:: zerocopy\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    assert {*zerocopy.__all__} - {"__version__"} <= entries


def test_troubleshooting_is_keyed_by_real_texts() -> None:
    """Each heading quotes an error or a warning of the package, with ... in place of names and numbers."""
    texts = [text for path in (ROOT / "zerocopy").rglob("*.py") for text in _texts_of(path)]
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    ours = [heading for heading in headings if not heading.startswith(("TypeError: ", "Errors of Ray"))]
    assert len(ours) > 10
    for heading in ours:
        pieces = [piece.strip() for piece in heading.split("...") if piece.strip()]
        assert any(all(piece in text for piece in pieces) for text in texts), heading


def _texts_of(path: Path) -> list[str]:
    """The strings of a file, with ... in place of formatted values."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.JoinedStr, ast.Constant))]
    joined = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in nodes]
    return ["".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts) for parts in joined]
