"""Megatron's trainer with losses that take turns, as `infoentropy bench-recipe` measures them."""

import json

import pytest
from launch import TINY_TRAINING, run_trainer

from megatron_infoentropy.bench.recipe_run import RecipeRow, rows_of_all
from megatron_infoentropy.evaluate.runlog import read_log

ROUNDS = 3
FLAGS = [
    *(*TINY_TRAINING, "--vocab-size=512", "--train-iters=1000", "--lr-warmup-iters=500"),
    "--pipeline-model-parallel-size=2",
]


def measure(folder):
    """On a forked rank, which has Megatron ready."""
    from megatron_infoentropy.bench import recipe_losses

    recipe_losses.measure(folder, ROUNDS, [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    run_trainer(2, measure, (folder,), FLAGS, folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """The rows of each rank."""
    files = (folder / f"rank-{number}.json" for number in (0, 1))
    return [[RecipeRow(**row) for row in json.loads(file.read_text())] for file in files]


def test_every_loss_gets_its_steps(rows):
    for of_rank in rows:
        assert [(row.loss, row.rounds) for row in of_rank] == [
            *(("infoentropy", ROUNDS), ("cross entropy", ROUNDS)),
            *(("infoentropy, fused linear", ROUNDS), ("megatron unfused", ROUNDS)),
            *(("megatron fused", None), ("megatron fused by Transformer Engine", None)),
        ]


def test_the_loss_is_on_the_last_stage(rows):
    first, last = (of_rank[0] for of_rank in rows)
    assert first.loss_ms == 0
    assert min(last.loss_ms, last.backward_ms) > 0
    assert last.median_ms > last.loss_ms + last.backward_ms


def test_the_log_tells_whose_step_it_was(folder):
    training = read_log(folder / "rank1.log").training
    assert len(training) == 4 * (2 + 1 + ROUNDS) + 1
    # Megatron goes on printing a name once it knows it: 0 where a step did not report it.
    weighted = [step for step, numbers in training.items() if numbers["weight"]]
    plain = [step for step, numbers in training.items() if numbers.get("lm loss")]
    assert plain == [7, 8, 12, 16, 19, 22]  # Megatron's turns: warm-up, weighing, three rounds
    assert sorted(weighted + plain) == list(range(1, 26))
    assert training[7]["lm loss"] == pytest.approx(training[6]["cross entropy"], rel=0.05)
    assert training[25]["learning rate"] == pytest.approx(1e-3 * 25 / 500)  # the recipe's warm-up


def test_rows_have_rates_and_no_checkpoint_is_left(folder, rows):
    ours, *_ = rows_of_all(rows)
    assert (ours.layout, ours.precision) == ("tensor 1 x pipeline 2 x data 1", "fp32")
    assert ours.tokens == 4 * 16
    assert min(ours.tflops, ours.peak_mib) > 0
    assert ours.held_gib is None
    assert sorted(path.name for path in folder.iterdir()) == [
        *("rank-0.json", "rank-1.json", "rank0.log", "rank1.log")
    ]
