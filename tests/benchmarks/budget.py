"""What do names and versions cost? The figures and goals are one section of the page, which can be written alone."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from benchmarks import models, names, registry, runner
from benchmarks.figures import Summary
from benchmarks.trial import Trial
from zerocopy._tables import as_text

TITLE = "Names and versions"
# More than the peers take. Ray soon ends idle workers beyond this number, and each publication would start new ones.
WORKERS = 8
WHAT = """\
This section is about weights that have a name. `nox -s bench -- --names` measures them, and writes this section alone. The \
model is {title} ({megabytes:.0f} MB). All its storages have different contents. The figures are medians of {repeats} fresh \
processes, with the lowest and the highest value in parentheses. {cores} cores ({processor}), {versions}.

- **Peaks** are the maxima while a model is published with `adopt=True`. For driver and raylet, it is their PSS, minus their PSS
  before the model was created. The model is included.
- **A version** changes {changed:.0%} of the bytes of the previous one, or a little less, because whole storages change.
- **An update** is the time from the request of the commit until `current()` is the new version in the last of four processes.
- **Resolves** come from three processes, with up to a hundred calls in flight in each. The clients take most of the machine's
  time. So the rate of one core is calculated from the registry's own processor time.
- **Rollouts** are versions that are published and rolled back while actors, tasks, a stream, Ray Data and Serve receive calls
  without a pause."""


@attrs.frozen
class Row:
    """A figure and its goal.

    Attributes:
        what: describes the figure in the table.
        key: the name of the figure in the results.
        goal: in words; empty if there is none.
        digits: the number of digits after the decimal point; None for yes or no.
    """

    what: str
    key: str
    goal: str = ""
    digits: int | None = 2


ROWS = [
    Row(
        "peak of the store while publishing, divided by the weights",
        "published_store",
        "≤ 1.25 (1.0 and four shards)",
    ),
    Row("peak of the process' private memory, divided by the weights", "published_private"),
    Row("peak of the memory of driver and raylet, divided by the weights", "published_together"),
    Row("time to publish with a name, divided by the time without a name", "published_seconds"),
    Row("bytes that a second version writes, divided by the weights", "written", "≤ 0.07", 3),
    Row("the same, for the random choice of changes that writes most", "written_most", "≤ 0.07", 3),
    Row("store after {versions} versions that change the same storages, divided by the weights", "many_same", "≤ 1.6"),
    Row("store after {versions} versions that change random storages, divided by the weights", "many_random", "≤ 1.6"),
    Row("`lookup(name).load()` minus `publication.load()`, ms", "lookup", "≤ 2", 1),
    Row("for comparison: an empty call of an actor, ms", "empty_call", digits=1),
    Row("commit to `current()` in all processes, slowest version, s", "update", "≤ 1"),
    Row("the same, median version, s", "update_median"),
    Row("resolves per second of the registry's processor time", "resolves_of_a_core", "≥ 1,000", 0),
    Row("resolves per second, with the clients on the same machine", "resolves", digits=0),
    Row("polls held and woken", "held", "{polls}", 0),
    Row("one resolve during these polls, ms", "resolve_meanwhile", digits=1),
    Row("commit until all polls are woken, s", "woken"),
    Row("calls while versions are rolled out", "rollout_calls", digits=0),
    Row("failed calls", "rollout_failed", "0", 0),
    Row("calls answered by a mixture of two versions", "rollout_mixed", "0", 0),
    Row("every caller got the last version", "rollout_last", "yes", None),
]


def take(model: str, repeats: int, effort: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure all figures, each trial in a new process. Rollouts are measured once, and only with full effort.

    Raises:
        runner.TrialError: a trial has failed.
    """
    size = sum(storage.nbytes() for storage in models.storages(models.find(model).build()))
    trials: list[dict[str, float]] = []
    for repeat in range(repeats):
        if effort == 1:
            trials.append(_rollout())
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
    """Run `live_update.py`, which counts what callers get while versions are rolled out."""
    try:
        output, errors, code = runner.run_apart([str(runner.FOLDER / "live_update.py")], {})
    except subprocess.TimeoutExpired:
        raise runner.TrialError(f"live_update.py took longer than {runner.SECONDS} seconds.") from None
    if code:
        raise runner.TrialError(f"live_update.py ended with code {code}: {errors.strip().splitlines()[-1:]}")
    report, _ = json.JSONDecoder().raw_decode(output, output.index("{\n"))  # Ray may also print something
    kinds = report["kinds"].values()
    return {
        "rollout_calls": sum(kind["calls"] for kind in kinds),
        "rollout_failed": sum(kind["failed"] for kind in kinds),
        "rollout_mixed": sum(kind["mixed"] for kind in kinds),
        "rollout_last": float(report["all answer the last version"]),
    }


def section(told: dict[str, Any]) -> str:
    """The section of the page as Markdown."""
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
    """The page with the new section, in the place of the old one, or after "The machine", or at the end."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    others = [part for part in parts if not part.startswith(f"## {TITLE}\n")]
    place = next((number for number, part in enumerate(parts) if part.startswith(f"## {TITLE}\n")), len(others))
    if len(others) == len(parts):
        place = next((number + 1 for number, part in enumerate(others) if part.startswith("## The machine")), place)
    return "".join([*others[:place], f"{new}\n\n", *others[place:]]).rstrip("\n") + "\n"
