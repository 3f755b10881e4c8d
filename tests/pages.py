"""How do measuring programs write their figures into a page? Each program has a section and replaces it."""

from __future__ import annotations

import re
from pathlib import Path


def renew(page: Path, section: str) -> None:
    """Replace the section with the same heading, or append the new one. The heading is the first line."""
    heading, *_ = section.splitlines()
    parts = re.split(r"^(?=## )", page.read_text(), flags=re.MULTILINE)
    place = next((number for number, part in enumerate(parts) if part.startswith(f"{heading}\n")), len(parts))
    parts[place : place + 1] = [f"{section}\n\n"]
    if place == len(parts) - 1 and place:
        parts[place - 1] = parts[place - 1].rstrip("\n") + "\n\n"
    page.write_text("".join(parts).rstrip("\n") + "\n")
