"""The shape of the package: imports flow one way, the face is one list, importing it starts nothing."""

from __future__ import annotations

import ast
from pathlib import Path

from conftest import run_python

import zerocopy

PACKAGE = Path(zerocopy.__file__).parent

# Top to bottom: a module imports only from those above it.
LAYERS = [
    "errors",
    "_store",
    "_devices",
    "_fields",
    "_pipeline",
    "_paths",
    "_tensors",
    "_reducers",
    "_modules",
    "_torchscript",
    "_export",
    "_roles",
    "_ordinary",
    "_skeleton",
    "_models",
    "_introspector",
    "_tables",
    "_plan",
    "_mapping",
    "_extraction",
    "_shards",
    "_slots",
    "_snapshot",
    "_adoption",
    "_weights",
    "_partial",
    "_collector",
    "_loading",
    "_publication",
    "_publishing",
    "_checkpoint",
    "_short_calls",
    "_reuse",
    "_passing",
    "_remote",
    "_calls",
    "_task",
    "_actor",
    "_remote_models",
    "_wrapping",
    "wrappers",
    "memory",
    "testing",
    "__init__",
]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "zerocopy":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zerocopy."):
            found.add(str(node.module).split(".")[1])
    return found


def test_imports_flow_one_way() -> None:
    """Every module is in the list, and imports only what stands above it."""
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == set(LAYERS)
    for position, module in enumerate(LAYERS):
        assert imported(PACKAGE / f"{module}.py") <= set(LAYERS[:position]), module


def test_one_module_puts_and_gets() -> None:
    """Only `_store.py` writes to Ray's object store."""
    for path in PACKAGE.glob("*.py"):
        if path.stem != "_store":
            assert "ray.put(" not in path.read_text().replace("ray.get(ray.put(value))", ""), path.name


def test_the_face_is_complete() -> None:
    """`__all__` is sorted, every name is there, and nothing else is public."""
    assert zerocopy.__all__ == sorted(zerocopy.__all__)
    public = {name for name in vars(zerocopy) if not name.startswith("_")}
    assert public - {"memory", "testing", "wrappers"} == set(zerocopy.__all__)


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
        "start = time.perf_counter()\n"
        "import zerocopy\n"
        "print(time.perf_counter() - start)\n"
    )
    assert float(done.stdout) < 0.4, "an import of something heavy crept in"
