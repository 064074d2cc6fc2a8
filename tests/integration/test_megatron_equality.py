"""With gamma 0 a training run is Megatron's own, step by step; with gamma 1 it is another."""

import json

import probe_losses
import pytest
from launch import TINY_MODEL, run_trainer

STEPS = 20
FLAGS = [
    *TINY_MODEL,
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256"),  # no padding at TP2
    *("--micro-batch-size=2", "--global-batch-size=4", f"--train-iters={STEPS}", "--lr=1e-3"),
    "--clip-grad=1.0",
]
LAYOUTS = {"tp2": ("--tensor-model-parallel-size=2",), "pp2": ("--pipeline-model-parallel-size=2",)}


@pytest.fixture(scope="module", params=LAYOUTS)
def losses_of(request, tmp_path_factory):
    """A function from (mode, gamma) to the run's losses, one a micro-batch; runs are kept."""
    folder, kept = tmp_path_factory.mktemp(request.param), {}

    def run(mode, gamma):
        if (mode, gamma) not in kept:
            out = folder / f"{mode}-{gamma}.json"
            flags = [*FLAGS, *LAYOUTS[request.param], f"--infoentropy-gamma={gamma}"]
            run_trainer(2, probe_losses.main, (out, mode), flags, folder)
            kept[mode, gamma] = json.loads(out.read_text())
        return kept[mode, gamma]

    return run


@pytest.mark.parametrize("mode", ["ours", "dropin"])
def test_gamma_zero_reproduces_megatrons_loss_curve(losses_of, mode):
    theirs, mine = losses_of("megatron", 0), losses_of(mode, 0)
    assert len(theirs) == len(mine) == 2 * STEPS
    for (their_loss, their_count), (my_loss, my_count) in zip(theirs, mine, strict=True):
        assert my_count == their_count
        assert my_loss == pytest.approx(their_loss, rel=2e-6)
    assert mine[-1][0] < 0.98 * mine[0][0], "the run did not learn, so equality shows little"


def test_gamma_one_trains_and_is_the_same_through_both_doors(losses_of):
    plain, ours, dropin = losses_of("ours", 0), losses_of("ours", 1), losses_of("dropin", 1)
    for (a, _), (b, _) in zip(ours, dropin, strict=True):
        assert a == pytest.approx(b, rel=5e-6)
    assert ours[-1][0] < 0.98 * ours[0][0]
    assert abs(ours[-1][0] - plain[-1][0]) > 2e-5 * plain[-1][0], "the weights changed nothing"
