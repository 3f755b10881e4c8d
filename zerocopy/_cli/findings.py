"""What is a finding, how is a list of findings printed, and which text may others read?"""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import attrs

from zerocopy._tables import as_text

Level: TypeAlias = Literal["ok", "warning", "failure"]


@attrs.frozen
class Finding:
    """The result of one check.

    Attributes:
        check: the name of the check.
        level: a failure ends the command with status 1.
        what: what was found, as a sentence.
        remedy: what to do about it; empty if all is well.
        node: id of the node, empty for all nodes.
    """

    check: str
    level: Level
    what: str
    remedy: str = ""
    node: str = ""


def ok(check: str, what: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, remedy: str) -> Finding:
    """It works, but with a disadvantage."""
    return Finding(check, "warning", what, remedy)


def failure(check: str, what: str, remedy: str) -> Finding:
    """A promise of zerocopy does not hold here."""
    return Finding(check, "failure", what, remedy)


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether at least one finding is a failure."""
    return any(one.level == "failure" for one in findings)


def text_of(findings: Sequence[Finding]) -> str:
    """A table: each finding with its remedy below it."""
    several = len({one.node for one in findings if one.node}) > 1
    rows = [
        (
            one.level,
            one.check,
            *((one.node[:8],) if several else ()),
            "\n".join(filter(None, [one.what, _way_out(one)])),
        )
        for one in findings
    ]
    headers = ("", "check", *(("node",) if several else ()), "found")
    counts = ", ".join(_count(findings, level) for level in ("failure", "warning", "ok"))
    return f"{as_text(headers, rows, right=())}\n\n{counts}"


def _way_out(one: Finding) -> str:
    return f"→ {one.remedy}" if one.remedy else ""


def _count(findings: Sequence[Finding], level: Level) -> str:
    count = sum(one.level == level for one in findings)
    return f"{count} {level}" + ("" if level == "ok" or count == 1 else "s")


def report_of(findings: Sequence[Finding], versions: Iterable[str]) -> str:
    """Markdown to paste into an issue, without names of users or hosts, and without home folders."""
    lines = ["### zerocopy doctor", "", *(f"- {version}" for version in versions), ""]
    for one in findings:
        node = f" (node {one.node[:8]})" if one.node else ""
        lines.append(f"- **{one.level}** {one.check}{node}: {' '.join(filter(None, [one.what, _way_out(one)]))}")
    return scrubbed("\n".join(lines), getpass.getuser(), socket.gethostname(), str(Path.home()))


def scrubbed(text: str, user: str, host: str, home: str) -> str:
    """`text` without home folders, the name of the user and the name of the host."""
    text = text.replace(home, "~") if len(home) > 1 else text
    text = re.sub(r"/(home|Users)/[^/\s:'\"]+", "~", text)
    for name, word in ((user, "USER"), (host, "HOST")):
        if name not in ("", "root"):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word, text)
    return text
