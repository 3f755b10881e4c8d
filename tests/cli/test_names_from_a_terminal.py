"""Do the commands publish, list, alias, remove and memory work on the names of a cluster?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import Result

import zerocopy

MODEL = "models_to_name"
NBYTES = (512 * 512 + 512) * (4 + 2)


def test_a_name_from_its_first_version_to_its_end(
    name: str, told: Callable[..., Any], zerocopy_command: Callable[..., Result]
) -> None:
    """The commands publish a function's result, list it, set aliases and remove it, with the error messages of the library."""
    first = told("publish", f"{MODEL}:instance", "--name", name, "--alias", "stable")
    assert (first["version"], first["aliases"], first["source"]) == (1, ["latest", "stable"], False)
    second = told("publish", f"{MODEL}:build", "--name", name, "--source")
    assert (second["version"], second["bytes"], second["class"], second["source"]) == (2, NBYTES, "Stack", True)
    again = told("publish", f"{MODEL}:build", "--name", name)
    assert (again["version"], again["digest"]) == (2, second["digest"])

    listed = [one for one in told("list", "--sort-by", "bytes") if one["name"] == name]
    assert [(one["version"], one["aliases"], len(one["nodes"])) for one in listed] == [
        (2, ["latest"], 1),
        (1, ["stable"], 1),
    ]
    table = zerocopy_command("list", "--units", "KB").output
    assert f"{NBYTES / 1000:,.3f} KB" in table

    assert told("alias", name, "stable", 2)["digest"] == second["digest"]
    assert zerocopy.lookup(name, alias="stable").version.number == 2
    assert told("remove", name, "--version", 1) == {"name": name, "version": 1}
    refused = zerocopy_command("remove", name, "--version", 2)
    assert refused.exit_code == 1
    assert "point at it. Hint:" in refused.stderr
    assert zerocopy_command("remove", name).output == f"Removed {name!r}.\n"
    gone = zerocopy_command("alias", name, "stable", 2)
    assert gone.exit_code == 1
    assert f"No publication has the name {name!r}" in gone.stderr


def test_memory_is_told_once_and_again(
    name: str, tmp_path: Path, told: Callable[..., Any], zerocopy_command: Callable[..., Result]
) -> None:
    """The memory report can be sorted, printed again and again as one line of JSON each, and drawn as a picture."""
    import torch

    publication = zerocopy.publish(torch.nn.Linear(512, 512, bias=False), name=name)
    report = told("memory", "--sort-by", "PRIVATE")
    private = [one["private"] for one in report["processes"]]
    assert private == sorted(private, reverse=True)
    (one,) = [one for one in report["publications"] if one["name"] == name]
    assert one["shared"] == 512 * 512 * 4

    watched = [
        "memory",
        "--watch",
        "--times",
        2,
        "--interval",
        0.1,
        "--format",
        "json",
        "--plot",
        tmp_path / "memory.png",
    ]
    lines = zerocopy_command(*watched).stdout.splitlines()
    assert [json.loads(line).keys() for line in lines] == [report.keys()] * 2
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    printed = zerocopy_command("memory").output
    assert printed.startswith(f"The cluster at {ray.get_runtime_context().gcs_address}:\n")
    assert "plain copies" in printed
    publication.close()


@pytest.mark.parametrize("address", ["ray://somewhere:10001"])
def test_ray_client_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch, zerocopy_command: Callable[..., Result]
) -> None:
    """Ray Client is refused because it has no object store on the client's machine."""
    monkeypatch.setattr("zerocopy._store.object_store.is_running", lambda: False)
    done = zerocopy_command("list", "--address", address)
    assert done.exit_code == 1
    assert "cannot work through Ray Client (ray://). Hint: run the command on a node of the cluster." in done.stderr
