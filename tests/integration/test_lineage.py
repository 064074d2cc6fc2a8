"""A run that goes on with another objective than its checkpoint's is told so, both named."""

import dataclasses
from argparse import Namespace

import plain_run
import pytest
from launch import TINY_MODEL, run_trainer

from megatron_infoentropy import InfoEntropyConfig
from megatron_infoentropy.integration.arguments import check_rope_scaling, other_objective


def saved_by(config, without=()):
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return Namespace(**{f"infoentropy_{k}": v for k, v in fields.items() if k not in without})


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {}, None),
        ({}, {"backend": "reference", "fused_linear": True}, None),
        (
            {"objective": "cross_entropy"},
            {},
            "trained with objective=cross_entropy and this run goes on with objective=infoentropy",
        ),
        ({"sigma": 3.0, "objective": "focal"}, {"objective": "focal"}, None),  # without effect
        ({"objective": "cross_entropy", "gamma": 2.0}, {"gamma": 0.0}, None),
        ({"gamma": 0.0}, {"gamma": 0.0, "z_loss": 1e-4}, "z_loss=0.0 and this run goes on"),
        (
            {"gamma": 2.0},
            {"normalization": "global"},
            "objective=infoentropy gamma=2.0 normalization=paper and this run goes on with "
            "objective=infoentropy gamma=1.0 normalization=global",
        ),
    ],
)
def test_what_differs_is_named_on_both_sides(before, now, message):
    said = other_objective(saved_by(InfoEntropyConfig(**before)), InfoEntropyConfig(**now))
    assert (said is None) if message is None else (message in said)


def test_a_checkpoint_without_our_arguments_was_plain_cross_entropy():
    assert "Megatron's own cross entropy" in other_objective(Namespace(), InfoEntropyConfig())
    assert other_objective(Namespace(), InfoEntropyConfig(gamma=0.0)) is None
    smooth = InfoEntropyConfig(objective="cross_entropy", label_smoothing=0.1)
    assert "label_smoothing=0.0 and this run" in other_objective(Namespace(), smooth)
    rising = {"gamma_schedule": "linear", "gamma_end": 2.0, "gamma_samples": 9}
    rising = InfoEntropyConfig(gamma=0.0, **rising)
    assert "gamma_schedule=linear" in other_objective(Namespace(), rising)


def test_fields_that_an_earlier_version_did_not_have_had_their_defaults():
    earlier = saved_by(InfoEntropyConfig(), without=("blend", "z_loss"))
    assert other_objective(earlier, InfoEntropyConfig()) is None
    assert "blend=0.0" in other_objective(earlier, InfoEntropyConfig(blend=0.5))


def test_the_trainer_says_it_before_the_first_step(tmp_path):
    flags = [
        *TINY_MODEL,
        *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256"),
        *("--micro-batch-size=2", "--global-batch-size=2", "--lr=1e-3"),
        *(f"--save={tmp_path}/checkpoints", f"--load={tmp_path}/checkpoints"),
        *("--save-interval=2", "--ckpt-format=torch_dist"),
    ]
    first = run_trainer(1, plain_run.main, (), [*flags, "--train-iters=2"], tmp_path)
    assert "the checkpoint was trained with" not in first
    other = [*flags, "--train-iters=3", "--infoentropy-objective=cross_entropy"]
    log = run_trainer(1, plain_run.main, (), [*other, "--override-opt-param-scheduler"], tmp_path)
    warning = log.index("the checkpoint was trained with objective=infoentropy and this run goes")
    assert warning < log.index("iteration        3/       3")


@pytest.mark.parametrize(
    ("said", "ours", "obeyed"), [(32.0, 8.0, False), (8.0, 32.0, False), (32.0, 16.0, True)]
)
def test_a_rotary_scaling_that_is_known_may_be_changed(said, ours, obeyed):
    saved = Namespace(use_rope_scaling=True, rope_scaling_factor=said)
    if obeyed:
        saved.infoentropy_rope_scaling_factor = said
    check_rope_scaling(saved, Namespace(rope_scaling_factor=ours))


def test_a_rotary_scaling_that_a_trainer_may_have_ignored_is_refused():
    saved = Namespace(use_rope_scaling=True, rope_scaling_factor=32.0)
    with pytest.raises(ValueError, match="go on with --rope-scaling-factor 8, or"):
        check_rope_scaling(saved, Namespace(rope_scaling_factor=32.0))
    saved.use_rope_scaling = False
    check_rope_scaling(saved, Namespace(rope_scaling_factor=32.0))
    check_rope_scaling(None, Namespace(rope_scaling_factor=32.0))
