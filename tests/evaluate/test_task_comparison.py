"""Answers to tasks, compared item by item: the numbers, what is claimed, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from example_answers import write_answers
from example_runs import write_run
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.evaluate.compare import compare_folders
from megatron_infoentropy.evaluate.inference import Sums, estimate_differences
from megatron_infoentropy.evaluate.report import write_report
from megatron_infoentropy.evaluate.task_comparison import question_sums
from megatron_infoentropy.evaluate.verdict import answers
from megatron_infoentropy.tasks.results import Items, load_results

SETTINGS = (("cross_entropy", 0.0), ("focal", 0.0), ("infoentropy", -0.4))


def write_asked(folder: Path, seeds: range, settings=SETTINGS, **answers) -> list[str]:
    """Run folders that were asked tasks and not evaluated."""
    names = []
    for objective, shift in settings:
        for seed in seeds:
            run = folder / f"{objective}-{seed}"
            write_run(run, objective=objective, seed=seed, evaluated=False)
            write_answers(run, 10 * seed + len(objective), shift=shift, **answers)
            names.append(str(run))
    return names


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    """Three seeds of each of three settings, asked nine tasks."""
    tasks = [f"task_{number}" for number in range(9)]
    return write_asked(tmp_path_factory.mktemp("asked"), range(1, 4), tasks=tasks)


@pytest.fixture(scope="module")
def made(asked):
    return compare_folders(asked)


def test_an_effect_is_shown_on_tasks_and_their_mean_and_none_where_there_is_none(made):
    same, better = made
    assert [row.kind for row in better.rows] == ["tasks", *["task"] * 9, *["accuracy"] * 9]
    assert {row.tests for row in better.rows} == {2, 18}, "two settings, and of each nine tasks"
    for row in better.rows:
        assert row.reading == ("no difference shown" if row.kind == "accuracy" else "better")
        assert row.low < (0 if row.kind == "accuracy" else -0.4) < row.high
        assert row.p <= row.p_adjusted <= min(1, row.tests * row.p) + 1e-12
    assert {row.reading for row in same.rows} == {"no difference shown"}
    assert 0 < better.rows[0].detectable < 0.1
    assert (better.rows[0].documents, better.rows[1].documents) == (9, 60), "tasks, items"
    assert better.pairing == "seed"
    helped, where, sure = answers([better])
    assert "on average over 9 tasks" in helped["more"]
    assert where["short"] == "Better on 9 of 9 tasks."
    assert "of 3 seeds and 9 tasks" in sure["more"]


def test_the_difference_and_its_interval_are_those_of_the_paired_t_test_over_tasks(made, asked):
    """Seeds that differ by nothing but their number leave the spread over tasks: Student's t."""
    from scipy.stats import ttest_1samp  # here: each of the tests' processes imports every file

    values = np.array([
        [np.mean(np.divide(r.items.bits, r.items.bytes)) for r in load_results(Path(name)).values()]
        for name in asked
    ]).reshape(3, 3, 9)  # fmt: skip
    row = made[1].rows[0]
    assert row.difference == pytest.approx((values[2] - values[0]).mean())
    assert (row.group, row.baseline) == pytest.approx((values[2].mean(), values[0].mean()))
    gaps = np.random.default_rng(0).normal(0.02, 0.05, 9)
    sums = Sums(np.ones((9, 1)), np.stack([1 + gaps, np.ones(9)])[:, :, None])
    (one,) = estimate_differences(sums, [0], [1], paired=True)
    low, high = ttest_1samp(gaps, 0).confidence_interval()
    assert (one.low, one.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def items(bits: list, **changes) -> Items:
    count = len(bits)
    made = Items([str(n) for n in range(count)], {"one": count}, bits, [4] * count, [1.0] * count,
                 pooled=False)  # fmt: skip
    return replace(made, **changes)


def test_items_count_alike_running_text_by_its_bytes_and_groups_by_their_tasks():
    plain = question_sums([items([8.0, 2.0, None])])
    assert plain.nats()[0].tolist() == [(2 + 0.5) / 2, 1]
    assert plain.documents.tolist() == [2, 3], "an item without an answer has an accuracy"
    sizes = {"bytes": [2, 6], "pooled": True, "accuracy": [None, None]}
    text = question_sums([items([8.0, 2.0], **sizes)])
    assert text.nats()[0, 0] == 10 / 8
    assert text.documents.tolist() == [2, 0]
    many = {f"part {number}": 1 + number % 2 for number in range(8)}
    group = question_sums([items([4.0] * 10 + [8.0] * 2, tasks=many)])
    assert group.tokens[:, 0].tolist() == list(many.values())
    assert group.nats()[0, 0] == pytest.approx(14 / 12)


def test_where_nothing_differs_a_claim_on_any_task_is_rare():
    """The whole path from items to corrected p-values, 60 trials: 5 % would be 3."""
    generator, claims = np.random.default_rng(2), 0
    for trial in range(60):
        bits = generator.gamma(4, 1, 40) + generator.normal(0, 0.3, (6, 40))
        bits += generator.normal(0, 0.2, (6, 1))  # of a seed
        sums = question_sums([items(row.tolist()) for row in bits])
        one = estimate_differences(sums, [0, 1, 2], [3, 4, 5], paired=True, seed=trial)[0]
        claims += one.p < 0.05
    assert claims <= 8


def test_more_right_answers_are_better_and_more_bits_are_worse(tmp_path):
    write_asked(tmp_path, range(1, 4), (("cross_entropy", 0.0),), items=300)
    write_asked(tmp_path, range(1, 4), (("focal", 1.0),), items=300, gain=0.5)
    (one,) = compare_folders([str(path) for path in sorted(tmp_path.iterdir())])
    readings = {row.kind: row.reading for row in one.rows if row.kind != "tasks"}
    assert readings == {"task": "worse", "accuracy": "better"}


def test_few_tasks_have_no_interval_of_their_mean(tmp_path):
    (one,) = compare_folders(write_asked(tmp_path, range(1, 3), SETTINGS[:3:2]))
    assert (one.rows[0].documents, one.rows[0].low) == (2, None)
    assert one.rows[1].low is not None
    assert "on some of 2 tasks" in answers([one])[0]["more"], "not by their mean"


def change(folder: Path, name: str, **changes) -> None:
    path = folder / "tasks" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_compared_is_left_out_with_the_reason(tmp_path):
    names = write_asked(tmp_path, range(1, 3), SETTINGS[:3:2], tasks=("a", "b", "d", "e"))
    run = tmp_path / "infoentropy-2"
    (run / "tasks" / "a.json").unlink()
    change(run, "b", versions={"task": "2.0"})
    write_answers(run, 9, tasks=("d",), items=30)
    (one,) = compare_folders(names)
    assert [row.name for row in one.rows] == ["e", "e"]
    assert one.left_out[0] == "task a, as infoentropy-2 has not been asked it"
    assert (
        "task b, as infoentropy-1 and infoentropy-2 were asked versions 1.0 and 2.0"
        in (one.left_out[1])
    )
    assert "were not asked the same items (60 and 30, 30 of them shared" in one.left_out[2]
    write_answers(run, 9, tasks=("e",), version="2.0")
    with pytest.raises(ValueError, match=r"cannot be compared: task a, .*; task e, as .* versions"):
        compare_folders(names)


def test_one_model_asked_twice_is_not_two_seeds(tmp_path):
    names = write_asked(tmp_path, range(1, 3), SETTINGS[:2])
    write_answers(tmp_path / "focal-1", 1)
    write_answers(tmp_path / "focal-2", 1)
    with pytest.raises(ValueError, match="focal-1 and focal-2 are one model asked twice"):
        compare_folders(names)


def test_with_one_seed_nothing_is_called_shown(tmp_path):
    (one,) = compare_folders(write_asked(tmp_path, range(1, 2), SETTINGS[:3:2]))
    assert {row.reading for row in one.rows if row.kind == "task"} == {"seed noise unknown"}
    assert "No difference of any size could have been shown" in answers([one])[2]["more"]


def test_runs_that_were_evaluated_and_asked_are_compared_in_both(tmp_path):
    names = write_asked(tmp_path, range(1, 3), SETTINGS[:3:2])
    for name in names:
        objective, seed = Path(name).name.split("-")
        write_run(tmp_path / "all" / Path(name).name, objective=objective, seed=int(seed))
        (tmp_path / "all" / Path(name).name / "tasks").symlink_to(Path(name) / "tasks")
    every = [str(tmp_path / "all" / Path(name).name) for name in names]
    done = CliRunner().invoke(app, ["compare", *every])
    assert done.exit_code == 0, done.output
    assert "nats per token, paired by seed (1, 2)" in done.output
    assert "bits per byte of the right answers" in done.output
    assert "all held-out text" in done.output
    assert "2 of 2 tasks" in done.output
    bare = [tmp_path / "a", tmp_path / "b"]  # neither runs nor evaluations
    for seed, folder in enumerate(bare):
        write_answers(folder, seed)
    (one,) = compare_folders([str(folder) for folder in bare])
    assert (one.of_tasks, one.pairing) == (True, "one")


def test_the_page_of_runs_that_were_only_asked_answers_from_the_tasks(asked, tmp_path):
    page = write_report([Path(name) for name in asked], tmp_path)
    data = json.loads(page.with_suffix(".json").read_text())
    helped, where, sure = data["verdict"]["answers"]
    assert helped["short"] == "Yes, 1 of 2 did."
    assert "on average over 9 tasks: InfoEntropy" in helped["more"]
    assert where["short"] == "1 of 2 settings gain somewhere."
    assert "better on 9 of 9 tasks" in where["more"]
    assert "bits per byte, by setting, would have shown" in sure["short"]
    text = page.read_text()
    assert 'href="report.figures/differences-by-task.svg"' in text[: text.index("<h2>")]
    for row in data["task_comparisons"][1]["rows"]:
        assert f"{row['detectable']:.4f}" in text


def test_a_page_of_tasks_that_have_an_accuracy_alone_is_drawn_without_their_figure(tmp_path):
    names = write_asked(tmp_path, range(1, 3), SETTINGS[:3:2])
    for result in (path for name in names for path in Path(name).glob("tasks/*.json")):
        content = json.loads(result.read_text())
        content["items"]["bits"] = [None] * len(content["items"]["bits"])
        result.write_text(json.dumps(content))
    text = write_report([Path(name) for name in names], tmp_path).read_text()
    assert "share of items answered right" in text
    assert "differences-by-task" not in text
