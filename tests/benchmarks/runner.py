"""Takes the trials, each in a new process, and collects their results. The systems take turns."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs

from benchmarks import memory, models, systems
from benchmarks.trial import MARK, Trial
from zerocopy.errors import ArgumentError, ZeroCopyError

MEASURES = ("memory", "times", "calls", "rows", "scale", "names")
DEPTHS = (10, 20, 40, 80)  # of the Llamas that show how load times grow with the number of modules
SAMPLES = 3  # of times in a trial, each with its own worker
SECONDS = 900  # the maximum for a trial
PROCESS_BYTES = 350_000_000  # of a worker that has imported torch and transformers; a generous estimate
FOLDER = Path(__file__).parents[1]  # trials, and the Ray workers that they start, import this package from here
PACKAGES = ("zerocopy-ray", "torch", "ray", "ray-zerocopy", "transformers", "safetensors", "numpy")


class ModelError(ZeroCopyError, ValueError):
    """A model cannot be created."""


class TrialError(ZeroCopyError, RuntimeError):
    """A trial of names and versions has failed. It uses only this package, so its failure is an error, not a result."""


@attrs.frozen
class Choice:
    """What to run.

    Attributes:
        models: names of models.
        systems: names of systems.
        measures: some of `MEASURES`.
        repeats: how often each trial is taken.
        workers: the numbers of workers to measure memory with.
        effort: a factor for the number of repetitions of short operations.
    """

    models: Sequence[str]
    systems: Sequence[str]
    measures: Sequence[str]
    repeats: int
    workers: Sequence[int]
    effort: float = 1.0


def run(
    choice: Choice,
    tell: Callable[[str], None],
    save: Callable[[dict[str, Any]], object],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Take all trials. `save` gets the results after each trial.

    Args:
        earlier: results of a run to continue, because it was interrupted, or lacks models, figures or repeats of
            `choice`. An unfinished comparison is repeated as a whole, so that no ratio mixes results of two runs.

    Raises:
        ModelError: a model cannot be created.
        ArgumentError: `earlier` has other systems, workers or effort, or comes from another machine or other versions.
    """
    here = machine()
    if earlier is not None:
        _require_comparable(earlier, choice, here)
        choice = _with_all_of(earlier, choice)
    settings, known = attrs.asdict(choice), earlier["models"] if earlier else {}
    facts = {name: known.get(name) or _facts(name, tell) for name in _all_models(choice)}
    titles = {name: systems.find(name).title for name in choice.systems}
    planned = list(_plan(choice, facts))
    taken = _finished(planned, earlier["trials"]) if earlier else []
    done = set(map(_comparison_of, taken))
    results = {"machine": here, "settings": settings, "models": facts, "systems": titles, "trials": taken}
    for number, (trial, repeat) in enumerate(planned, 1):
        if (repeat, trial.model, trial.measure) in done:
            continue
        start = time.monotonic()
        outcome = _outcome(trial, facts[trial.model]["bytes"])
        taken += _entries(trial, repeat, outcome)
        save(results)
        tell(f"[{number}/{len(planned)}] {_words(trial, outcome)}: {time.monotonic() - start:.0f} s")
    return results


def _require_comparable(earlier: dict[str, Any], choice: Choice, here: dict[str, Any]) -> None:
    settings = attrs.asdict(choice)
    differing = [name for name in ("systems", "workers", "effort") if earlier["settings"].get(name) != settings[name]]
    if earlier["machine"] != here:
        differing.append("machine or versions")
    if differing:
        raise ArgumentError(
            f"The earlier run had other {', '.join(differing)}.",
            hint="resume it with the same options, on the same kind of machine, or start a new run.",
        )


def _with_all_of(earlier: dict[str, Any], choice: Choice) -> Choice:
    """The choice, with the models, measures and repeats of the earlier run added."""
    settings = earlier["settings"]
    return attrs.evolve(
        choice,
        models=list(dict.fromkeys([*settings["models"], *choice.models])),
        measures=list(dict.fromkeys([*settings["measures"], *choice.measures])),
        repeats=max(settings["repeats"], choice.repeats),
    )


