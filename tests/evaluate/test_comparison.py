"""`infoentropy compare`: what is set against what, what is claimed of it, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from example_runs import example_evaluation, write_run
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
from megatron_infoentropy.evaluate.groups import group_runs
from megatron_infoentropy.evaluate.report import report_data
from megatron_infoentropy.evaluate.runs import load_run
from megatron_infoentropy.evaluate.tally import BUCKETS, DECILES
from megatron_infoentropy.evaluate.verdict import answers

SETTINGS = {"ce": ("cross_entropy", 0.0), "fl": ("focal", 0.0), "ie": ("infoentropy", -0.3)}
FACTS = {"gamma": 1.0, "sigma": 1.0, "normalization": "paper", "seed": 1}
OTHERS = {
    "bare": {"seed": 5, "evaluated": False},
    "longer-1": {"seed": 1, "train_iters": 800},
    "longer-2": {"seed": 2, "train_iters": 800},
    "again": {"seed": 1, "model_seed": 7},
    "elsewhere": {"objective": "focal", "fingerprint": "e" * 64},
    "copy": {"objective": "infoentropy", "same_as": "cross_entropy", "model_seed": 4},
    "mixed": {
        "objective": "infoentropy",
        "seed": 3,
        "lineage": [
            FACTS | {"from_step": 0, "objective": "cross_entropy"},
            FACTS | {"from_step": 16, "objective": "infoentropy"},
        ],
    },
}
WAYS = {
    "lr=1,seed=1": {},
    "smaller": {"batch_tokens": 512},
    "strided": {"stride": 64},
    "packs": {"mode": "packed"},
    "small packs": {"mode": "packed", "batch_tokens": 512},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeds 1 to 3 of `SETTINGS`, `OTHERS`, and evaluations without a run: plain-1 to 4, `WAYS`."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (objective, shift) in SETTINGS.items():
        for seed in (1, 2, 3):
            facts = {"objective": objective, "seed": seed, "model_seed": seed + 3}
            write_run(folder / f"{name}-{seed}", shift=shift, **facts)
    for name, changes in OTHERS.items():
        write_run(folder / name, **changes)
    for seed in (1, 2, 3, 4):
        example_evaluation(seed, 0, "x", "f" * 64).save(folder / f"plain-{seed}")
    for name, way in WAYS.items():
        evaluation = example_evaluation(1, 0, "x", "f" * 64)
        evaluation.summary["scoring"] |= way
        evaluation.summary["model"]["weights_sha256"] = name  # as of another dtype
        evaluation.save(folder / name)
    return folder


@pytest.fixture
def compared(folder, monkeypatch) -> Callable[..., str]:
    monkeypatch.chdir(folder)

    def compare(names: str) -> str:
        done = CliRunner().invoke(app, ["compare", *names.split()])
        return done.output if done.exit_code == 0 else str(done.exception)

    return compare


@pytest.fixture(scope="module")
def made(folder) -> list[Comparison]:
    names = [str(folder / f"{setting}-{seed}") for setting in SETTINGS for seed in (1, 2, 3)]
    return compare_folders(names, output=folder / "output")


def rows_of(comparison: Comparison) -> dict:
    return {(row.kind, row.name): row for row in comparison.rows}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("ce-1,ce-1,ce-1 ie-1,ie-1,ie-1", "ce-1 is named twice"),
        ("ce-1 ce-2 ./ce-1 ie-1", "ce-1 is named twice"),
        ("plain-1,smaller plain-2,plain-3", "are one model evaluated twice, not two seeds"),
        ("ce-1,ie-2 ce-3", "ce-1 and ie-2 are not seeds of one setting: cross entropy"),
        ("ce-1,longer-2 ie-3", "longer-2 are not seeds of one setting"),
        ("ie-1,mixed ce-1", "mixed are not seeds of one setting"),
        ("ce-1,again ie-1,ie-2", "ce-1 and again have the same seed 1"),
        ("ce-1,bare ie-1,ie-2", "bare has not been evaluated: run `infoentropy evaluate`"),
        (", x", "names no folder"),
        ("ce-1 ce-2", "at least two settings, got 1: cross entropy"),
        ("ce-1 ie-2", "no seed was trained and evaluated with both objectives"),
        ("ce-1 elsewhere", "cannot be compared: the runs were evaluated on different tokens, or"),
        ("lr=1,seed=1 strided", "different stride of windows: 256 and 64"),
    ],
)
def test_what_cannot_be_compared_says_why(compared, names, said):
    assert said in compared(names)


def test_packs_that_start_elsewhere_are_not_compared_and_other_batches_are(folder):
    with pytest.raises(ValueError, match="where packs start: 4096 and 512"):
        compare_folders([str(folder / "packs"), str(folder / "small packs")])
    compare_folders([str(folder / "lr=1,seed=1"), str(folder / "smaller")])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("ce-1,ce-2 ie-2,ie-1", "minus cross entropy, nats per token, paired by seed (1, 2)"),
        ("ce-1 ce-2 ie-2 ie-1", "minus cross entropy, nats per token, paired by seed (1, 2)"),
        ("ce-1,ce-2,ce-3 ie-2,ie-3", "paired by seed (2, 3)"),
        ("ce-1,ce-2 ie-2", "minus cross entropy, nats per token, one evaluation of each"),
        ("ce-1,ce-2 ie-2,ie-3", "unpaired, 2 and 2 evaluations"),
        ("ce-1,ce-2 plain-3,plain-4", "unpaired, 2 and 2 evaluations"),
        ("ce-1 ce-2 ce-3 plain-3,plain-4", "unpaired, 2 and 3 evaluations"),
        ("plain-1,plain-2 plain-3,plain-4", "paired by order, as their seeds are not known"),
        ("ce-1,ce-2 longer-1,longer-2", "longer-1,longer-2 minus c"),
        ("ce-1 longer-1,longer-2", "longer-1,longer-2 minus cross entropy"),
        ("ie-1 ie-2 ce-1", "left out: ie-2, as cross entropy has no evaluated run of seed 2"),
        ("ce-1 ce-2 again ie-1", "left out: again, as it repeats objective, set-up and seed of ce"),
        ("plain-1 ce-2,ce-3", "left out: ce-3, as there is 1 evaluation only of plain-1"),
        ("ce-1 ce-2 copy ie-2", "the evaluations of copy and ce-1 are identical"),
        ("ce-1 copy", "Did it help? No: nothing differs."),
    ],
)
def test_the_output_says_what_was_compared_with_what(compared, names, said):
    assert said in compared(names)


def test_the_order_of_seeds_changes_no_number(folder, monkeypatch):
    monkeypatch.chdir(folder)
    straight, crossed, alone = (
        compare_folders(names)[0].rows
        for names in (["ce-1,ce-2", "ie-1,ie-2"], ["ce-1,ce-2", "ie-2,ie-1"],
                      ["ce-1", "ce-2", "ie-2", "ie-1"])
    )  # fmt: skip
    assert straight == crossed == alone


def test_with_one_evaluation_of_each_documents_alone_say_nothing_of_other_seeds(folder, compared):
    (one,) = compare_folders([str(folder / "ce-1"), str(folder / "ie-1")])
    (two,) = compare_folders([f"{folder / 'ce-1'},{folder / 'ce-2'}",
                              f"{folder / 'ie-1'},{folder / 'ie-2'}"])  # fmt: skip
    low = rows_of(one)["bucket", "low"]
    assert low.p_adjusted < 0.05
    assert low.reading == "seed noise unknown"
    assert low.high - low.low < rows_of(two)["bucket", "low"].high - low.low
    said = compared("ie-2 plain-1")
    assert "80 of 100" not in said
    assert "No difference of any size could have been shown" in said


def test_the_page_names_what_is_left_out_and_what_is_identical(folder):
    def said(*names: str) -> str:
        verdict = report_data([load_run(folder / name) for name in names])["verdict"]
        return " ".join([verdict["answers"][0]["more"], *verdict["limits"]])

    assert "Left out: ie-2, as cross entropy has no evaluated run of seed 2." in said(
        "ce-1", "ie-1", "ie-2"
    )
    assert "evaluations of copy and ce-1 are identical." in said("ce-1", "copy")


def test_every_statistic_is_compared_and_corrected_within_its_kind(made):
    same, better = made
    kinds = [row.kind for row in same.rows]
    assert kinds.count("bucket") == len(BUCKETS)
    assert kinds.count("decile") == len(DECILES)
    assert (kinds.count("difficulty"), kinds.count("domain"), kinds[0]) == (3, 2, "total")
    assert {row.tests for row in same.rows if row.kind == "total"} == {2}, "two settings"
    assert {row.tests for row in same.rows if row.kind == "bucket"} == {6}
    for row in (*same.rows, *better.rows):
        assert row.p <= row.p_adjusted <= min(1, row.tests * row.p) + 1e-12
        assert row.low <= row.difference <= row.high


def test_an_effect_is_shown_where_it_is_and_none_where_there_is_none(made, folder):
    same, better = made
    assert {row.reading for row in same.rows} == {"no difference shown"}
    low = rows_of(better)["bucket", "low"]
    assert low.reading == "better"
    assert low.low < -0.3 < low.high
    assert 0 < low.detectable < 0.3
    helped, where, sure = answers([same])
    assert helped["short"] == "No difference shown."
    assert where["short"] == "No part shows a difference."
    assert "in 80 of 100 studies like this, of 3 seeds and 250 documents" in sure["more"]
    turned = [str(folder / f"{setting}-{seed}") for setting in ("ie", "ce") for seed in (1, 2, 3)]
    (comparison,) = compare_folders(turned)
    assert (comparison.baseline[:11], comparison.group) == ("InfoEntropy", "cross entropy")
    assert rows_of(comparison)["bucket", "low"].reading == "worse"


def test_the_difference_is_the_mean_over_seeds_of_differences_of_the_same_seed(made, folder):
    total = made[1].rows[0]
    ours, theirs = (
        np.mean([
            json.loads((folder / f"{setting}-{seed}" / "evaluation.json").read_text())["total"][
                "nats_per_token"
            ]
            for seed in (1, 2, 3)
        ])
        for setting in ("ie", "ce")
    )  # fmt: skip
    assert total.difference == pytest.approx(ours - theirs)
    assert (total.group, total.baseline) == pytest.approx((ours, theirs))


def test_the_file_holds_the_answers_and_every_row(made, folder):
    content = json.loads((folder / "output" / "comparison.json").read_text())
    assert content["answers"] == answers(made)
    rows = [[asdict(row) for row in comparison.rows] for comparison in made]
    assert [comparison["rows"] for comparison in content["comparisons"]] == rows


def test_the_command_prints_a_line_for_each_statistic_and_the_answers(compared):
    lines = compared("ce-1,ce-2,ce-3 ie-1,ie-2,ie-3").splitlines()
    assert "95 % (single)" in lines[1]
    assert "p (Holm)" in lines[1]
    assert len([line for line in lines if line.startswith("domain")]) == 2
    questions = [line[: line.index("?") + 1] for line in lines[-4:-1]]
    assert questions == ["Did it help?", "On what?", "How sure is that?"]
    assert "than cross entropy over all held-out text: InfoEntropy" in lines[-4]
    assert "at most 5\xa0% in each kind of difference (over all tokens, " in lines[-1]
    assert "25\xa0% over all of them" in lines[-1]


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


def test_neither_a_settings_runs_nor_blocks_change_what_is_hard(monkeypatch):
    pair = noisy_pair(4000)
    whole = difficulty_sums(pair, [pair])
    many = difficulty_sums(pair, [[pair[0]] * 9, [pair[1]]])
    monkeypatch.setattr("megatron_infoentropy.evaluate.comparison._BLOCK", 700)
    for one, nine, blocks in zip(whole, many, difficulty_sums(pair, [pair]), strict=True):
        np.testing.assert_allclose(one, nine)
        np.testing.assert_allclose(one, blocks)


def test_hard_tokens_are_the_same_in_every_comparison_of_a_page(folder):
    every = [load_run(folder / f"{name}-{seed}") for name in SETTINGS for seed in (1, 2, 3)]
    together = [c for c in compare_pairs(with_baselines(group_runs(every))) if c.rows]
    assert len(together) > 1
    hard = [rows_of(c)["difficulty", "hard"].baseline for c in together]
    assert hard == pytest.approx([hard[0]] * len(hard), abs=1e-12)
