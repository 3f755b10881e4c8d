"""Do the Python blocks of the README and the pages pass mypy and pyright? Each page is one program."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
STRICTLY = "# pyright: strict, reportUnknownMemberType=false"  # ray.init is partly unknown
# Type checkers treat a class that Serve decorates as the plain class, without `bind`; checkpoints.md needs more libraries.
NOT_CHECKED = {"checkpoints.md", "serve.md"}


def program_of(page: Path) -> str:
    """The blocks of a page as one program, with the line numbers of the page, so that messages show the right lines."""
    lines: list[str] = []
    text = page.read_text()
    for found in BLOCK.finditer(text):
        above = text[: found.start(1)].count("\n")
        lines += [""] * (above - len(lines)) + found[1].splitlines()
    return "\n".join(lines) + "\n"


def main() -> int:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for page in pages:
            if page.name not in NOT_CHECKED and (program := program_of(page)).strip():
                path = Path(folder, f"{page.stem.replace('-', '_').lower()}_page.py")
                path.write_text(STRICTLY + program if page.name == "README.md" else program)
                files.append(str(path))
        checks = (["mypy", *files], ["pyright", "--pythonpath", sys.executable, *files])
        return max(subprocess.run([sys.executable, "-m", *check], check=False, cwd=ROOT).returncode for check in checks)


if __name__ == "__main__":
    sys.exit(main())
