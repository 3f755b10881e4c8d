"""Does the benchmark refuse unknown names, measure the chosen models, and report only measured figures?"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import budget, figures, measures, models, process, report, runner, systems
from benchmarks.__main__ import main
from benchmarks.memory import Peak, resident, tree
from benchmarks.process import said
from benchmarks.trial import Trial
from conftest import run_python

from zerocopy.errors import ArgumentError

BUILD = """
import torch
from torch import nn

class Stack(nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        self.example_input_array = torch.ones(1, width)
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    def forward(self, rows):
        return self.layers(rows)

def build():
    return Stack(25, 1000)

def small():
    return Stack(4, 16)

def wrong():
    return 5

number = 5
"""
SIZE = 25 * (1000 * 1000 + 1000) * 4  # large in comparison with the other memory of the processes
TIMES = {"put", "publish", "first_load", "second_load", "forward"}
STEADY = {"steady_1", "steady_32"}  # measured with one worker only


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's own models, for commands that run in this process and draw no plots."""
    (tmp_path / "own_models.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("benchmarks.plots.draw", lambda *_: [])
    return tmp_path


def read(folder: Path) -> dict[str, Any]:
    """The results that a command wrote."""
    found: dict[str, Any] = json.loads((folder / "out/benchmarks/results.json").read_text())
    return found


def invented(trial: Trial, environment: dict[str, str]) -> dict[str, Any]:
    """Replaces `runner.take`: returns a possible result of a trial."""
    if trial.measure == "facts":
        return {"bytes": 1000, "modules": 3, "runs": True}
    if trial.measure == "memory":
        return {"samples": [{"workers": count, "figures": {"taken": 1000}} for count in trial.counts]}
    return {"samples": [{"sample": number, "figures": {"first_load": 0.5}} for number in range(trial.workers)]}


def in_this_process(trial: Trial, environment: dict[str, str]) -> dict[str, Any]:
    """Replaces `runner.take`: a real trial, but in this process."""
    return process.outcome(trial)


class InstantRay:
    """Replaces Ray: calls of actors run here at once, and objects in the store are pickles."""

    def init(self, *_: Any, **__: Any) -> None: ...

    shutdown = wait = kill = init

    def remote(self, **_: Any) -> Any:
        return lambda cls: SimpleNamespace(remote=lambda *arguments: InstantActor(cls(*arguments)))

    def put(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def get(self, value: Any) -> Any:
        return pickle.loads(value) if isinstance(value, bytes) else value


class InstantActor:
    def __init__(self, instance: Any) -> None:
        self.instance = instance

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.instance, name))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def results(**changed: Any) -> dict[str, Any]:
    """Results of two repeats of zerocopy, and of a peer that failed."""
    told = {"model": "mlp", "system": "zerocopy", "measure": "times", "workers": 1}
    words = "TypeError: Got unsupported ScalarType BFloat16 in /home/somebody/peer/extract.py"
    return {
        "machine": {"cores": 2, "processor": "one", "memory": 8e9, "system": "Linux", "versions": {"torch": "2.0"}},
        "settings": {"models": ["mlp"], "measures": ["times"], "repeats": 2},
        "models": {"mlp": {"title": "MLP", "bytes": 1000, "modules": 3}},
        "systems": {"zerocopy": "zerocopy", "ray-zerocopy": "ray-zerocopy 0.2.0"},
        "trials": [
            {**told, "repeat": 0, "figures": {"publish": 0.5, "put": 0.25, "first_load": 0.002}},
            {**told, "repeat": 1, "figures": {"publish": 0.5, "put": 0.5, "first_load": 0.004}},
            {**told, "repeat": 0, "system": "ray-zerocopy", "failure": words},
        ],
        **changed,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "bert,brett"], "There is no model 'brett'. Hint: choose from bert, llama80"),
        (["--systems", "magic"], "There is no system 'magic'. Hint: choose from zerocopy, adoption"),
        (["--figures", "speed"], "There are no figures 'speed'. Hint: choose from memory"),
        (["--workers", "0"], "'0' is not a number above zero"),
        (["build"], "There is no model 'build'"),
    ],
)
def test_unknown_names_are_refused(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown name ends the command with a message and status 2 before anything starts."""
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_models:nothing", "There is no function 'own_models:nothing'"),
        ("nowhere:build", "There is no function 'nowhere:build'"),
        ("own_models:number", "'own_models:number' is int, not a function"),
        ("own_models:wrong", "'own_models:wrong' returned int, not an nn.Module"),
    ],
)
def test_functions_that_give_no_module_are_refused(name: str, words: str, folder: Path) -> None:
    """The error says what is missing."""
    with pytest.raises(ArgumentError, match=words):
        measures.facts(name)


def test_a_model_that_cannot_be_made_ends_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command prints the error of the model and ends with status 2."""
    monkeypatch.setattr(runner, "take", in_this_process)
    assert "'own_models:wrong' returned int, not an nn.Module" in refused(capsys, "own_models:wrong")


@pytest.mark.long
@pytest.mark.alone  # next to other tests Ray may need more than its limit of 30 s to start a node
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is asked of Linux")
def test_a_model_of_ones_own_is_measured(tmp_path: Path) -> None:
    """A real run of the command, in fresh processes, writes figures, tables and a page."""
    # The measured process tree has workers that share one model and do not see each other's writes.
    (tmp_path / "own_models.py").write_text(BUILD)
    chosen = ["--systems", "zerocopy", "--figures", "memory,times", "--workers", "1,2", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "own_models:build", "--output", "out", *chosen],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = read(tmp_path)
    assert report.failures(told, "own_models:build") == []
    assert told["models"]["own_models:build"]["bytes"] == SIZE
    one, two, *samples = told["trials"]
    assert (one["workers"], two["workers"]) == (1, 2)
    assert two["figures"]["seen"] is False
    assert 0.9 < two["figures"]["peak"] / SIZE < 2.5
    assert 1.7 < one["figures"]["taken"] / SIZE < two["figures"]["taken"] / SIZE + 0.1 < 2.5
    assert 0 < two["figures"]["load"] < 60
    taken = {(trial["system"], trial["measure"], trial["repeat"]): trial["figures"] for trial in samples}
    assert set(taken) == {("zerocopy", "times", sample) for sample in range(3)}
    for (*_, sample), seconds in taken.items():
        assert seconds.keys() == (TIMES | STEADY if sample == 0 else TIMES)
        assert all(0 < value < 60 for value in seconds.values())
    assert "first load, ms" in " ".join(done.stdout.split())
    page = (tmp_path / "out/benchmarks.md").read_text()
    assert "second load, ms" in page
    assert "Memory over" in page
    assert "no-op call" not in page
    assert str(tmp_path) not in page


@pytest.mark.long
@pytest.mark.alone
def test_names_and_versions_are_measured(tmp_path: Path) -> None:
    """A quick run writes only its own section of the page, and the measured sizes meet their goals."""
    (tmp_path / "out").mkdir()
    before, after = "# Benchmarks\n\n## The machine\n\nOne.\n\n", "## BERT\n\nTwo.\n"
    page = tmp_path / "out/benchmarks.md"
    page.write_text(f"{before}## {budget.TITLE}\n\nOld.\n\n{after}")
    report.save(results(), tmp_path / "out/benchmarks")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--names", "--quick", "--output", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = read(tmp_path)
    (figures,) = told.pop("names")["trials"]
    assert told == results()
    assert 0.95 <= figures["published_store"] <= 1.25
    assert 0.95 < figures["published_private"] < 1.25
    assert 0.03 < figures["written"] <= figures["written_most"] <= 0.07
    assert 1.03 < figures["many_same"] <= figures["many_random"] <= 1.6
    assert 0 < figures["update_median"] <= figures["update"] < 10
    assert figures["held"] == 300
    assert figures["resolves"] > 50
    text = page.read_text()
    assert text.startswith(f"{before}## {budget.TITLE}\n\nThis section")
    assert text.endswith(f" |\n\n{after}")
    assert text.count("Old.") == 0


def test_the_section_of_names_tells_goals() -> None:
    """Each row has a median, its spread and a goal, unmeasured figures have no row, and the section is above the models."""
    settings = {"model": "stack", "bytes": 5e7, "repeats": 2, "effort": 1}
    trials = [{"written": 0.05, "held": 3000}, {"written": 0.06, "held": 3000}, {"rollout_last": 1.0}]
    told = {"machine": results()["machine"], "settings": settings, "trials": trials}
    page = report.page(results(names=told))
    assert "| bytes that a second version writes, divided by the weights | 0.055 (0.050 to 0.060) | ≤ 0.07 |" in page
    assert "| polls held and woken | 3,000 | 3,000 |" in page
    assert "| every caller got the last version | yes | yes |" in page
    assert "resolves per second" not in page
    assert page.index("## The machine") < page.index(f"## {budget.TITLE}") < page.index("## MLP")
    assert budget.put_into(page, budget.section(told)) == page
    assert budget.put_into(report.page(results()), budget.section(told)) == page
    assert "0.055 (0.050 to 0.060)" in report.terminal(results(names=told))


def test_the_page_tells_only_what_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that measures only times has no tables of memory or calls."""
    monkeypatch.setattr(runner, "take", in_this_process)
    for module in (process, measures, systems):
        monkeypatch.setattr(module, "ray", InstantRay())
    monkeypatch.setattr(measures, "wait_until_empty", lambda: None)
    chosen = ["--systems", "plain,ray-tensors", "--repeats", "1", "--figures", "times"]
    assert main(["own_models:small", "--output", "out", *chosen]) == 0
    told = read(folder)
    taken = {(trial["system"], trial["measure"], trial["repeat"]): trial["figures"] for trial in told["trials"]}
    assert set(taken) == {(system, "times", sample) for system in ("plain", "ray-tensors") for sample in range(3)}
    for (*_, sample), seconds in taken.items():
        assert seconds.keys() == (TIMES | STEADY if sample == 0 else TIMES)
        assert all(0 < value < 60 for value in seconds.values())
    assert told["models"]["own_models:small"]["bytes"] == 4 * (16 * 16 + 16) * 4
    assert "first load, ms" in " ".join(capsys.readouterr().out.split())
    page = (folder / "out/benchmarks.md").read_text()
    assert "second load, ms" in page
    assert "no-op call" not in page
    assert "Memory over" not in page
    assert str(folder) not in page


def test_an_interrupted_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--resume` runs only the missing trials, also for additional figures; other systems are refused."""
    monkeypatch.setattr(runner, "take", invented)
    chosen = ["own_models:build", "--output", "out", "--systems", "zerocopy", "--repeats", "1", "--workers", "1"]
    both, path = ["--figures", "memory,times"], folder / "out/benchmarks/results.json"
    assert "There are no results in 'out/benchmarks/results.json'" in refused(capsys, *chosen, *both, "--resume")
    assert main([*chosen, *both]) == 0
    told = read(folder)
    memory = [trial for trial in told["trials"] if trial["measure"] == "memory"]
    path.write_text(json.dumps({**told, "trials": memory}))
    words = refused(capsys, *chosen, *both, "--systems", "zerocopy,plain", "--resume")
    assert "The earlier run had other systems." in words
    assert main([*chosen, "--figures", "times", "--resume"]) == 0
    errors = capsys.readouterr().err
    assert [line[:5] for line in errors.splitlines() if line.startswith("[")] == ["[2/2]"]
    trials = read(folder)["trials"]
    assert trials[:1] == memory
    assert [trial["measure"] for trial in trials] == ["memory", "times", "times", "times"]
    more = ["--models", "own_models:small", "--figures", "times", "--repeats", "2", "--resume"]
    assert main([*chosen, *more]) == 0
    told = read(folder)
    assert told["trials"][:4] == trials
    found = {(one["model"], one["measure"], one["repeat"] // runner.SAMPLES) for one in told["trials"]}
    wanted = [("own_models:build", "own_models:small"), ("memory", "times"), (0, 1)]
    assert found == set(itertools.product(*wanted))


def test_a_comparison_is_of_one_sitting() -> None:
    """If a run is interrupted between two systems, this repeat is measured again for both systems."""
    choice = runner.Choice(["mlp"], ["zerocopy", "plain"], ["memory", "times"], repeats=2, workers=[4])
    planned = list(runner._plan(choice, {"mlp": {"bytes": 1000, "runs": True}}))
    told = [trial for which, repeat in planned for trial in runner._entries(which, repeat, {"figures": {}})]
    assert runner._finished(planned, told) == told
    assert runner._finished(planned, told[:7]) == told[:6]
    assert runner._finished(planned, told[:1]) == []


def test_names_lead_to_models() -> None:
    """Known names, depths and a module's function are found; others are refused."""
    assert models.find("llama12").title == "12-layer Llama"
    assert {models.find(name).name for name in models.names()} == set(models.names())
    with pytest.raises(ArgumentError, match="There is no model 'llama0'"):
        models.find("llama0")
    with pytest.raises(ArgumentError, match="There is no system"):
        systems.find("none")


def test_medians_and_their_spread() -> None:
    """Figures are taken from each repeat, and ratios are computed within one repeat."""
    told = results()
    assert figures.summary(told, "mlp", "zerocopy", figures.PUBLISH_RATIO) == figures.Summary(1.5, 1, 2)
    assert figures.Summary(1.5, 1, 2).text("x") == "1.50 (1.00 to 2.00)"
    assert figures.summary(told, "mlp", "zerocopy", figures.LOAD_RATIO) == figures.Summary(1, 1, 1)
    assert figures.summary(told, "mlp", "zerocopy", figures.FORWARD) is None
    assert figures.summary(told, "mlp", "ray-zerocopy", figures.PUBLISH) is None


def test_growth_is_taken_inside_a_repeat() -> None:
    """Growth is the memory with the most workers minus the memory with the fewest, within one repeat."""
    base = {"model": "mlp", "system": "zerocopy", "measure": "memory", "repeat": 0}
    taken = [{**base, "workers": count, "figures": {"taken": 1000 * count}} for count in (1, 4)]
    told = results(trials=taken)
    columns = {figure.title: figure for figure in figures.tables(told)["Memory over the model's bytes"]}
    assert figures.summary(told, "mlp", "zerocopy", columns["growth from 1 to 4"]) == figures.Summary(3, 3, 3)


def test_the_page_shows_a_failure_as_what_it_said() -> None:
    """The page shows a peer's own error message without folders, and no columns for figures that no trial measured."""
    page = report.page(results(), ["benchmarks/bars-mlp.png", "benchmarks/bars-other.png"])
    assert "- ray-zerocopy 0.2.0 (times): TypeError: Got unsupported ScalarType BFloat16 in …" in page
    assert "| ray-zerocopy 0.2.0 | failed |" in page
    assert "first forward, ms" not in page
    assert "workers |" not in page
    assert "![bars mlp](benchmarks/bars-mlp.png)" in page
    assert "bars-other" not in page


def test_the_page_says_what_did_not_fit() -> None:
    """A system that did not fit with more workers is marked "too large"; a system that failed is marked "failed"."""
    base = {"model": "mlp", "measure": "memory", "repeat": 0}
    taken = [
        *({**base, "system": "zerocopy", "workers": count, "figures": {"taken": 1000}} for count in (1, 4)),
        {**base, "system": "plain", "workers": 1, "figures": {"taken": 2000}},
        {**base, "system": "own", "workers": 4, "skipped": "it does not fit"},
        {**base, "system": "file", "workers": 4, "failure": "OSError"},
    ]
    page = report.page(results(trials=taken, systems={name: name for name in ("zerocopy", "plain", "own", "file")}))
    assert "| zerocopy | 1.00 | 1.00 | 0.00 |" in page
    assert "| plain | 2.00 | too large | too large |" in page
    assert "| own | too large | too large | too large |" in page
    assert "| file | failed | failed | failed |" in page


def test_the_page_says_how_to_repeat_it() -> None:
    """The page shows a command with the options of the run, which the command line accepts."""
    from benchmarks.__main__ import _parser

    page = report.page(results())
    start = page.index("nox -s bench -- ")
    words = page[start : page.index("```", start)].replace("\\\n", " ").split()[4:]
    options = _parser().parse_args(words)
    assert (options.models, options.figures, options.repeats) == (["mlp"], ["times"], 2)


def test_the_terminal_shows_the_same() -> None:
    """The terminal shows the same tables and failures as the page."""
    text = report.terminal(results())
    assert "MLP: 1.0 kB, 3 modules" in text
    assert "3 (2 to 4)" in text
    assert "Got unsupported ScalarType" in text


def test_plots_are_drawn(tmp_path: Path) -> None:
    """Only measured figures are drawn, as PNG files."""
    from benchmarks import plots

    assert plots.draw(results(), tmp_path) == [tmp_path / "bars-mlp.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"bars-mlp.png"}


def test_results_are_kept_a_trial_on_each_line(tmp_path: Path) -> None:
    """Saved results are equal after reading."""
    path = report.save(results(), tmp_path)
    assert report.load(path) == results()
    trials = [line.strip().rstrip(",") for line in path.read_text().splitlines() if '"repeat":' in line]
    assert list(map(json.loads, trials)) == results()["trials"]


def test_results_of_no_trial_are_kept(tmp_path: Path) -> None:
    """Results without trials can also be saved and read."""
    nothing = results(trials=[], models={})
    assert report.load(report.save(nothing, tmp_path)) == nothing


def test_errors_are_told_in_one_line() -> None:
    """The line has the class and first line of the error, or of its cause if Ray wrapped the error."""
    error = RuntimeError("carried")
    error.cause = ValueError("first\nsecond")  # type: ignore[attr-defined]
    assert said(error) == "ValueError: first"
    assert said(KeyError()) == "KeyError"


def test_the_peak_is_seen_from_outside() -> None:
    """The peak of a process is measured from outside, also if the process has freed the memory again."""
    before = resident([os.getpid()])
    with Peak([os.getpid()]) as peak:
        taken = bytearray(os.urandom(1) * 50_000_000)
        held = resident(tree(os.getpid()))
        del taken
    assert held > before + 45_000_000
    assert peak.bytes > before + 45_000_000


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_facts_count_shared_memory_once() -> None:
    """The bytes of a model are the bytes of its storages, each counted once."""
    told = measures.facts("script")
    assert told == {"bytes": 4 * (4096 * 4096 + 4096) * 4, "modules": 6, "runs": True}


def test_importing_is_light() -> None:
    """`import zerocopy` does not import the benchmark, and the benchmark does not import the systems that it compares."""
    done = run_python(
        "import sys, zerocopy\n"
        "assert not any(name.startswith('benchmarks') for name in sys.modules)\n"
        "import benchmarks.__main__, benchmarks.measures\n"
        "assert not {'transformers', 'safetensors', 'matplotlib', 'ray.data'} & set(sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr
