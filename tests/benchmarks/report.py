"""How are the results reported? As tables on a terminal, and as a page with plots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks import budget, figures
from benchmarks.figures import Figure, Results
from zerocopy._tables import as_text, format_bytes
from zerocopy.errors import ArgumentError

FILE = "results.json"
Table = tuple[str, list[str], list[list[str]]]  # title, headers, rows

SUMMARY = """\
Three things matter most: the memory that the workers take, the time until they are ready, and whether the model then runs as fast
as a private copy. The milliseconds of a load matter less: all systems that share memory load fast."""

HOW = """\
Every figure is from a run of this command, on the machine below:

```console
{command}
```

`nox -s bench` measures everything, for hours. With `--resume`, it continues an interrupted run, or adds models and figures to
a finished one. The page shows all trials that were taken until now. `nox -s bench -- --quick` measures a small part in minutes.
`nox -s bench -- module:build` measures a model of your own, where `build` is a function without arguments that returns it.

Figures are medians over fresh processes, with the lowest and the highest value in parentheses. Each trial measures loads and
publishing in three workers. Systems take turns. "failed" means that a system cannot do something: its error is below the
tables. "too large" means that the copies of so many workers do not fit into the memory."""

WHAT = """\
- **Memory** is that of the whole process tree: driver, raylet and workers, with every page counted once (PSS). The memory of the
  same tree before the model was created is subtracted. At that point, the workers have started, the libraries are imported, and
  a tiny model of the same classes has been used once. For the measurement, every worker has loaded the model, run it and read
  all of its weights. The driver keeps its model, except where workers read a file or build their own model: there it drops the
  model.
- **Peak** is the maximum memory of driver and raylet while publishing, including the publisher's model.
- **Publish** is compared with a `ray.put` of the same bytes as arrays, into pages of the store that were used before. For the
  file, it is the time to write the file. Nothing is read from a disk afterwards, because the file is still in memory.
- **Load** and **first forward** are measured in a worker that has imported all libraries. Before, it has loaded and run a tiny
  model of the same classes (for a model of your own: of linear layers) with the same system.
- The **first forward** of a shared model takes longer than that of a private copy. The private copy was written by the worker
  itself. The pages of the store are new to the worker: the kernel adds them to its page table at the first access (page faults).
  This happens once per load, and costs no memory.
- **Steady forward** is the time of a forward once everything is warm, divided by that of a private copy of the same model in the
  same worker. The two take turns.
- **Call** is a warm task that receives the model and returns its other argument. The caller makes one call at a time and waits
  for it. The time is divided by that of a task that does nothing and receives nothing.
- **Rows** go through `map_batches` of Ray Data with a pool of workers. The time includes loading, and excludes the start-up of
  processes."""


def save(results: Results, folder: Path) -> Path:
    """Write the results as JSON. If this is interrupted, the earlier file stays as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    fresh = path.with_suffix(".tmp")
    fresh.write_text(_lines(results))
    return fresh.replace(path)


def _lines(results: Results) -> str:
    """JSON with a line for each trial and each model. It is short, and people can read and search it."""
    parts = [f" {json.dumps(name)}: {_member(value)}" for name, value in results.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _member(value: Any) -> str:
    if isinstance(value, list):
        entries = [json.dumps(entry) for entry in value]
    elif all(isinstance(entry, dict) for entry in value.values()):
        entries = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()]
    else:
        return json.dumps(value)
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n  " + ",\n  ".join(entries) + f"\n {closing}"


