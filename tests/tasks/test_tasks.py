"""lm-evaluation-harness on local files: its numbers, what is kept, what is refused."""

import gzip
import json
import math
import shutil
import statistics
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from lm_eval.tasks import TaskManager
from local_tasks import COLOURS, write_answering_model, write_tasks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_infoentropy.evaluate.model import load_hugging_face
from megatron_infoentropy.tasks import ask, harness
from megatron_infoentropy.tasks.ask import SUITES, TasksFailed, questions_of
from megatron_infoentropy.tasks.results import TaskResultError, load_results


def run_tasks(model, output, **words):
    return ask.run_tasks(model, output, load_hugging_face, **words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks, the model, and its answers; to `colours` with two shots."""
    folder = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    write_tasks(folder / "mine")
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"text": "Q: What is number 1? A: red green blue"}) + "\n")
    model = write_answering_model(folder / "hf", text)
    asked = ("both", "prose", "written", "blanks")
    run_tasks(model, folder, tasks=asked, task_folder=folder / "mine", device="cpu")
    run_tasks(model, folder, tasks=("colours",), shots=2, task_folder=folder / "mine", device="cpu")
    return folder


@pytest.fixture
def asked(monkeypatch):
    """Names of the questions that are really put."""
    names, ask = [], harness.Harness.ask

    def noted(self, question, samples_file):
        names.append(question.name)
        return ask(self, question, samples_file)

    monkeypatch.setattr(harness.Harness, "ask", noted)
    return names


def bits_of(model: Path, prompt: str, answer: str) -> float:
    """By transformers alone: -log2 of the probability of an answer after its prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    start, whole = (tokenizer(text).input_ids for text in (prompt, prompt + answer))
    with torch.no_grad():
        logits = network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[i - 1, whole[i]]) for i in range(len(start), len(whole))) / math.log(2)


@pytest.fixture(scope="module")
def rows(folder):
    lines = (folder / "mine" / "colours.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_accuracy_and_bits_per_byte_are_what_transformers_alone_computes(folder, rows):
    result = load_results(folder)["both"]
    prompts = [f"Q: {row['question']}\nA:" for row in rows]
    bits = [[bits_of(folder / "hf", prompt, f" {c}") for c in COLOURS] for prompt in prompts]
    right = [row["answer"] for row in rows]
    hits = [each.index(min(each)) == place for each, place in zip(bits, right, strict=True)]
    accuracy = sum(hits) / len(rows)
    assert 0 < accuracy < 1
    assert result.metrics["acc"].value == pytest.approx(accuracy)
    assert result.subtasks["colours"]["acc"].value == pytest.approx(accuracy)
    spread = math.sqrt(accuracy * (1 - accuracy) / (len(rows) - 1))
    assert result.subtasks["colours"]["acc"].stderr == pytest.approx(spread)
    assert result.samples == 24
    assert result.versions["lm_eval"].startswith("0.4")

    items = result.items
    assert items.tasks == {"colours": 12, "again": 12}
    assert len(set(items.ids)) == 24
    assert items.accuracy == [float(hit) for hit in hits] * 2
    answers = [each[place] for each, place in zip(bits, right, strict=True)]
    assert items.bits == pytest.approx(answers * 2, rel=1e-4)
    sizes = [len(COLOURS[place]) + 1 for place in right]  # " red": the space counts
    assert items.bytes == sizes * 2
    per_byte = [value / size for value, size in zip(answers, sizes, strict=True)]
    metric = result.subtasks["again"]["answer_bits_per_byte"]
    assert metric.value == pytest.approx(statistics.mean(per_byte), rel=1e-4)
    assert metric.stderr == pytest.approx(statistics.stdev(per_byte) / math.sqrt(12), rel=1e-3)
    assert result.metrics["answer_bits_per_byte"].value == pytest.approx(metric.value)

    with gzip.open(folder / "tasks" / "both.samples.jsonl.gz", "rt") as file:
        samples = [json.loads(line) for line in file]
    assert [(s["task"], s["right_choice"]) for s in samples[:12]] == [
        ("colours", place) for place in right
    ]
    assert samples[3]["choice_bits"] == pytest.approx(bits[3], rel=1e-4)
    assert samples[3]["doc"]["question"] == rows[3]["question"]
    assert samples[3]["arguments"][0] == [prompts[3], " red"]


def test_answers_that_the_model_writes_or_that_stand_in_the_prompt_have_bits_too(folder, rows):
    results, model = load_results(folder), folder / "hf"
    written, blanks = results["written"].items, results["blanks"].items
    prompt = f"Q: {rows[4]['question']}\nA:"
    assert written.bits[4] == pytest.approx(bits_of(model, prompt, " gr\u00fcn"), rel=1e-4)
    assert written.bytes == [6] * 12, "of UTF-8, and of the first right answer"
    assert written.accuracy == [0.0] * 12
    assert results["written"].metrics["answer_bits_per_byte"].value > 0
    prompt = ("Red", "Green", "Blue")[rows[4]["answer"]]
    answer = f" {rows[4]['question']}"
    assert blanks.bits[4] == pytest.approx(bits_of(model, prompt, answer), rel=1e-4)
    assert blanks.bytes[4] == len(answer)


def test_running_text_has_all_bits_over_all_bytes(folder):
    prose = load_results(folder)["prose"]
    mean = sum(prose.items.bits) / sum(prose.items.bytes)
    assert prose.items.pooled
    assert prose.metrics["bits_per_byte"].value == pytest.approx(mean, rel=1e-6)
    assert "answer_bits_per_byte" not in prose.metrics


def test_every_question_has_a_file_that_says_how_it_was_asked(folder):
    results = load_results(folder)
    assert list(results) == ["blanks", "both", "colours-2shot", "prose", "written"]
    assert [result.shots for result in results.values()] == [None, None, 2, None, None]


def test_what_is_answered_is_not_asked_again_and_a_torn_file_is(folder, tmp_path, asked):
    shutil.copytree(folder / "tasks", tmp_path / "tasks")
    words = {"task_folder": folder / "mine", "device": "cpu"}
    run_tasks(folder / "hf", tmp_path, tasks=("both", "prose"), **words)
    assert asked == []
    (tmp_path / "tasks" / "prose.json").write_text('{"format": 2, "tas')
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
    with pytest.raises(ValueError, match="3 shots are for tasks that are named one by one"):
        run_tasks(folder / "hf", tmp_path, suites=("commonsense",), shots=3)
    with pytest.raises(ValueError, match="nothing to ask"):
        run_tasks(folder / "hf", tmp_path)
    with pytest.raises(ValueError, match="no Hugging Face model folder"):
        run_tasks(tmp_path, tmp_path, tasks=("boolq",))
    words = {"tasks": ("colour",), "task_folder": folder / "mine", "device": "cpu"}
    monkeypatch.setattr(harness, "TaskManager", without_lm_evals_own)
    with pytest.raises(ValueError, match=r"no task 'colour'; do you mean colours\?"):
        run_tasks(folder / "hf", tmp_path, **words)


def test_a_model_that_lacks_weights_is_refused_before_it_is_asked(folder, tmp_path):
    model, lost = tmp_path / "hf", "model.layers.0.mlp.down_proj.weight"
    shutil.copytree(folder / "hf", model)
    weights = load_file(model / "model.safetensors")
    del weights[lost]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{model} lack 1 tensors of the model .*, first {lost}"):
        run_tasks(model, tmp_path, tasks=("prose",), task_folder=folder / "mine", device="cpu")
    assert load_results(tmp_path) == {}


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
