"""The code in the README and the guide runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import run_python

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "shared once per node",
    "docs/guide.md": "shared once per node",
    "docs/migration.md": "torch.Size([1, 8])",
}


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str, tmp_path: Path, address: str) -> None:
    """Every Python block of a page, one after the other, is a program."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks)
    if page != "README.md":  # one page starts its cluster as it says, the others save the time
        code, count = re.subn(r"^ray\.init\(.*\)$", f"ray.init({address!r})", code, flags=re.MULTILINE)
        assert count == 1
    program = tmp_path / "page.py"
    program.write_text(code)
    done = run_python("", str(program))
    assert done.returncode == 0, done.stderr[-3000:]
    assert PAGES[page] in done.stdout


def test_links_lead_somewhere() -> None:
    """Every relative link of a page names a file that exists."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?!http)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_map_of_the_house_is_complete() -> None:
    """The table in the docs names every wing once, and says of it what the wing says of itself."""
    page = (ROOT / "docs/how-it-works.md").read_text()
    named = dict(re.findall(r"^\| `(\w+)/` \| (.*?) \|", page, re.MULTILINE))
    wings = {path.parent.name: path.read_text() for path in (ROOT / "zerocopy").glob("_*/__init__.py")}
    assert {wing: f'"""{question}"""\n' for wing, question in named.items()} == wings
