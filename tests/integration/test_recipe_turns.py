"""Megatron's trainer with losses that take turns, as `infoentropy bench-recipe` measures them."""

import json

import pytest
from launch import TINY_MODEL, run_trainer

from megatron_infoentropy.bench.recipe_run import RankResult, rows_of
from megatron_infoentropy.evaluate.runlog import read_log

ROUNDS = 3
FLAGS = [
    *(*TINY_MODEL, "--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=512"),
    *("--micro-batch-size=2", "--global-batch-size=4", "--train-iters=1000", "--lr=1e-3"),
    *("--lr-warmup-iters=500", "--pipeline-model-parallel-size=2"),
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
def results(folder):
    return [RankResult(**json.loads((folder / f"rank-{n}.json").read_text())) for n in (0, 1)]


def test_every_loss_gets_its_steps(results):
    for result in results:
        assert [seen["name"] for seen in result.losses] == [
            *("infoentropy", "cross entropy", "infoentropy, fused linear", "megatron unfused")
        ]
        assert [len(seen["times"]) for seen in result.losses] == [ROUNDS] * 4
        assert [name for name, _ in result.left_out] == [
            *("megatron fused", "megatron fused by Transformer Engine")
        ]


def test_parts_add_up_to_the_step_and_the_loss_is_on_the_last_stage(results):
    for result in results:
        for seen in result.losses:
            for number, spent in enumerate(seen["times"]):
                parts = [spans[number] for spans in seen["parts"].values()]
                assert sum(parts) == pytest.approx(spent)
    first, last = (result.losses[0]["parts"] for result in results)
    assert max(first["loss"]) == 0
    assert min(last["loss"]) > 0
    assert min(last["backward"]) > 0


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


def test_rows_have_rates_and_no_checkpoint_is_left(folder, results):
    ours, *_ = rows_of("tiny", None, results)
    assert (ours.layout, ours.precision) == ("tensor 1 x pipeline 2 x data 1", "fp32")
    assert ours.tokens == 4 * 16
    assert ours.tflops > 0
    assert ours.matmul_tflops > 0
    assert ours.peak_mib > 0
    assert ours.held_gib is None
    assert sorted(path.name for path in folder.iterdir()) == [
        *("rank-0.json", "rank-1.json", "rank0.log", "rank1.log")
    ]
