"""The shape of the package: imports flow one way, the face is one list, importing it starts nothing."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import run_python

import zerocopy

PACKAGE = Path(zerocopy.__file__).parent

# From the ground up: a file imports only from its own wing and from what stands above it in this list.
WINGS = [
    "errors",
    "_tables",
    "_compat",
    "_store",
    "_declare",
    "_split",
    "_changes",
    "_load",
    "_publish",
    "_run",
    "_wrap",
    "wrappers",
    "memory",
    "testing",
    "__init__",
]

# Imports that still run upward.
UPWARD = {("_store", "_split"), ("_declare", "_load")}


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "bench" not in path.parts]


def wing_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "zerocopy":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zerocopy."):
            found.add(str(node.module).split(".")[1])
    return found


def test_imports_flow_one_way() -> None:
    """Every file is in a wing of the list, and imports only from its own wing and those above it there."""
    assert {wing_of(path) for path in files()} == set(WINGS)
    for path in files():
        below = set(WINGS[: WINGS.index(wing_of(path)) + 1])
        upward = {wing for wing in imported(path) - below if (wing_of(path), wing) not in UPWARD}
        assert not upward, path


def test_one_module_puts_and_gets() -> None:
    """Only `object_store.py` writes to Ray's object store."""
    for path in files():
        if path.stem != "object_store":
            assert "ray.put(" not in path.read_text().replace("ray.get(ray.put(value))", ""), path.name


def test_the_face_is_complete() -> None:
    """`__all__` is sorted, every name is there, and nothing else is public."""
    assert zerocopy.__all__ == sorted(zerocopy.__all__)
    public = {name for name in vars(zerocopy) if not name.startswith("_")} - {"passing"}
    assert public - {"bench", "memory", "testing", "wrappers"} == set(zerocopy.__all__)


def test_importing_starts_nothing() -> None:
    """`import zerocopy` starts neither Ray nor CUDA, no thread and no process."""
    done = run_python(
        "import ray, torch, threading\n"
        "before = threading.active_count()\n"
        "import zerocopy\n"
        "assert not ray.is_initialized()\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert threading.active_count() == before\n"
        "import sys\n"
        "assert 'rich' not in sys.modules\n"
        "assert 'ray.data' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_is_light() -> None:
    """It adds little to importing torch and Ray."""
    done = run_python(
        "import ray, torch, ray.actor, ray.cloudpickle, time\n"
        "start = time.process_time()\n"
        "import zerocopy\n"
        "print(time.process_time() - start)\n"
    )
    assert float(done.stdout) < 0.4, "an import of something heavy crept in"
