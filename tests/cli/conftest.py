"""What the tests of the command line share: commands run in this process, on the tests' cluster."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from zerocopy._cli.main import cli

MODELS = """
import torch
from torch import nn
import zerocopy
from zerocopy import copied, shared

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(512, 512), nn.Linear(512, 512).half()
    def forward(self, rows):
        return self.second(self.first(rows).half())

def build():
    print("this is no result")
    torch.manual_seed(0)
    return Stack()

def batch():
    return torch.ones(2, 512)

def broken():
    raise ValueError("no weights here")

def wants(size):
    return nn.Linear(size, size)

number = 5
instance = nn.Linear(4, 4)
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with models of a user's own."""
    (tmp_path / "own_models_for_cli.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def zerocopy_command() -> Callable[..., Result]:
    """Runs a command line in this process."""

    def run(*arguments: object) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the interpreter would show, and go on
            return CliRunner().invoke(cli, [*map(str, arguments)], prog_name="zerocopy", catch_exceptions=False)

    return run


@pytest.fixture
def told(zerocopy_command: Callable[..., Result]) -> Callable[..., Any]:
    """What a command that ends well tells as JSON, which stands alone on stdout."""

    def run(*arguments: object) -> Any:
        done = zerocopy_command(*arguments, "--format", "json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run
