"""What names and versions may cost: each figure with its goal, as a section of the page that is written by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from benchmarks import models, names, registry, runner
from benchmarks.figures import Summary
from benchmarks.trial import Trial
from zerocopy._tables import as_text

TITLE = "Names and versions"
WORKERS = (
    8  # beyond those that the peers take: Ray soon ends more, and each publication would start its store tasks' anew
)
WHAT = """\
Weights that have a name, measured by `nox -s bench -- --names`, which writes this section alone. The model is {title} \
({megabytes:.0f} MB), of which every storage has other content; medians of {repeats} fresh processes, with the lowest and the \
highest in parentheses. {cores} cores ({processor}), {versions}.

- **Peaks** are the most that is seen while a model is published with `adopt=True`. Memory of driver and raylet is their PSS above
  what they took before the model was made; the model counts.
- **A version** changes {changed:.0%} of the bytes of the one before, or a little less, since whole storages change.
- **An update** lasts from the commit, when it is asked for, until `current()` is the new version in the last of four processes.
- **Resolves** are of three processes with a hundred calls of each under way. The clients take most of the machine's time; so
  what one core does is told by the registry's own processor time.
- **Rollouts** are of versions published, and rolled back, while actors, tasks, a stream, Ray Data and Serve are asked without
  pause."""


@attrs.frozen
class Row:
    """A figure and its goal.

    Attributes:
        what: is measured.
        key: of the figure.
        goal: in words; empty if there is none.
        digits: after the point; None for yes or no.
    """

    what: str
    key: str
    goal: str = ""
    digits: int | None = 2


ROWS = [
    Row(
        "store bytes at their peak while publishing, over the weights",
        "published_store",
        "≤ 1.25 (1.0 and four shards)",
    ),
    Row("private memory of the process at its peak, over the weights", "published_private"),
    Row("memory of driver and raylet at its peak, over the weights", "published_together"),
    Row("seconds to publish under a name, over those without one", "published_seconds"),
    Row("bytes that a second version writes, over the weights", "written", "≤ 0.07", 3),
    Row("the same, of the draw that writes most", "written_most", "≤ 0.07", 3),
    Row("store after {versions} versions that change the same storages, over the weights", "many_same", "≤ 1.6"),
    Row("store after {versions} versions that change any storages, over the weights", "many_random", "≤ 1.6"),
    Row("`lookup(name).load()` over `publication.load()`, ms more", "lookup", "≤ 2", 1),
    Row("beside it: an empty call of an actor, ms", "empty_call", digits=1),
    Row("commit to `current()` in all processes, of the slowest version, s", "update", "≤ 1"),
    Row("the same, of the median version, s", "update_median"),
    Row("resolves in a second of the registry's processor time", "resolves_of_a_core", "≥ 1,000", 0),
    Row("resolves in a second, beside the clients on this machine", "resolves", digits=0),
    Row("polls held and woken", "held", "{polls}", 0),
    Row("a resolve meanwhile, ms", "resolve_meanwhile", digits=1),
    Row("commit until all polls are woken, s", "woken"),
    Row("calls while versions are rolled out", "rollout_calls", digits=0),
    Row("of these failed", "rollout_failed", "0", 0),
    Row("answered by a mixture of two versions", "rollout_mixed", "0", 0),
    Row("every caller got the last version", "rollout_last", "yes", None),
]


def take(model: str, repeats: int, effort: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Take all figures, each trial in a fresh process.

    Raises:
        runner.TrialError: one has failed.
    """
    size = sum(storage.nbytes() for storage in models.storages(models.find(model).build()))
    trials: list[dict[str, float]] = [_rollout()] if effort == 1 else []
    for repeat in range(repeats):
        trial = Trial(model, measure="names", workers=WORKERS, store=runner.store_for(size), effort=effort)
        trials.append(_taken(trial, repeat)["samples"][0]["figures"])
        tell(f"[{repeat + 1}/{repeats}] names")
    settings = {"model": model, "bytes": size, "repeats": repeats, "effort": effort}
    return {"machine": runner.machine(), "settings": settings, "trials": trials}


def _taken(trial: Trial, repeat: int) -> dict[str, Any]:
    told = runner.take(trial, {})
    if "failure" in told:
        raise runner.TrialError(f"Trial {repeat} of names failed: {told['failure']}")
    return told


def _rollout() -> dict[str, float]:
    """What callers see while versions are rolled out."""
    output, errors, code = runner.run_apart([str(runner.FOLDER / "live_update.py")], {})
    if code:
        raise runner.TrialError(f"live_update.py ended with code {code}: {errors.strip().splitlines()[-1:]}")
    report, _ = json.JSONDecoder().raw_decode(output, output.index("{\n"))  # Ray may print, too
    kinds = report["kinds"].values()
    return {
        "rollout_calls": sum(kind["calls"] for kind in kinds),
        "rollout_failed": sum(kind["failed"] for kind in kinds),
        "rollout_mixed": sum(kind["mixed"] for kind in kinds),
        "rollout_last": float(report["all answer the last version"]),
    }


def section(told: dict[str, Any]) -> str:
    """The section of the page, in Markdown."""
    machine, settings = told["machine"], told["settings"]
    words = WHAT.format(
        title=models.find(settings["model"]).title,
        megabytes=settings["bytes"] / 1e6,
        repeats=settings["repeats"],
        cores=machine["cores"],
        processor=machine["processor"],
        versions=", ".join(f"{package} {version}" for package, version in machine["versions"].items()),
        changed=names.CHANGED,
    )
    lines = ["| what | measured | goal |", "| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in _rows(told))]
    return "\n\n".join([f"## {TITLE}", words, "\n".join(lines)])


def terminal(told: dict[str, Any]) -> str:
    """The table, for a terminal."""
    headers = ["what", "measured", "goal"]
    return as_text(headers, list(_rows(told)), right=headers[1:], title=TITLE)


def _rows(told: dict[str, Any]) -> Iterator[list[str]]:
    effort = told["settings"]["effort"]
    counts = {
        "versions": registry.count(names.VERSIONS, effort),
        "polls": f"{registry.count(registry.POLLS, effort):,}",
    }
    for row in ROWS:
        values = [trial[row.key] for trial in told["trials"] if row.key in trial]
        if values:
            yield [row.what.format(**counts), _text(Summary.of(values), row.digits), row.goal.format(**counts)]


def _text(summary: Summary, digits: int | None) -> str:
    if digits is None:
        return summary.text("yes/no")
    middle, low, high = (f"{value:,.{digits}f}" for value in (summary.median, summary.low, summary.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def put_into(page: str, new: str) -> str:
    """A page with a section anew, where it was, or else before the first model; other sections stay as they are."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    others = [part for part in parts if not part.startswith(f"## {TITLE}\n")]
    place = next((number for number, part in enumerate(parts) if part.startswith(f"## {TITLE}\n")), len(others))
    if len(others) == len(parts):
        place = next((number + 1 for number, part in enumerate(others) if part.startswith("## The machine")), place)
    return "".join([*others[:place], f"{new}\n\n", *others[place:]]).rstrip("\n") + "\n"
