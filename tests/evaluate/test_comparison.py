"""`infoentropy compare`: which evaluations are set against which, and what is claimed of them."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from example_runs import example_evaluation, write_run, write_runs
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.evaluate.compare import compare_folders
from megatron_infoentropy.evaluate.comparison import (
    Comparison,
    compare_pairs,
    difficulty_sums,
    with_baselines,
)
from megatron_infoentropy.evaluate.evaluation import DocumentSums, Evaluation
from megatron_infoentropy.evaluate.groups import Group, group_runs, match
from megatron_infoentropy.evaluate.runlog import TrainingLog
from megatron_infoentropy.evaluate.runs import Run, load_run
from megatron_infoentropy.evaluate.tally import BUCKETS, DECILES
from megatron_infoentropy.evaluate.verdict import answers


def runs(folder: Path, objective: str, seeds: range, shift: float = 0.0) -> list[str]:
    return list(map(str, write_runs(folder, {objective: shift}, seeds)))


def rows_of(comparison: Comparison) -> dict:
    return {(row.kind, row.name): row for row in comparison.rows}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Three seeds each: the baseline, one without any effect, one better on rare tokens."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "base": runs(folder, "cross_entropy", range(4, 7)),
        "same": runs(folder, "focal", range(4, 7)),
        "better": runs(folder, "infoentropy", range(4, 7), -0.3),
    }


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory) -> tuple[list[Comparison], Path]:
    output = tmp_path_factory.mktemp("output")
    names = folders["base"] + folders["same"] + folders["better"]
    return compare_folders(names, output=output), output


def test_every_statistic_is_compared_and_corrected_within_its_kind(made):
    same, better = made[0]
    kinds = [row.kind for row in same.rows]
    assert kinds.count("bucket") == len(BUCKETS)
    assert kinds.count("decile") == len(DECILES)
    assert (kinds.count("difficulty"), kinds.count("domain"), kinds[0]) == (3, 2, "total")
    assert {row.tests for row in same.rows if row.kind == "total"} == {2}, "two settings"
    assert {row.tests for row in same.rows if row.kind == "bucket"} == {6}
    for row in (*same.rows, *better.rows):
        assert row.p <= row.p_adjusted <= min(1, row.tests * row.p) + 1e-12
        assert row.low <= row.difference <= row.high


def test_an_effect_is_shown_where_it_is_and_none_where_there_is_none(made):
    same, better = made[0]
    assert {row.reading for row in same.rows} == {"no difference shown"}
    low = rows_of(better)["bucket", "low"]
    assert low.reading == "better"
    assert low.low < -0.3 < low.high
    assert 0 < low.detectable < 0.3
    helped, where, sure = answers([same])
    assert helped["short"] == "No difference shown."
    assert where["short"] == "No part shows a difference."
    assert "in 80 of 100 studies like this, of 3 seeds and 250 documents" in sure["more"]


def test_the_difference_is_the_mean_over_seeds_of_differences_of_the_same_seed(made, folders):
    total = made[0][1].rows[0]
    nats = [
        [
            json.loads((Path(folder) / "evaluation.json").read_text())["total"]["nats_per_token"]
            for folder in folders[setting]
        ]
        for setting in ("better", "base")
    ]
    assert total.difference == pytest.approx(np.mean(nats[0]) - np.mean(nats[1]))
    assert (total.group, total.baseline) == pytest.approx((np.mean(nats[0]), np.mean(nats[1])))


def test_the_first_setting_named_is_what_the_others_are_compared_with(folders):
    (comparison,) = compare_folders([*folders["better"], *folders["base"]])
    assert (comparison.baseline[:11], comparison.group) == ("InfoEntropy", "cross entropy")
    assert rows_of(comparison)["bucket", "low"].reading == "worse"


def test_the_file_holds_the_answers_and_every_row(made):
    comparisons, output = made
    content = json.loads((output / "comparison.json").read_text())
    assert content["answers"] == answers(comparisons)
    rows = [[asdict(row) for row in comparison.rows] for comparison in comparisons]
    assert [comparison["rows"] for comparison in content["comparisons"]] == rows


def test_evaluations_without_a_run_are_settings_and_commas_join_their_seeds(tmp_path):
    for name, seed, shift in (("a1", 1, 0), ("a2", 2, 0), ("b1", 3, -0.3), ("b2", 4, -0.3)):
        example_evaluation(seed, shift, "x", "f" * 64).save(tmp_path / name)
    joined = [f"{tmp_path / 'a1'},{tmp_path / 'a2'}", f"{tmp_path / 'b1'},{tmp_path / 'b2'}"]
    (two,) = compare_folders(joined)
    assert (two.pairing, two.seeds) == ("order", [])
    (one,) = compare_folders([str(tmp_path / "a1"), str(tmp_path / "b1")])
    low = rows_of(one)["bucket", "low"]
    assert low.p_adjusted < 0.05
    assert low.reading == "seed noise unknown", "documents alone say nothing of other seeds"
    assert low.high - low.low < rows_of(two)["bucket", "low"].high - low.low


def test_settings_of_other_seeds_are_compared_without_pairs(tmp_path):
    names = runs(tmp_path, "cross_entropy", range(1, 4)) + runs(tmp_path, "focal", range(5, 8))
    (comparison,) = compare_folders(names)
    assert comparison.pairing == "unpaired"
    assert comparison.seeds == [1, 2, 3, 5, 6, 7]
    assert comparison.rows[0].reading == "no difference shown"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [2, 3, 4], ([2, 3], [2, 3], "seed")),
        ([1, 2, 3], [3, 4], ([1, 2, 3], [3, 4], "unpaired")),
        ([1, 2], [2], ([2], [2], "one")),
        ([1], [2], ([], [], "one")),
    ],
)
def test_seeds_are_paired_where_at_least_two_are_shared(first, second, expected):
    evaluation = example_evaluation(1, 0, "x", "f" * 64)

    def group(label: str, seeds: list[int]) -> Group:
        made = [Run(Path(label), {"name": label, "seed": n}, TrainingLog(), evaluation)
                for n in seeds]  # fmt: skip
        return Group(label, is_baseline=False, runs=made, repeated=[])

    found = match(group("one", first), group("other", second))
    seeds = ([run.seed for run in side] for side in (found.ours, found.theirs))
    assert (*seeds, found.pairing) == expected


def test_the_command_prints_a_line_for_each_statistic_and_the_answers(folders):
    done = CliRunner().invoke(app, ["compare", *folders["base"], *folders["better"]])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len([line for line in lines if line.startswith("domain")]) == 2
    questions = [line[: line.index("?") + 1] for line in lines[-4:-1]]
    assert questions == ["Did it help?", "On what?", "How sure is that?"]
    assert "than cross entropy over all held-out text: InfoEntropy" in lines[-4]
    assert "at most 5\xa0% in each kind of difference (over all tokens, " in lines[-1]
    assert "25\xa0% over all of them" in lines[-1]


def test_what_cannot_be_compared_says_why(folders, tmp_path):
    with pytest.raises(ValueError, match="at least two settings, got 1: cross entropy"):
        compare_folders(folders["base"])
    empty = str(write_run(tmp_path / "empty", seed=9, evaluated=False))
    with pytest.raises(ValueError, match="has not been evaluated: run `infoentropy evaluate`"):
        compare_folders([folders["base"][0], empty])
    other = write_run(tmp_path / "other", objective="focal", fingerprint="e" * 64)
    with pytest.raises(
        ValueError, match="cannot be compared: the runs were evaluated on different"
    ):
        compare_folders([folders["base"][0], str(other)])


def test_evaluations_that_were_scored_in_another_way_are_not_compared(tmp_path):
    def scored(name: str, **way: object) -> str:
        evaluation = example_evaluation(1, 0, "x", "f" * 64)
        evaluation.summary["scoring"] |= way
        return str(evaluation.save(tmp_path / name).parent)

    usual, strided = scored("lr=1,seed=1"), scored("strided", stride=64)
    with pytest.raises(ValueError, match="different stride of windows: 256 and 64"):
        compare_folders([usual, strided])
    compare_folders([usual, scored("smaller", batch_tokens=512)])
    packs = scored("packs", mode="packed"), scored("small packs", mode="packed", batch_tokens=512)
    with pytest.raises(ValueError, match="where packs start: 4096 and 512"):
        compare_folders([*packs])


def noisy_pair(tokens: int = 40_000) -> list[Evaluation]:
    """Two equally good models, each calibrated, whose entropies err independently."""
    generator = np.random.default_rng(5)
    truth = generator.gamma(2, 1.5, size=tokens)
    made = []
    for _ in range(2):
        excess = generator.gamma(2, 0.3, size=tokens)  # what this model does not know
        scores = np.stack([truth + excess + generator.normal(0, 0.3, tokens), truth + excess], 1)
        lengths = np.full((40, 1), tokens // 40)
        sums = DocumentSums(np.zeros(40, int), np.arange(40), lengths, 0.0 * lengths, 0.0 * lengths)
        made.append(Evaluation({}, sums, scores.astype(np.float16)))
    return made


def test_one_models_own_entropy_would_make_it_look_bad_on_hard_tokens_the_mean_does_not():
    pair = noisy_pair()

    def hard_difference(references: list[Evaluation]) -> float:
        tokens, ce = difficulty_sums(pair, [references])
        assert tokens.sum(axis=0) == pytest.approx(np.full(3, 40_000 / 3), rel=0.01)
        gap = (ce[0] - ce[1]).sum(axis=0) / tokens.sum(axis=0)
        return float(gap[2])

    assert hard_difference([pair[0]]) > 0.05
    assert hard_difference([pair[1]]) < -0.05
    assert abs(hard_difference(pair)) < 0.015


def test_a_setting_of_nine_runs_says_no_more_of_what_is_hard_than_one_of_a_single_run():
    pair = noisy_pair(4000)
    many = difficulty_sums(pair, [[pair[0]] * 9, [pair[1]]])
    for one, other in zip(many, difficulty_sums(pair, [pair]), strict=True):
        np.testing.assert_allclose(one, other)


def test_blocks_do_not_matter_to_difficulty(monkeypatch):
    pair = noisy_pair(4000)
    whole = difficulty_sums(pair, [pair])
    monkeypatch.setattr("megatron_infoentropy.evaluate.comparison._BLOCK", 700)
    for one, other in zip(whole, difficulty_sums(pair, [pair]), strict=True):
        np.testing.assert_allclose(one, other)


def test_runs_of_another_loss_are_not_seeds_of_one_setting(tmp_path):
    full = {"objective": "infoentropy", "gamma": 1.0, "sigma": 1.0, "normalization": "paper"}
    several = {
        "published": {},
        "blended": {"blend": 0.5},
        "rising": {"gamma": 0.0, "gamma_schedule": "linear", "gamma_samples": 500},
        "own": {"objective": "custom", "weighting": "mine:weigh"},
        "smoothed": {"label_smoothing": 0.1},
        "without a target": {"ignore_target": 0},
        "tenth": {"objective": "eslm"},
        "fifth": {"objective": "eslm", "quantile": 0.2},
        "without gamma": {"objective": "deft"},
    }
    loaded = [
        load_run(write_run(tmp_path / name, objective="infoentropy", seed=1, loss=full | changes))
        for name, changes in several.items()
    ]
    groups = group_runs(loaded)
    assert [len(group.runs) for group in groups] == [1] * len(several)
    assert len({group.label for group in groups}) == len(several)
    words = [run.objective_label.partition(",")[0] for run in loaded]
    assert words[-3:] == ["ESLM quantile 0.1", "ESLM quantile 0.2", "DEFT"]
    assert not any(group.is_baseline for group in groups), "a schedule from 0 is not plain"


def test_hard_tokens_are_the_same_in_every_comparison_of_a_page(folders):
    every = [load_run(Path(path)) for paths in folders.values() for path in paths]
    together = [c for c in compare_pairs(with_baselines(group_runs(every))) if c.rows]
    assert len(together) > 1
    hard = [rows_of(c)["difficulty", "hard"].baseline for c in together]
    assert hard == pytest.approx([hard[0]] * len(hard), abs=1e-12)
