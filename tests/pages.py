"""How do programs that measure write their figures into a page? Each has a section, which it writes anew."""

from __future__ import annotations

import re
from pathlib import Path


def renew(page: Path, section: str) -> None:
    """Put a section in the place of the one with the same heading, or at the end. The heading is its first line."""
    heading, *_ = section.splitlines()
    parts = re.split(r"^(?=## )", page.read_text(), flags=re.MULTILINE)
    place = next((number for number, part in enumerate(parts) if part.startswith(f"{heading}\n")), len(parts))
    parts[place : place + 1] = [f"{section}\n\n"]
    if place == len(parts) - 1 and place:
        parts[place - 1] = parts[place - 1].rstrip("\n") + "\n\n"
    page.write_text("".join(parts).rstrip("\n") + "\n")
