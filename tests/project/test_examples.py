"""Do the examples run, and show what they promise?"""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[2] / "examples"


def words_after(label, output):
    return re.search(rf"^\s*{label}:(.*)$", output, re.MULTILINE)[1].split()


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
