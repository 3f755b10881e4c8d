"""Does the package keep its structure: imports in one direction, one list of public names, an import without side effects?"""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import pickle
from collections.abc import Iterator
from pathlib import Path

from conftest import run_python

import zerocopy

PACKAGE = Path(zerocopy.__file__).parent

# From the lowest wing up: a file imports only from its own wing and from wings above it in this list.
WINGS = [
    "errors",
    "_words",
    "_tables",
    "_progress",
    "_compat",
    "_store",
    "_nodes",
    "_seeing",
    "_declare",
    "_split",
    "_changes",
    "_load",
    "_publish",
    "_cluster",
    "_run",
    "_wrap",
    "wrappers",
    "memory",
    "testing",
    "__init__",
    "_cli",
]


def files() -> list[Path]:
    return list(PACKAGE.rglob("*.py"))


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
    """Every file belongs to a wing of the list, and imports only from its own wing and from wings above it in the list."""
    assert {wing_of(path) for path in files()} == set(WINGS)
    for path in files():
        below = set(WINGS[: WINGS.index(wing_of(path)) + 1])
        assert imported(path) <= below, path


def imported_files(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zerocopy":
            place = PACKAGE.joinpath(*str(node.module).split(".")[1:])
            candidates = [place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)]
            yield from filter(Path.exists, candidates)


def test_no_imports_go_in_a_circle() -> None:
    """Imports within a wing also go in one direction."""
    graph = {path: set(imported_files(path)) for path in files()}
    assert sum(map(len, graph.values())) > 100
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_one_module_puts_and_gets() -> None:
    """Only `object_store.py` writes to Ray's object store."""
    for path in files():
        if path.stem != "object_store":
            assert "ray.put(" not in path.read_text(), path.name


def test_the_face_is_complete() -> None:
    """`__all__` lists all public names, sorted, with the wrappers in their own sorted part."""
    start = zerocopy.__all__.index("ActorWrapper")
    others, wrappers = zerocopy.__all__[:start], zerocopy.__all__[start:]
    assert (others, wrappers) == (sorted(others), sorted(wrappers))
    public = {name for name in vars(zerocopy) if not name.startswith("_")}
    assert public - {"memory", "wrappers"} == set(zerocopy.__all__)


def test_public_names_name_no_private_file() -> None:
    """Pickles, `help` and errors name the public module of each public class and function."""
    for name in set(zerocopy.__all__) - {"errors", "testing"}:
        assert "._" not in getattr(getattr(zerocopy, name), "__module__", "zerocopy"), name
    for name in ("Field", "Publication", "SharePlan", "Pool", "MemoryReport", "ModelWrapper", "Task"):
        assert getattr(zerocopy, name).__module__ == "zerocopy"
        assert pickle.loads(pickle.dumps(getattr(zerocopy, name))) is getattr(zerocopy, name)


def test_the_version_is_that_of_the_distribution() -> None:
    """`zerocopy.__version__` is the installed version."""
    assert zerocopy.__version__ == importlib.metadata.version("zerocopy-ray")


def test_importing_is_light_and_starts_nothing() -> None:
    """`import zerocopy` takes little time after torch and Ray, and starts neither Ray nor CUDA, nor a thread."""
    program = (
        "import sys, threading, time\n"
        "import ray, torch, ray.actor, ray.cloudpickle\n"
        "before, before_modules, start = threading.active_count(), set(sys.modules), time.process_time()\n"
        "import zerocopy\n"
        "print((time.process_time() - start) / start)\n"
        "assert not ray.is_initialized()\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert threading.active_count() == before\n"
        "assert 'rich' not in sys.modules\n"
        "assert 'ray.data' not in sys.modules\n"
        "assert not {'click', 'packaging', 'zerocopy._cli'} & sys.modules.keys() - before_modules\n"
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25, "an import of something heavy crept in"
