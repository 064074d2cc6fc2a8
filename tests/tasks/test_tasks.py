"""lm-evaluation-harness on local files: its numbers, what is kept, what is refused."""

import json
import math
import shutil
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from lm_eval.tasks import TaskManager
from local_tasks import COLOURS, write_answering_model, write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_infoentropy.tasks import harness
from megatron_infoentropy.tasks.ask import SUITES, TasksFailed, questions_of, run_tasks
from megatron_infoentropy.tasks.results import TaskResultError, load_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, the model, and all answers to `both`, `prose`, and `colours` with two shots."""
    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    write_tasks(folder / "mine")
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"text": "Q: What is number 1? A: red green blue"}) + "\n")
    model = write_answering_model(folder / "hf", text)
    run_tasks(model, folder, tasks=("both", "prose"), task_folder=folder / "mine", device="cpu")
    run_tasks(model, folder, tasks=("colours",), shots=2, task_folder=folder / "mine", device="cpu")
    return folder


@pytest.fixture
def asked(monkeypatch):
    """Names of the questions that are really put."""
    names, ask = [], harness.Harness.ask

    def noted(self, question):
        names.append(question.name)
        return ask(self, question)

    monkeypatch.setattr(harness.Harness, "ask", noted)
    return names


def expected_accuracy(model: Path, rows: list[dict]) -> float:
    """By transformers alone: the colour whose tokens are likeliest after the question."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    right = 0
    for row in rows:
        scores = []
        for colour in COLOURS:
            prompt = tokenizer(f"Q: {row['question']}\nA:").input_ids
            whole = tokenizer(f"Q: {row['question']}\nA: {colour}").input_ids
            with torch.no_grad():
                logits = network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            places = range(len(prompt), len(whole))
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in places))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


def test_accuracy_is_what_transformers_alone_computes(folder):
    rows = [
        json.loads(line)
        for line in (folder / "mine" / "colours.jsonl").read_text().split("\n")
        if line
    ]
    result = load_results(folder)["both"]
    accuracy = expected_accuracy(folder / "hf", rows)
    assert 0 < accuracy < 1
    assert result.metrics["acc"].value == pytest.approx(accuracy)
    assert result.subtasks["colours"]["acc"].value == pytest.approx(accuracy)
    spread = math.sqrt(accuracy * (1 - accuracy) / (len(rows) - 1))
    assert result.subtasks["colours"]["acc"].stderr == pytest.approx(spread)
    assert result.samples == 24
    assert result.versions["lm_eval"].startswith("0.4")


def test_every_question_has_a_file_that_says_how_it_was_asked(folder):
    results = load_results(folder)
    assert list(results) == ["both", "colours-2shot", "prose"]
    assert [result.shots for result in results.values()] == [None, 2, None]
    assert results["prose"].metrics["bits_per_byte"].value > 0


def test_what_is_answered_is_not_asked_again_and_a_torn_file_is(folder, tmp_path, asked):
    shutil.copytree(folder / "tasks", tmp_path / "tasks")
    words = {"task_folder": folder / "mine", "device": "cpu"}
    run_tasks(folder / "hf", tmp_path, tasks=("both", "prose"), **words)
    assert asked == []
    (tmp_path / "tasks" / "prose.json").write_text('{"format": 1, "tas')
    run_tasks(folder / "hf", tmp_path, tasks=("both", "prose"), **words)
    assert asked == ["prose"]
    run_tasks(folder / "hf", tmp_path, tasks=("prose",), limit=2, **words)
    assert asked == ["prose", "prose"]
    assert load_results(tmp_path)["prose"].limit == 2


def test_a_task_without_data_is_named_and_the_others_are_kept(folder, tmp_path):
    with pytest.raises(TasksFailed, match=r"1 of 2 tasks failed: .*'gone' cannot be had") as raised:
        run_tasks(folder / "hf", tmp_path, tasks=("gone", "prose"), task_folder=folder / "mine",
                  device="cpu")  # fmt: skip
    assert "--task-folder" in str(raised.value)
    assert list(load_results(tmp_path)) == ["prose"]


def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no suite common; there are commonsense"):
        run_tasks(folder / "hf", tmp_path, suites=("common",))
    with pytest.raises(ValueError, match="nothing to ask"):
        run_tasks(folder / "hf", tmp_path)
    with pytest.raises(ValueError, match="no Hugging Face model folder"):
        run_tasks(tmp_path, tmp_path, tasks=("boolq",))
    words = {"tasks": ("colour",), "task_folder": folder / "mine", "device": "cpu"}
    monkeypatch.setattr(harness, "TaskManager", without_lm_evals_own)
    with pytest.raises(ValueError, match=r"no task 'colour'; do you mean colours\?"):
        run_tasks(folder / "hf", tmp_path, **words)


def without_lm_evals_own(**options):
    return TaskManager(**options | {"include_defaults": False})


def test_every_task_of_every_suite_is_known_to_the_harness():
    shipped = Path(lm_eval.tasks.__file__).parent
    folders = ["super_glue", "piqa", "siqa", "hellaswag", "winogrande", "arc", "openbookqa",
               "nq_open", "triviaqa", "webqs", "mmlu"]  # fmt: skip
    known = TaskManager(
        include_path=[shipped / folder for folder in folders], include_defaults=False
    ).all_tasks
    questions = questions_of(tuple(SUITES), (), None)
    assert [question.task for question in questions if question.task not in known] == []
    assert len({question.name for question in questions}) == len(questions)


def test_a_damaged_result_is_named_when_it_is_read(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "x.json").write_text("{}")
    with pytest.raises(TaskResultError, match="no readable task result"):
        load_results(tmp_path)
