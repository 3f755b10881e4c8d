"""The command line. `nox -s bench -- [module:build ...]` runs `python -m benchmarks` with `tests` on `PYTHONPATH`."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import budget, models, report, runner, systems
from zerocopy.errors import ZeroCopyError

T = TypeVar("T")
QUICK = {"models": ["bert"], "systems": ["zerocopy", "ray-zerocopy", "plain"], "repeats": 1, "workers": [4]}
QUICK_NAMES = 0.1  # the effort for names and versions in a quick run
FULL, SMALL = "bert", "stack"  # the models for names and versions: in a full run, and in a quick one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or show the results of an earlier run. Returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the running trial is ended too
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.names:
            return _renew_names(options)
        results = report.load(options.show) if options.show else _run(options)
    except ZeroCopyError as error:
        parser.error(str(error))
    print(report.terminal(results))
    _write(results, options.output)
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    folder = options.output / "benchmarks"
    earlier = report.load(folder / report.FILE) if options.resume else None
    choice = _choice(options)
    names = {"names": earlier["names"]} if earlier and "names" in earlier else {}
    results = runner.run(choice, _tell, lambda results: report.save({**results, **names}, folder), earlier)
    if "names" in choice.measures and not names:
        names = {"names": _names(options)}
    return {**results, **names}


def _names(options: argparse.Namespace) -> dict[str, Any]:
    """Measure names and versions."""
    repeats = options.repeats or _default(options, "repeats", 3)
    effort = QUICK_NAMES if options.quick else 1.0
    return budget.take(SMALL if options.quick else FULL, repeats, effort, _tell)


def _renew_names(options: argparse.Namespace) -> int:
    """Measure names and versions, and write only their figures and their section. Returns the exit status."""
    told = _names(options)
    print(budget.terminal(told))
    path, page = options.output / "benchmarks" / report.FILE, options.output / "benchmarks.md"
    report.save({**(report.load(path) if path.exists() else {}), "names": told}, path.parent)
    page.write_text(budget.put_into(page.read_text() if page.exists() else "# Benchmarks\n\n", budget.section(told)))
    _tell(f"Written: {page}")
    return 0


def _choice(options: argparse.Namespace) -> runner.Choice:
    chosen = [*options.own, *(options.models or [])]
    return runner.Choice(
        models=chosen or _default(options, "models", models.names()),
        systems=options.systems or _default(options, "systems", list(systems.SYSTEMS)),
        measures=options.figures or _default(options, "figures", list(_figures(options))),
        repeats=options.repeats or _default(options, "repeats", 3),
        workers=options.workers or _default(options, "workers", [1, 4, 8]),
        effort=0.35 if options.quick else 1.0,
    )


def _default(options: argparse.Namespace, name: str, full: T) -> T:
    return QUICK.get(name, full) if options.quick else full  # type: ignore[return-value]


def _figures(options: argparse.Namespace) -> Sequence[str]:
    """The default figures: memory and times in a quick run, otherwise all.

    `scale` and `names` have their own models. They are left out if the user has chosen models.
    """
    return runner.MEASURES[:2] if options.quick else runner.MEASURES[: 4 if options.own or options.models else 6]


def _write(results: dict[str, Any], output: Path) -> None:
    folder = output / "benchmarks"
    report.save(results, folder)
    images = []
    if importlib.util.find_spec("matplotlib"):
        from benchmarks import plots

        images = [path.relative_to(output).as_posix() for path in plots.draw(results, folder)]
    else:
        _tell("No plots: matplotlib is missing. Hint: pip install matplotlib.")
    page = output / "benchmarks.md"
    page.write_text(report.page(results, images))
    _tell(f"Written: {page} and {folder}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nox -s bench --",
        description="Compare zerocopy with other ways to give a model to Ray workers, each trial in a new process.",
    )
    parser.add_argument(
        "own",
        nargs="*",
        metavar="module:build",
        type=_model,
        help="a function without arguments that returns your model",
    )
    parser.add_argument("--models", type=_several(_model), help=f"some of {','.join(models.names())},llama<layers>")
    parser.add_argument("--systems", type=_several(_system), help=f"some of {','.join(systems.SYSTEMS)}")
    parser.add_argument("--figures", type=_several(_measure), help=f"some of {','.join(runner.MEASURES)}")
    parser.add_argument("--repeats", type=_count, help="how many new processes measure each figure (3)")
    parser.add_argument(
        "--workers", type=_several(_count), help="how many workers share a model in the memory figures (1,4,8)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/bench"), help="folder for the page and the results (build/bench)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure memory and times of one model with three systems (about 2 minutes)",
    )
    parser.add_argument("--names", action="store_true", help="measure only names and versions (a few minutes)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in the output folder: take only the missing trials"
    )
    parser.add_argument("--show", type=Path, metavar="JSON", help="print and plot these results again; take no trials")
    return parser


def _several(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [one(part) for part in text.split(",") if part]


def _model(name: str) -> str:
    return _found(models.find, name)


def _system(name: str) -> str:
    return _found(systems.find, name)


def _found(find: Callable[[str], object], name: str) -> str:
    try:
        find(name)
    except ZeroCopyError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _measure(name: str) -> str:
    if name not in runner.MEASURES:
        raise argparse.ArgumentTypeError(
            f"There are no figures {name!r}. Hint: choose from {', '.join(runner.MEASURES)}."
        )
    return name


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero.")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