def load(path: Path) -> dict[str, Any]:
    """The results that `save` wrote.

    Raises:
        ArgumentError: the file cannot be read, or is not JSON.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        hint = f"pass the {FILE} of a run to --show. To resume a run, pass its output folder to --output."
        raise ArgumentError(f"There are no results in {str(path)!r}: {error}.", hint=hint) from None
    return results


def terminal(results: Results) -> str:
    """All tables and failures, for a terminal."""
    parts = [budget.terminal(results["names"])] if "names" in results else []
    for model in measured(results):
        parts.append(_heading(results, model))
        parts += [_text(*table) for table in _tables(results, model)]
        parts += failures(results, model)
    return "\n\n".join(parts + [_text(*table) for table in _scale(results)])


def page(results: Results, images: Iterable[str] = ()) -> str:
    """The page as Markdown. `images` are the paths of the plots, relative to the folder of the page."""
    parts = [
        "# Benchmarks",
        *_summary(results),
        "## How it was measured",
        HOW.format(command=_command(results)),
        "## What is measured",
        WHAT,
        "## The machine",
        _machine(results),
    ]
    parts += [budget.section(results["names"])] if "names" in results else []
    images = list(images)
    for model in measured(results):
        parts.append(f"## {_heading(results, model)}")
        parts += [_markdown(*table) for table in _tables(results, model)]
        parts += [f"- {_without_paths(line)}" for line in failures(results, model)]
        parts += _embedded(images, f"-{slug(model)}.png")
    scale = [_markdown(*table) for table in _scale(results)]
    if scale:
        parts += ["## Load against modules", *scale, *_embedded(images, "scale.png")]
    return "\n\n".join(parts) + "\n"


def slug(model: str) -> str:
    """The name of the model, as a part of a file name."""
    return re.sub(r"\W+", "-", model)


def measured(results: Results) -> list[str]:
    """The models that have their own tables. The other models only show how load times grow."""
    return [model for model in results["models"] if model in results["settings"]["models"]]


def failures(results: Results, model: str) -> list[str]:
    """The errors of failed trials and the reasons for skipped ones, each with its system and its measures."""
    said: dict[tuple[str, str], dict[str, None]] = {}
    for trial in results["trials"]:
        words = trial.get("failure") or trial.get("skipped")
        if trial["model"] == model and words:
            said.setdefault((results["systems"][trial["system"]], words), {})[trial["measure"]] = None
    return [f"{system} ({', '.join(measures)}): {words}" for (system, words), measures in said.items()]


def _summary(results: Results) -> list[str]:
    """The most important figures of all models, side by side. Empty if only one model was measured."""
    models = measured(results)
    if len(models) < 2:
        return []
    lines = [line for model in models for line in _in_words(results, model)]
    tables = [_markdown(*table) for table in _across(results, models)]
    return ["## Summary", SUMMARY, *(["\n".join(lines)] if lines else []), *tables]


def _in_words(results: Results, model: str) -> Iterator[str]:
    """The result for one model, as a line of a list. Nothing, if adoption or plain Ray was not measured."""
    counts = [count for count in figures.worker_counts(results) if count <= 4]
    for count in counts[-1:]:
        columns = figures.memory_at(count), figures.load_at(count)
        told = [figures.summary(results, model, system, one) for one in columns for system in ("adoption", "plain")]
        medians = [f"{one.median:,.{2 if one.median < 10 else 0}f}" for one in told if one is not None]
        if len(medians) == len(told):
            memory, put_memory, load, put_load = medians
            yield (
                f"- **{results['models'][model]['title']}, {count} workers**: zerocopy with adoption takes {memory} times "
                f"the model's bytes, `ray.put` {put_memory} times. A load takes {load} ms, with `ray.put` {put_load} ms."
            )


def _across(results: Results, models: Sequence[str]) -> Iterator[Table]:
    for title, figure in figures.summary_figures(results).items():
        told = [model for model in models if _is_told(results, model, figure)]
        rows = [
            [name, *(_cell(results, model, system, figure) for model in told)]
            for system, name in results["systems"].items()
        ]
        if told:
            headers = ["", *(results["models"][model]["title"] for model in told)]
            yield title, headers, [row for row in rows if any(row[1:])]


def _heading(results: Results, model: str) -> str:
    told = results["models"][model]
    return f"{told['title']}: {format_bytes(told['bytes'])}, {told['modules']} modules"


def _tables(results: Results, model: str) -> Iterator[Table]:
    """The tables that have figures, without the columns that have none."""
    for title, columns in figures.tables(results).items():
        told = [column for column in columns if _is_told(results, model, column)]
        if told:
            yield title, ["", *(column.title for column in told)], list(_rows(results, model, told))


def _is_told(results: Results, model: str, column: Figure) -> bool:
    return any(figures.summary(results, model, system, column) for system in results["systems"])


def _rows(results: Results, model: str, columns: Sequence[Figure]) -> Iterator[list[str]]:
    for system, title in results["systems"].items():
        cells = [_cell(results, model, system, column) for column in columns]
        if any(cells):
            yield [title, *cells]


def _cell(results: Results, model: str, system: str, column: Figure) -> str:
    summary = figures.summary(results, model, system, column)
    if summary is not None:
        return summary.text(column.unit)
    trials = list(figures.trials(results, model, system, attrs.evolve(column, workers=None)))
    if any("failure" in trial for trial in trials):
        return "failed"
    is_beyond = column.workers is not None and trials  # fewer workers were measured, because more copies do not fit
    return "too large" if is_beyond or any("skipped" in trial for trial in trials) else ""


def _scale(results: Results) -> Iterator[Table]:
    """First loads of the Llamas of growing depth, fewest modules first."""
    family = figures.family(results)
    if "scale" not in results["settings"]["measures"] or not family:
        return
    headers = ["first load, ms", *(f"{results['models'][model]['modules']} modules" for model in family)]
    rows = [
        [title, *(_cell(results, model, system, figures.FIRST_LOAD) for model in family)]
        for system, title in results["systems"].items()
    ]
    yield "First load of Llamas of growing depth", headers, rows


def _text(title: str, headers: list[str], rows: list[list[str]]) -> str:
    return as_text(headers, rows, right=headers[1:], title=title)


def _markdown(title: str, headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine(results: Results) -> str:
    machine, settings = results["machine"], results["settings"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores ({machine['processor']}), {format_bytes(machine['memory'])} of memory, "
        f"{machine['system']}. {versions}. Trials of each kind: {settings['repeats']}."
    )


def _command(results: Results) -> str:
    """The settings of the run, as a command."""
    told = {
        "--models": "models",
        "--systems": "systems",
        "--figures": "measures",
        "--workers": "workers",
        "--repeats": "repeats",
    }
    settings = results["settings"]
    given = {option: settings[name] for option, name in told.items() if name in settings}
    words = (
        f"{option} {','.join(map(str, value)) if isinstance(value, list) else value}" for option, value in given.items()
    )
    return " \\\n    ".join(["nox -s bench --", *words])


def _embedded(images: Iterable[str], ending: str) -> list[str]:
    return [f"![{Path(image).stem.replace('-', ' ')}]({image})" for image in images if image.endswith(ending)]


def _without_paths(line: str) -> str:
    return re.sub(r"(/[\w.@-]+){2,}", "…", line)
