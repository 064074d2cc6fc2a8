"""Beside other features of Megatron's the loss is alone responsible for its own part.

Each run here trains, so that equal curves mean equal gradients of everything, also of what is not
ours: auxiliary losses of experts, multi-token-prediction heads, the sharded optimizer.
"""

import json

import probe_losses
import pytest
from launch import TINY_MODEL, run_trainer

from megatron_infoentropy.evaluate.runlog import parse_log

STEPS = 6
TRAINING = [
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256"),
    *("--micro-batch-size=2", "--global-batch-size=8", "--lr=1e-2", f"--train-iters={STEPS}"),
]
EXPERTS = [
    *("--num-experts=4", "--moe-router-topk=2", "--expert-model-parallel-size=2"),
    *("--moe-router-load-balancing-type=aux_loss", "--moe-aux-loss-coeff=0.1"),
    "--moe-token-dispatcher-type=allgather",
]
HEADS = ["--mtp-num-layers=1", "--mtp-loss-scaling-factor=0.3"]


def losses(mode, flags, folder, name="run", ranks=2):
    """(the losses of one training run, rank 0's log)."""
    out = folder / f"{name}.json"
    log = run_trainer(
        ranks, probe_losses.main, (out, mode), [*TINY_MODEL, *TRAINING, *flags], folder
    )
    return [loss for loss, _count in json.loads(out.read_text())], log


@pytest.mark.parametrize("feature", [EXPERTS, HEADS], ids=["experts", "mtp"])
def test_with_gamma_zero_other_losses_are_as_megatron_has_them(feature, tmp_path):
    theirs, _ = losses("megatron", feature, tmp_path, "theirs")
    ours, _ = losses("ours", [*feature, "--infoentropy-gamma=0"], tmp_path, "ours")
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert ours[-1] < 0.98 * ours[0], "the run did not learn, so equality shows little"


def test_a_whole_batch_fits_into_fp16_as_its_mean_does(tmp_path):
    """A loss scale at which gradients of means are finite, and those of sums were not."""
    shared = ["--fp16", "--initial-loss-scale=1024", "--infoentropy-entropy-bonus=9"]
    for normalization in ("paper", "global"):
        flags = [*shared, f"--infoentropy-normalization={normalization}"]
        losses("ours", flags, tmp_path, normalization)
        log = (tmp_path / "rank1.log").read_text()
        assert "number of skipped iterations:   0" in log
        assert "number of skipped iterations:   1" not in log
        # The bonus outweighs the cross entropy, and Megatron prints no negative number.
        reports = parse_log(log.splitlines()).training
        assert all(values["objective"] < 0 for values in reports.values())
        assert len(reports) == STEPS


def test_the_sharded_optimizer_takes_the_same_steps(tmp_path):
    shared = ["--infoentropy-normalization=global"]
    plain, _ = losses("ours", shared, tmp_path, "plain", ranks=4)
    flags = [*shared, "--use-distributed-optimizer"]
    sharded, _ = losses("ours", flags, tmp_path, "sharded", ranks=4)
    assert sharded == pytest.approx(plain, rel=1e-6)
    assert plain[-1] < 0.98 * plain[0]


def test_a_resumed_run_goes_on_bit_for_bit_its_schedule_too(tmp_path):
    schedule = [
        *("--infoentropy-gamma=0", "--infoentropy-gamma-schedule=cosine"),
        *("--infoentropy-gamma-end=2", f"--infoentropy-gamma-samples={8 * STEPS}"),
        *("--tensor-model-parallel-size=2", "--ckpt-format=torch_dist"),
    ]
    whole, _ = losses("ours", schedule, tmp_path, "whole")
    places = (f"--save={tmp_path}/checkpoints", f"--load={tmp_path}/checkpoints")
    saved = [*places, "--save-interval=3"]
    first, _ = losses("ours", [*schedule, *saved, "--exit-interval=3"], tmp_path, "first")
    second, _ = losses("ours", [*schedule, *saved], tmp_path, "second")
    assert len(whole) == len(first) + len(second) == 4 * STEPS
    assert first + second == whole