def _finished(planned: Sequence[tuple[Trial, int]], trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials of finished comparisons. In these, every system has had its turn."""
    told = {(_comparison_of(trial), trial["system"]) for trial in trials}
    wanted = [((repeat, trial.model, trial.measure), trial.system) for trial, repeat in planned]
    unfinished = {comparison for comparison, system in wanted if (comparison, system) not in told}
    return [trial for trial in trials if _comparison_of(trial) not in unfinished]


def _comparison_of(told: dict[str, Any]) -> tuple[int, str, str]:
    """The repeat, the model and the measure of a trial. All trials of a comparison have the same."""
    return told["repeat"] // SAMPLES, told["model"], told["measure"]


def machine() -> dict[str, Any]:
    """The machine and the versions of the packages. Without names of hosts or folders."""
    nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    system = {"cores": len(os.sched_getaffinity(0)), "processor": _processor(), "memory": round(nbytes, -8)}
    return {**system, "system": platform.system(), "versions": {"python": platform.python_version(), **_versions()}}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _all_models(choice: Choice) -> list[str]:
    scale = [f"llama{depth}" for depth in DEPTHS] if "scale" in choice.measures else []
    return list(dict.fromkeys([*choice.models, *scale]))


def _facts(name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    tell(f"making {name}")
    told = take(Trial(name), {})
    if "failure" in told:
        raise ModelError(f"The model {name!r} cannot be made: {told['failure']}")
    return {"title": models.find(name).title, **told}


def _plan(choice: Choice, facts: dict[str, Any]) -> Iterator[tuple[Trial, int]]:
    """Each trial and its repeat, model by model, so that an interrupted run has completed some models.

    In each measure, the systems take turns, so that changes of the machine affect all of them.
    """
    for model, told in facts.items():
        for repeat in range(choice.repeats):
            for measure, workers in _measures(choice, model, told):
                for system in choice.systems:
                    if measure == "calls" and not systems.find(system).has_calls:
                        continue
                    counts = sorted(choice.workers) if measure == "memory" else []
                    yield (
                        Trial(model, system, measure, workers, counts, store_for(told["bytes"]), choice.effort),
                        repeat,
                    )


def _measures(choice: Choice, model: str, told: dict[str, Any]) -> Iterator[tuple[str, int]]:
    if model not in choice.models:
        yield "times", SAMPLES
        return
    if "memory" in choice.measures:
        yield "memory", max(choice.workers)
    if "times" in choice.measures or "scale" in choice.measures:
        yield "times", SAMPLES
    if "calls" in choice.measures:
        yield "calls", 2
    if "rows" in choice.measures and models.find(model).rows and told["runs"]:
        yield "rows", 2


def store_for(size: int) -> int:
    """The size of the object store for a model of `size` bytes. Some systems store the weights more than once."""
    return int(min(4.5 * size + 200e6, max(0.6 * memory.available(), 200e6)))


def _words(trial: Trial, outcome: dict[str, Any]) -> str:
    ended = next((f" {word}" for word in ("failure", "skipped") if word in outcome), "")
    return f"{trial.model}, {trial.system}, {trial.measure}, {trial.workers} workers{ended}"


def _identity(trial: Trial) -> dict[str, Any]:
    return {key: getattr(trial, key) for key in ("model", "system", "measure", "workers")}


def _entries(trial: Trial, repeat: int, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a trial: one entry for each sample, or one for a failure or a skipped trial."""
    base = {**_identity(trial), "repeat": repeat * SAMPLES}
    if "samples" not in outcome:
        return [{**base, **outcome}]
    samples = [dict(sample) for sample in outcome["samples"]]
    return [{**base, "repeat": base["repeat"] + sample.pop("sample", 0), **sample} for sample in samples]


def _outcome(trial: Trial, size: int) -> dict[str, Any]:
    system = systems.find(trial.system)
    most = _most_workers(system, size)
    fitting = attrs.evolve(trial, workers=min(trial.workers, most), counts=[n for n in trial.counts if n <= most])
    if not fitting.workers or (trial.counts and not fitting.counts):
        return {"skipped": "its copies do not fit into the free memory"}
    return take(fitting, dict(system.environment))


def _most_workers(system: systems.System, size: int) -> int:
    """How many workers fit into the free memory. With some systems, each worker has a private copy of the model."""
    free = 0.9 * memory.available() - 3 * size
    return max(0, int(free / (PROCESS_BYTES + size * system.copies)))


def take(trial: Trial, environment: dict[str, str]) -> dict[str, Any]:
    """Take a trial in its own process, and return its result."""
    try:
        told = run_apart(["-m", "benchmarks.process", json.dumps(attrs.asdict(trial))], environment)
    except subprocess.TimeoutExpired:
        return {"failure": f"took longer than {SECONDS} seconds"}
    return _told(*told)


def run_apart(arguments: Sequence[str], environment: dict[str, str]) -> tuple[str, str, int]:
    """Run Python in its own process. Returns its output, its errors and its exit status.

    If it takes longer than `SECONDS`, or this process is interrupted, its process group is killed.

    Raises:
        subprocess.TimeoutExpired: it takes longer than `SECONDS`.
    """
    path = os.pathsep.join([str(Path.cwd()), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment},
    )
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return output, errors, process.returncode


def _told(output: str, errors: str, code: int) -> dict[str, Any]:
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if lines:
        told: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
        return told
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "it printed no error")
    return {"failure": f"the process ended with code {code}: {last}"}
