"""The project's development tasks. `nox -l` lists them."""

import os
import sys
import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "typing", "tests"]
nox.options.reuse_existing_virtualenvs = True
PROJECT = nox.project.load_toml("pyproject.toml")
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def _install(session: nox.Session, *packages: str, group: str | None = None) -> None:
    """Install with pip and the constraints file: an unpinned torch would also install gigabytes of CUDA."""
    tools = PROJECT["dependency-groups"][group] if group else []
    session.install("-c", "constraints.txt", "torch", *packages, *tools)


def _install_tests(session: nox.Session) -> None:
    _install(session, "-e", ".[demo,data,serve]", group="tests")


@nox.session
def demo(session: nox.Session) -> None:
    """Semantic search over the standard library, with four workers that share one model."""
    _install(session, "-e", ".[demo]")
    session.run("zerocopy", "demo", *session.posargs, env=OFFLINE)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests. Arguments go to pytest and replace the default run."""
    _install_tests(session)
    if session.posargs:
        session.run("pytest", *session.posargs, env=OFFLINE)
    else:
        _run_tests(session)


@nox.session
def tests_lowest(session: nox.Session) -> None:
    """The tests with the lowest Ray version that `pyproject.toml` allows, without the timed tests. Arguments go to pytest."""
    requirement = next(one for one in PROJECT["project"]["dependencies"] if one.startswith("ray>="))
    ray = requirement.removeprefix("ray>=")
    constraints = Path("constraints.txt").read_text().splitlines()
    pinned = [line for line in constraints if "==" in line and not line.startswith(("#", "ray=="))]
    tools = PROJECT["dependency-groups"]["tests"]
    older = "protobuf<7"  # Serve of Ray 2.53 reads an attribute that protobuf 7 has removed
    session.install(*pinned, "-e", ".[demo,data,serve]", f"ray=={ray}", older, *tools)
    if session.posargs:
        session.run("pytest", *session.posargs, env=OFFLINE)
    else:
        _run_tests(session, "--ignore", "tests/timed")


def _run_tests(session: nox.Session, *arguments: str, which: str = "not long") -> None:
    """Run tests in two processes, each with a cluster that forbids references out of band, and then the tests marked `alone`."""
    two = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    forbidden = {"RAY_allow_out_of_band_object_ref_serialization": "0"}
    session.run("pytest", *two, "-m", f"not alone and {which}", *arguments, env={**OFFLINE, **forbidden})
    session.run("pytest", "-m", f"alone and {which}", *arguments, env=OFFLINE)


@nox.session
def coverage(session: nox.Session) -> None:
    """How much of the package the tests run in their own process. Timed tests are left out: coverage slows only one side."""
    _install_tests(session)
    left_out = ["--ignore", "tests/timed", "--ignore", "tests/project"]
    session.run("coverage", "run", "-m", "pytest", *(session.posargs or left_out), env=OFFLINE)
    session.run("coverage", "report", "--skip-covered", "--show-missing")


@nox.session
def faults(session: nox.Session) -> None:
    """Make every fault for real. Writes the tables of docs/reliability.md again, with the times of this machine."""
    _install_tests(session)
    files = ["tests/faults", "tests/cluster/test_losses.py"]
    session.run("pytest", *files, "--faults-page", "docs/reliability.md", *session.posargs, env=OFFLINE)


@nox.session
def soak(session: nox.Session) -> None:
    """Sixty seconds of constant changes, in which every weight is checked again and again. `-- --seconds 600` runs longer.

    Then a live update under load, with more and larger versions than in the tests, and a load test, which writes a table in
    docs/reliability.md. Then the tests that are too long for each change, without the faults.
    """
    _install_tests(session)
    session.run("python", "tests/soak.py", *session.posargs)
    session.run("python", "tests/live_update.py", "--versions", "60", "--width", "1024")
    session.run("python", "tests/load_held.py", "--output", "docs/reliability.md")
    _run_tests(session, "--ignore", "tests/faults", "--ignore", "tests/cluster/test_losses.py", which="long")


@nox.session
def nodes(session: nox.Session) -> None:
    """Measure the cost of bringing weights to nodes. Writes its section of docs/nodes.md."""
    _install(session, "-e", ".")
    arguments = session.posargs or ["--output", "docs/nodes.md"]
    session.run("python", "tests/measure_nodes.py", *arguments)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare zerocopy with the other ways. Without arguments a full run, which writes docs/benchmarks.md again.

    With `--names` it writes only the section on names and versions again, in minutes.
    """
    _install(session, "-e", ".[data,serve]", group="bench")
    is_full = not {*session.posargs} - {"--resume", "--names"}
    arguments = [*session.posargs, *(["--output", "docs"] if is_full else [])]
    path = os.pathsep.join([str(Path(__file__).parent / "tests"), os.environ.get("PYTHONPATH", "")])
    session.run("python", "-m", "benchmarks", *arguments, env={**OFFLINE, "PYTHONPATH": path})


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the source archive in `dist`. Each is installed in a clean environment, where the README runs."""
    sys.path.insert(0, "tests")
    from typed_pages import program_of

    session.install("build")
    session.run("python", "-m", "build", "--outdir", "dist")
    for archive in sorted(Path("dist").glob(f"zerocopy_ray-{PROJECT['project']['version']}*")):
        # The checkout cannot be imported there. The path of the session's own folder is too long for sockets.
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            session.run("python", "-m", "venv", str(folder / "venv"))
            python, script = (str(folder / "venv/bin" / command) for command in ("python", "zerocopy"))
            wanted = f"zerocopy-ray[demo] @ {archive.resolve().as_uri()}"
            session.run(python, "-m", "pip", "install", "-c", "constraints.txt", "torch", wanted, external=True)
            (folder / "readme.py").write_text(program_of(Path("README.md")))
            with session.chdir(folder):
                session.run(python, "readme.py", external=True)
                session.run(script, "demo", "--limit", "400", external=True, env=OFFLINE)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site in docs/_build. Warnings are errors."""
    _install(session, "-e", ".", group="docs")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "docs/_build", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style with ruff."""
    _install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types: the package strictly, and with two checkers a file that uses all public names, the README and the pages."""
    _install(session, "-e", ".[data]", group="typing")
    session.run("mypy")
    session.run("pyright")
    session.run("python", "tests/typed_pages.py")
