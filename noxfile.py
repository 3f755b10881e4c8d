"""The project's chores. `nox -l` lists them."""

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
    """Install by pip, under the constraints: an unpinned torch would bring gigabytes of CUDA."""
    tools = PROJECT["dependency-groups"][group] if group else []
    session.install("-c", "constraints.txt", "torch", *packages, *tools)


def _install_tests(session: nox.Session) -> None:
    _install(session, "-e", ".[demo,data,serve]", group="tests")


@nox.session
def demo(session: nox.Session) -> None:
    """Semantic search over the standard library, over four workers that share one model."""
    _install(session, "-e", ".[demo]")
    session.run("zerocopy", "demo", *session.posargs, env=OFFLINE)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests. Arguments are pytest's, and stand for all of this."""
    _install_tests(session)
    if session.posargs:
        session.run("pytest", *session.posargs, env=OFFLINE)
    else:
        _run_tests(session)


@nox.session
def tests_lowest(session: nox.Session) -> None:
    """The tests with the lowest Ray that `pyproject.toml` allows; what is timed is left out."""
    requirement = next(one for one in PROJECT["project"]["dependencies"] if one.startswith("ray>="))
    ray = requirement.removeprefix("ray>=")
    constraints = Path("constraints.txt").read_text().splitlines()
    pinned = [line for line in constraints if "==" in line and not line.startswith(("#", "ray=="))]
    tools = PROJECT["dependency-groups"]["tests"]
    older = "protobuf<7"  # Serve of Ray 2.53 reads an attribute that protobuf 7 has removed
    session.install(*pinned, "-e", ".[demo,data,serve]", f"ray=={ray}", older, *tools)
    _run_tests(session, "--ignore", "tests/timed")


def _run_tests(session: nox.Session, *arguments: str, which: str = "not long") -> None:
    """Two processes, each with a cluster where references out of band are forbidden; then what needs to be alone."""
    two = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    forbidden = {"RAY_allow_out_of_band_object_ref_serialization": "0"}
    session.run("pytest", *two, "-m", f"not alone and {which}", *arguments, env={**OFFLINE, **forbidden})
    session.run("pytest", "-m", f"alone and {which}", *arguments, env=OFFLINE)


@nox.session
def coverage(session: nox.Session) -> None:
    """How much of the package the tests run in their own process. Measuring would slow one side of what is timed."""
    _install_tests(session)
    left_out = ["--ignore", "tests/timed", "--ignore", "tests/project"]
    session.run("coverage", "run", "-m", "pytest", *(session.posargs or left_out), env=OFFLINE)
    session.run("coverage", "report", "--skip-covered", "--show-missing")


@nox.session
def faults(session: nox.Session) -> None:
    """Every fault, really made. Writes the tables of docs/reliability.md anew, with the times of this machine."""
    _install_tests(session)
    files = ["tests/faults", "tests/cluster/test_losses.py"]
    session.run("pytest", *files, "--faults-page", "docs/reliability.md", *session.posargs, env=OFFLINE)


@nox.session
def soak(session: nox.Session) -> None:
    """Sixty seconds of churn, in which every weight is checked again and again. `-- --seconds 600` for more.

    Then a live update under load, of more and larger versions than in the tests; and a crowd: a table in docs/reliability.md.
    Then the tests that are too long for each change, but for faults.
    """
    _install_tests(session)
    session.run("python", "tests/soak.py", *session.posargs)
    session.run("python", "tests/live_update.py", "--versions", "60", "--width", "1024")
    session.run("python", "tests/load_held.py", "--output", "docs/reliability.md")
    _run_tests(session, "--ignore", "tests/faults", "--ignore", "tests/cluster/test_losses.py", which="long")


@nox.session
def nodes(session: nox.Session) -> None:
    """What it costs to bring weights to nodes: writes its section of docs/nodes.md."""
    _install(session, "-e", ".")
    arguments = session.posargs or ["--output", "docs/nodes.md"]
    session.run("python", "tests/measure_nodes.py", *arguments)


@nox.session
def bench(session: nox.Session) -> None:
    """zerocopy against the other ways, measured. Without arguments a full run, which writes docs/benchmarks.md anew.

    With `--names` it writes the section on names and versions anew, in minutes.
    """
    _install(session, "-e", ".[bench]", "ray-zerocopy==0.2.0")
    is_full = not {*session.posargs} - {"--resume", "--names"}
    arguments = [*session.posargs, *(["--output", "docs"] if is_full else [])]
    path = os.pathsep.join([str(Path(__file__).parent / "tests"), os.environ.get("PYTHONPATH", "")])
    session.run("python", "-m", "benchmarks", *arguments, env={**OFFLINE, "PYTHONPATH": path})


@nox.session
def package(session: nox.Session) -> None:
    """The wheel and the source archive, in `dist`; each is installed into a clean environment, and runs the README there."""
    sys.path.insert(0, "tests")
    from typed_pages import program_of

    session.install("build")
    session.run("python", "-m", "build", "--outdir", "dist")
    for archive in sorted(Path("dist").glob(f"zerocopy_ray-{PROJECT['project']['version']}*")):
        with (
            tempfile.TemporaryDirectory() as name
        ):  # where the checkout cannot be imported; the session's own is long for sockets
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
    """The site, in docs/_build. Warnings are errors."""
    _install(session, "-e", ".", group="docs")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "docs/_build", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, by ruff."""
    _install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Types: the package strictly; under two checkers a file that uses the whole public face, the README and the pages."""
    _install(session, "-e", ".[data]", group="typing")
    session.run("mypy")
    session.run("pyright")
    session.run("python", "tests/typed_pages.py")
