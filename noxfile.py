"""The project's chores. `nox -l` lists them."""

import os
from pathlib import Path

import nox

nox.options.sessions = ["lint", "typing", "tests"]
nox.options.reuse_existing_virtualenvs = True
PROJECT = nox.project.load_toml("pyproject.toml")


def _install(session: nox.Session, *packages: str, group: str | None = None) -> None:
    """Install by pip, under the constraints: an unpinned torch would bring gigabytes of CUDA."""
    tools = PROJECT["dependency-groups"][group] if group else []
    session.install("-c", "constraints.txt", "torch", *packages, *tools)


@nox.session
def demo(session: nox.Session) -> None:
    """Semantic search over the standard library, over four workers that share one model."""
    _install(session, "-e", ".[demo]")
    session.run("python", "examples/stdlib_search.py", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, twice where object references matter: once with references out of band forbidden.

    What is timed runs by itself: measuring coverage slows Python down, and so one side of its ratios.
    """
    _install(session, "-e", ".[demo,data]", "ray[serve]", group="tests")
    env = {"HF_HUB_OFFLINE": "1"}
    chosen = session.posargs or ["--ignore", "tests/timed"]
    session.run("coverage", "run", "-m", "pytest", *chosen, env=env)
    if not session.posargs:
        session.run("pytest", "-q", "tests/timed", env=env)
        strict = {**env, "RAY_allow_out_of_band_object_ref_serialization": "0"}
        files = ["tests/publish/test_passing.py", "tests/promises/test_leaks.py", "tests/run/test_task.py"]
        session.run("pytest", "-q", *files, env=strict)
        session.run("coverage", "report", "--skip-covered", "--show-missing")


@nox.session
def bench(session: nox.Session) -> None:
    """zerocopy against the other ways, measured. Without arguments a full run, which writes docs/benchmarks.md anew."""
    _install(session, "-e", ".[bench]", "ray-zerocopy==0.2.0")
    is_full = not {*session.posargs} - {"--resume"}
    arguments = [*session.posargs, *(["--output", "docs"] if is_full else [])]
    path = os.pathsep.join([str(Path(__file__).parent / "tests"), os.environ.get("PYTHONPATH", "")])
    session.run("python", "-m", "benchmarks", *arguments, env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": path})


@nox.session
def lint(session: nox.Session) -> None:
    """Style, by ruff."""
    _install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Types: the package strictly, and a file that uses the whole public face under two checkers."""
    _install(session, "-e", ".[data]", group="typing")
    session.run("mypy")
    session.run("pyright")
