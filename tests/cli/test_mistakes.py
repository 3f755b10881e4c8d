"""Does a user's mistake end a command with a sentence on stderr, the right exit status, and no traceback?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from zerocopy._cli.main import cli

MODEL = "models_to_name"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["plan", "nowhere:build"], 2, "there is no 'nowhere:build': No module named 'nowhere'"),
        (["plan", f"{MODEL}:nothing"], 2, f"there is no '{MODEL}:nothing'"),
        (["plan", MODEL], 2, "does not name an object. Hint: give module:object"),
        (
            ["plan", "a/b.py:build"],
            2,
            "'a/b.py' is a file, not a module. Hint: go to the folder 'a', and write b:build.",
        ),
        (["plan", f"{MODEL}:wants"], 2, "needs arguments: missing a required argument: 'size'"),
        (["plan", f"{MODEL}:broken"], 1, "raised ValueError (models_to_name.py, line 32): no weights here"),
        (["plan", f"{MODEL}:number"], 1, "zerocopy.plan found no model to share in this 'int'"),
        (
            ["plan", "broken_for_cli:build"],
            1,
            "importing 'broken_for_cli' raised ModuleNotFoundError (broken_for_cli.py, line 1)",
        ),
        (["plan", f"{MODEL}:build", "--workers", "0"], 2, "0 is not in the range x>=1"),
        (["publish", f"{MODEL}:instance", "--name", "x", "--source"], 2, "--source needs a function"),
        (["publish", f"{MODEL}:build"], 2, "Missing option '--name'"),
        (["memory", "--times", "2"], 2, "--times is for --watch"),
        (["demo", "--model", "large", "--query", "x"], 2, "are for --model minilm"),
        (["list", "--format", "yaml"], 2, "'yaml' is not one of 'table', 'json'"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zerocopy_command: Callable[..., Result],
) -> None:
    """A command reports a user's mistake before it starts anything."""
    (tmp_path / "broken_for_cli.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    done = zerocopy_command(*arguments)
    assert done.exit_code == status
    assert not done.stdout
    assert words in " ".join(done.stderr.split())


def test_without_a_cluster_the_way_to_one_is_told(tmp_path: Path) -> None:
    """A command that needs a cluster and finds none says how to start one."""
    program = Path(sys.executable).parent / "zerocopy"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
        )

    done = run("list", "--address", "127.0.0.1:1", "--format", "json")
    assert done.returncode == 1
    assert not done.stdout
    assert "No Ray cluster can be reached at '127.0.0.1:1'. Hint: start one with `ray start --head`" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_has_help_with_examples() -> None:
    """The program itself also has help with examples."""
    assert set(cli.commands) == {"plan", "doctor", "list", "publish", "remove", "alias", "memory", "bench", "demo"}
    for command in ([], *([name] for name in cli.commands)):
        done = CliRunner().invoke(cli, [*command, "--help"], prog_name="zerocopy")
        assert done.exit_code == 0
        assert "  Examples:\n    zerocopy" in done.output
