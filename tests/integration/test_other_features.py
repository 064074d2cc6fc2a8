"""With gamma 0 a training run is Megatron's own, in its layouts and beside its other features.

Each run here trains, so that equal curves mean equal gradients of everything, also of what is not
ours: auxiliary losses of experts, multi-token-prediction heads, the sharded optimizer.
"""

import functools
import json
import math

import pytest
import torch
from launch import TINY_TRAINING, run_trainer

from megatron_infoentropy import pretrain
from megatron_infoentropy.evaluate.runlog import parse_log

STEPS = 6
HYBRID = "--infoentropy-hybrid"
# The vocabulary of 256 has no padding at TP2.
TRAINING = [*TINY_TRAINING, "--global-batch-size=8", "--lr=1e-2", f"--train-iters={STEPS}"]
GPT = ("tp2", "ours", 1)
HEADS = ["--mtp-num-layers=1", "--mtp-loss-scaling-factor=0.3"]
FEATURES = {
    "tp2": ["--tensor-model-parallel-size=2"],
    "pp2": ["--pipeline-model-parallel-size=2"],
    "experts": [
        *("--num-experts=4", "--moe-router-topk=2", "--expert-model-parallel-size=2"),
        *("--moe-router-load-balancing-type=aux_loss", "--moe-aux-loss-coeff=0.1"),
        "--moe-token-dispatcher-type=allgather",
    ],
    "hybrid": [
        *("--hybrid-layer-pattern=*-|*-", "--pipeline-model-parallel-size=2"),
        "--train-iters=20",
    ],
    "mtp": HEADS,
    "mtp-weighted": [*HEADS, "--infoentropy-mtp-loss=weighted"],
}


def losses(mode, flags, folder, name="run", ranks=2):
    """The losses of one training run and their tokens, of every micro-batch."""
    out = folder / f"{name}.json"
    run_trainer(ranks, train, (out, mode), [*TRAINING, *flags], folder)
    return tuple(map(list, zip(*json.loads(out.read_text()), strict=True)))


def train(out, mode):
    """On every rank: train, and write the losses down with full precision.

    ours: our forward step. megatron: the same batches through the model's own loss, summed as
    Megatron's training script does. dropin: the latter with the loss bound to the model.
    """
    from megatron.core import mpu
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    from megatron_infoentropy.integration import use_infoentropy_loss
    from megatron_infoentropy.integration.arguments import config_from_args
    from megatron_infoentropy.integration.batch import get_batch
    from megatron_infoentropy.integration.compat import prepare_megatron

    prepare_megatron()
    container, our_step = pretrain.prepare()
    losses = []

    def own_loss(loss_mask, output):
        loss = torch.sum(output.view(-1).float() * loss_mask.view(-1).float())
        count = loss_mask.sum().to(torch.int)
        return loss, count, {"lm loss": torch.stack([loss.detach(), count])}

    def megatron_step(data_iterator, model):
        config = get_attr_wrapped_model(model, "config")
        batch = get_batch(data_iterator, None, config, training=True)
        inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
        output = model(*inputs, labels=batch["labels"])
        return output, functools.partial(own_loss, batch["loss_mask"])

    def step(data_iterator, model):
        forward = our_step if mode == "ours" else megatron_step
        output, loss_function = forward(data_iterator, model)

        def write_down(output):
            result = loss_function(output)
            losses.append([float(result[0].detach()), int(result[1])])
            return result

        return output, write_down

    if mode == "dropin":
        container.model.pre_wrap_hooks.append(
            lambda chunks: use_infoentropy_loss(chunks, config_from_args(get_args()))
        )
    try:
        pretrain.run(container, step)
    except SystemExit as end:  # --exit-interval ends the process
        if end.code:
            raise
    ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank()
    if mpu.is_pipeline_last_stage() and ranks == (0, 0):
        out.write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """A function from (feature, mode, gamma) to the run's losses, tokens and folder; it keeps runs.

    GPT saves every other step, for others to go on from.
    """

    @functools.cache
    def run(feature, mode, gamma):
        if (feature, mode) == ("mtp-weighted", "megatron"):
            return run("mtp", mode, gamma)  # what is weighted is ours
        folder = tmp_path_factory.mktemp(feature)
        flags = [*FEATURES[feature], f"--infoentropy-gamma={gamma}"]
        if (feature, mode, gamma) == GPT:
            flags += ["--ckpt-format=torch_dist", f"--save={folder}/save", "--save-interval=2"]
        found, tokens = losses(mode, flags, folder)
        assert found[-1] < 0.98 * found[0], "the run did not learn, so equality shows little"
        return found, tokens, folder

    return run


@pytest.mark.parametrize(
    ("feature", "mode"),
    [*((name, "ours") for name in FEATURES), ("tp2", "dropin"), ("pp2", "dropin")],
)
def test_with_gamma_zero_all_losses_are_as_megatron_has_them(curve, feature, mode):
    theirs, their_tokens, _ = curve(feature, "megatron", 0)
    mine, my_tokens, _ = curve(feature, mode, 0)
    assert mine == pytest.approx(theirs, rel=2e-6)
    assert my_tokens == their_tokens


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_gamma_one_is_another_training_and_the_same_through_the_drop_in(curve, layout):
    plain, ours, dropin = (
        curve(layout, mode, gamma)[0] for mode, gamma in (("ours", 0), ("ours", 1), ("dropin", 1))
    )
    assert dropin == pytest.approx(ours, rel=5e-6)
    assert abs(ours[-1] - plain[-1]) > 2e-5 * plain[-1], "the weights changed nothing"


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


def test_a_gpt_is_resumed_as_a_hybrid_and_that_in_another_layout(curve, tmp_path):
    """Its optimizer too: the rest of the curve is the GPT's."""
    whole, _, gpt = curve(*GPT)
    from_step_2 = [f"--load={gpt}/save", "--ckpt-step=2", "--exit-interval=4"]
    save = ["--ckpt-format=torch_dist", f"--save={tmp_path}/save", "--save-interval=2"]
    tensor = [*FEATURES["tp2"], HYBRID, *from_step_2, *save]
    first, _ = losses("ours", tensor, tmp_path, "first")
    pipeline = [*FEATURES["pp2"], HYBRID, f"--load={tmp_path}/save"]
    second, _ = losses("ours", pipeline, tmp_path, "second")
    assert len(first) == len(second) == len(whole) // 3
    assert first + second == pytest.approx(whole[-len(first + second) :], rel=2e-6)


def test_a_hybrid_starts_from_a_gpt_with_the_same_validation_loss(curve, tmp_path):
    gpt = curve(*GPT)[2]
    flags = [*FEATURES["tp2"], f"--pretrained-checkpoint={gpt}/save", "--no-load-optim"]
    flags += ["--lr=0", "--min-lr=0", "--train-iters=1", "--eval-iters=4", "--eval-interval=1"]
    said = {}
    for kind in ([], [HYBRID]):
        losses("ours", [*flags, *kind], tmp_path)
        log = (tmp_path / "rank1.log").read_text()
        said[*kind] = parse_log(log.splitlines()).validation[1]["cross entropy"]
        loaded = (
            "loading a GPT checkpoint into the hybrid model" in (tmp_path / "rank0.log").read_text()
        )
        assert loaded == bool(kind)
    assert said[()] == pytest.approx(said[HYBRID,], rel=2e-6)
    assert abs(said[()] - math.log(256)) > 0.02, "a loss that says something"
