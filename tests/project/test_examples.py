"""Do the examples run and print the results that they promise?"""

import ast
import re
from pathlib import Path

import pytest
from conftest import wait_until

import zerocopy

EXAMPLES = Path(__file__).parents[2] / "examples"


def words_after(label, output):
    return re.search(rf"^\s*{label}:(.*)$", output, re.MULTILINE)[1].split()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_is_short_and_opens_with_its_question(path):
    """Each example has less than 80 lines, starts with the question that it answers, and has a test in this file."""
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert ast.get_docstring(ast.parse(text)).splitlines()[0].endswith("?")
    assert f'"{path.name}"' in Path(__file__).read_text()


@pytest.mark.long
def test_actors_answer_alike_and_stay_isolated(run_as_main):
    """A pool gives the same answers as the publisher, and a write of one worker stays in that worker."""
    output = run_as_main(EXAMPLES / "actors.py")
    answers = words_after("the pool answers", output)
    assert answers == words_after("this process says", output)
    assert len(answers) == 12
    assert output.count("ray::Worker") == 3

    spoiled, *others = words_after("in the workers", output)
    assert float(spoiled) == 0
    assert others == words_after("in this process", output) * 2
    assert float(others[0]) > 1


@pytest.mark.long
def test_ray_data_workers_read_the_weights_from_the_store(run_as_main, monkeypatch):
    """Every worker of `map_batches` reads the whole model from the object store, and all rows are right."""
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")  # like the example, but undone before the next test
    output = run_as_main(EXAMPLES / "ray_data.py")
    weights = int(re.search(r"weights: (\d+) MB", output)[1])
    workers = [list(map(int, found)) for found in re.findall(r"worker \d+: (\d+) rows, reads (\d+) MB", output)]
    assert sum(rows for rows, _ in workers) == 2000
    assert all(read >= weights - 1 for _, read in workers)
    assert "the same as in this process: True" in output


@pytest.mark.long
def test_tasks_run_elsewhere_with_the_same_results(run_as_main):
    """A plain call of a task runs in another process; `remote`, `map` and `local` of a method give the same results."""
    output = run_as_main(EXAMPLES / "tasks.py")
    score, pid, here, own_pid = re.search(r"(\S+) from process (\d+), (\S+) from this process, (\d+)", output).groups()
    assert score == here
    assert pid != own_pid

    first_map, method_map = re.findall(r"^map: +(.*)$", output, re.MULTILINE)
    assert len(first_map.split()) == 8
    assert first_map.split()[0] == score
    assert len(method_map.split()) == 6
    assert method_map.split() == words_after("remote", output) == words_after("local", output)


@pytest.mark.long
def test_fine_tunings_cost_what_differs(run_as_main):
    """The base is stored completely and each fine-tuning stores only its last layer; each gives its own answers."""
    wait_until(lambda: not any(node.objects for node in zerocopy.memory_report().nodes), 15)  # objects of other tests
    output = run_as_main(EXAMPLES / "fine_tunings.py")
    found = re.findall(r"(\S+) bytes of weights, (\S+) bytes written", output)
    sizes = [(int(weights.replace(",", "")), int(written.replace(",", ""))) for weights, written in found]
    (weights, base), *tuned = sizes
    assert base == weights
    assert [size for size, _ in tuned] == [weights] * 4
    assert all(0 < written < 0.002 * weights for _, written in tuned)
    assert "answers as in this process: True - different from each other: 4" in output
    assert words_after("first layers in the same memory", output) == ["True"]
    assert words_after("last layers in the same memory", output) == ["False"]


@pytest.mark.long
def test_several_models_are_loaded_together_or_in_part(run_as_main):
    """Tasks load the whole pipeline and an actor loads a part of it; both give the same answers as the publisher."""
    output = run_as_main(EXAMPLES / "several_models.py")
    assert words_after("tasks answer as this process", output) == ["True"]
    assert words_after("the actor finds the same", output) == ["True"]
    assert words_after("the actor has loaded", output) == ["candidates", "encoder", "index"]


@pytest.mark.long
def test_hugging_face_models_answer_as_their_libraries_load_them(run_as_main):
    """Workers give the same bits as `from_pretrained` and as sentence-transformers, from a Hugging Face folder."""
    output = run_as_main(EXAMPLES / "hugging_face.py")
    assert words_after("workers answer as from_pretrained", output) == ["True"]
    assert words_after("tasks answer as sentence-transformers", output) == ["True"]


@pytest.mark.long
def test_torchscript_workers_read_the_weights_from_the_store(run_as_main):
    """Every kind of TorchScript program gives the answers of its module, with weights only in the store."""
    output = run_as_main(EXAMPLES / "torchscript.py")
    for kind in ("scripted", "traced", "frozen"):
        assert words_after(kind, output)[-1] == "True"
    assert len(re.findall("^worker: 1.0 of 67 MB", output, re.MULTILINE)) == 2


@pytest.mark.long
def test_a_web_service_is_updated_while_it_is_asked(run_as_main):
    """Two replicas answer over HTTP with each new version in turn, and no request fails."""
    output = run_as_main(EXAMPLES / "web_service.py")
    assert words_after("requests that failed", output) == ["0"]
    found = [(float(score), int(count)) for score, count in re.findall(r"\((\S+), (\d+)\)", output)]
    assert [score for score, _ in found] == [1, 2, 3]
    assert words_after("replicas that answered", output) == ["2"]
