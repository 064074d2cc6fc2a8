"""What data and a run's own steps make of leftovers, and what they depend on."""

import json
from dataclasses import replace

import pytest
from small_study import TEXT, write_study

from megatron_infoentropy.evaluate import perplexity
from megatron_infoentropy.evaluate.evaluation import UnfinishedEvaluationError
from megatron_infoentropy.evaluate.scoring import ChunkJournal
from megatron_infoentropy.study import ledger, steps
from megatron_infoentropy.study.ledger import Step, read_progress, run_steps
from megatron_infoentropy.study.plan import Tasks
from megatron_infoentropy.study.runner import DATA, start_worker
from megatron_infoentropy.study.steps import find_digest, places, prepare


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluate tmp_path with a given plan; returns how often that was tried."""
    study = write_study(tmp_path)

    def run(plan: str) -> list[bool]:
        tried = []

        def evaluate_model(model, data, how, *, output, restart=False, **options):
            tried.append(restart)
            journal = ChunkJournal(output)
            journal.start({"scoring": plan}, restart=restart)
            for part in range(2):
                if journal.has(part):
                    journal.read(part, 1)

        monkeypatch.setattr(perplexity, "evaluate_model", evaluate_model)
        steps._evaluate(study, places(study, tmp_path), tmp_path)
        return tried

    return run


def test_a_part_starts_beside_a_user_s_files(tmp_path, monkeypatch):
    (tmp_path / "tokenize.py").write_text("raise SystemExit('a script of the user')")
    monkeypatch.chdir(tmp_path)
    worker = start_worker(write_study(tmp_path), tmp_path / "out", DATA, slot=0, jobs=1)
    said = worker.communicate()[0]
    assert worker.returncode == 0, said


def test_leftovers_of_another_evaluation_are_discarded(evaluate, tmp_path):
    assert evaluate("one") == [False]
    assert evaluate("one") == [False]
    assert evaluate("another") == [False, True]
    plan = json.loads((tmp_path / "evaluation.unfinished" / "plan.json").read_text())
    assert plan == {"scoring": "another"}


def test_a_damaged_part_does_not_discard_the_others(evaluate, tmp_path):
    evaluate("one")
    parts = tmp_path / "evaluation.unfinished"
    (parts / "scores_000000.npz").write_bytes(b"damaged")
    (parts / "scores_000001.npz").write_bytes(b"not looked at")
    with pytest.raises(UnfinishedEvaluationError, match="part 0"):
        evaluate("one")
    assert sorted(path.name for path in parts.iterdir()) == ["plan.json", "scores_000001.npz"]


def test_an_edited_task_is_asked_again(tmp_path, monkeypatch):
    folder, output = tmp_path / "tasks", tmp_path / "out"
    folder.mkdir()
    (folder / "task.yaml").write_text("task: one")
    study = replace(write_study(tmp_path), tasks=Tasks(names=("one",), folder=folder))
    one = study.members[0]

    def ask() -> Step:
        (step,) = [s for s in steps.member_steps(study, one, output) if s.name == "tasks"]
        return replace(step, do=lambda: (output / one.name / "tasks").mkdir())

    run_steps(output / one.name, [ask()], "")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "code.pyc").write_bytes(b"compiled by asking")
    assert read_progress(output / one.name, [ask()], "").done == ("tasks",)
    (folder / "task.yaml").write_text("task: two")
    assert read_progress(output / one.name, [ask()], "").done == ()


def test_text_is_read_once_and_makes_other_data_after_it_changed(tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{split}.jsonl").write_text(split)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")

    def tokens(text, split, tokenizer, output):
        output.mkdir(parents=True, exist_ok=True)
        (output / "manifest.json").write_text((text / f"{split}.jsonl").read_text())

    monkeypatch.setattr(steps, "_tokens", tokens)
    given = TEXT.replace("tokens: tokens", "text: text")
    study, output = write_study(tmp_path, given), tmp_path / "out"
    first = prepare(study, output)
    with monkeypatch.context() as patch:
        patch.setattr(ledger.hashlib, "file_digest", None)  # no file is read again
        assert prepare(study, output) == find_digest(study, output) == first
    (tmp_path / "text" / "train.jsonl").write_text("more")
    assert find_digest(study, output) is None
    assert prepare(study, output) != first


@pytest.mark.parametrize("name", ["tokens/train/manifest.json", "tokenizer/tokenizer_config.json"])
def test_datasets_that_are_there_are_known_together_with_their_tokenizer(tmp_path, name):
    study, output = write_study(tmp_path), tmp_path / "out"
    (tmp_path / "tokenizer").mkdir()
    first = find_digest(study, output)
    assert prepare(study, output) == find_digest(study, output) == first
    (tmp_path / name).write_text('{"chat_template": ""}')
    assert find_digest(study, output) not in (first, None)
    assert not output.exists()
