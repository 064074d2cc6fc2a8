"""The flags are the configuration's fields; what cannot go together is refused before anything.

A run that goes on with another objective than its checkpoint's is told so, both named.
"""

import argparse
import dataclasses
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import plain_run
import pytest
from launch import TINY_MODEL, run_trainer
from megatron.training.arguments import add_megatron_arguments
from typer.main import get_command

from megatron_infoentropy import InfoEntropyConfig, pretrain
from megatron_infoentropy.cli import app
from megatron_infoentropy.integration import arguments
from megatron_infoentropy.integration.arguments import (
    add_trainer_args,
    check_megatron_args,
    check_rope_scaling,
    config_from_args,
    other_objective,
    require_per_token_loss,
)
from megatron_infoentropy.launch.recipe import read_facts


def parse(*words):
    return add_trainer_args(argparse.ArgumentParser()).parse_args(words)


def megatron_args(**changes):
    plain = {
        "trust_remote_code": False,
        "fp16_lm_cross_entropy": False,
        "num_experts": None,
        "mtp_num_layers": None,
        "calculate_per_token_loss": False,
        "log_interval": 2,
    }
    return SimpleNamespace(**plain | changes)


def hybrid(pattern="*-", **changes):
    plain = {"transformer_impl": "local", "position_embedding_type": "rope", "spec": None}
    return {"hybrid_layer_pattern": pattern, **plain, **changes}


def test_no_flags_give_the_default_configuration():
    assert config_from_args(parse()) == InfoEntropyConfig()


SCHEDULE = {"gamma_schedule": "cosine", "gamma_end": 0.5, "gamma_samples": 1000}


@pytest.mark.parametrize("others", [SCHEDULE, {"objective": "custom", "weighting": "a.b:weight"}])
def test_every_field_can_be_set_by_its_flag(others):
    given = {
        "gamma": 2.5,
        "sigma": 0.5,
        "quantile": 0.25,
        "normalization": "global",
        "detach_weight": False,
        "backend": "reference",
        "collective": "all_reduce",
        "blend": 0.25,
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
        "entropy_bonus": 0.01,
        "softcap": 30.0,
        "temperature": 0.9,
        "fused_linear": True,
        "chunk_tokens": 512,
        "skip_masked": False,
        "ignore_target": 0,
        "mtp_loss": "weighted",
    }
    elsewhere = {*SCHEDULE, "objective", "weighting"}
    names = {field.name for field in dataclasses.fields(InfoEntropyConfig)}
    assert given.keys() == names - elsewhere
    given |= others
    words = []
    for name, value in given.items():
        flag = f"infoentropy-{name.replace('_', '-')}"
        switch = {True: [f"--{flag}"], False: [f"--no-{flag}"]}
        words += switch[value] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert config_from_args(parse(*words)) == InfoEntropyConfig(**given)


ELSEWHERE = {  # flags of Slurm, torchrun, llama.cpp and Megatron's preprocess_data.py
    *("--array", "--batch", "--cpu-bind", "--dependency", "--exclusive", "--requeue", "--signal"),
    *("--test-only", "--time", "--nproc-per-node", "--standalone", "--model", "--outfile"),
    "--json-keys",
}


def test_every_flag_that_a_page_names_is_there():
    parser = add_trainer_args(add_megatron_arguments(argparse.ArgumentParser()))
    there = {*parser._option_string_actions, *ELSEWHERE}
    for command in get_command(app).commands.values():
        for option in command.params:
            there |= {*option.opts, *option.secondary_opts}
    for page in (Path(__file__).parents[2] / "docs").rglob("*.md"):
        named = re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]", page.read_text())
        assert {*named} <= there, page


def test_an_unknown_choice_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        parse("--infoentropy-objective", "entropy")
    assert "invalid choice: 'entropy'" in capsys.readouterr().err


def test_an_impossible_value_is_refused_by_the_configuration():
    with pytest.raises(ValueError, match="infinite weight"):
        config_from_args(parse("--infoentropy-gamma=-1", "--infoentropy-sigma=0"))


@pytest.mark.parametrize(
    ("changes", "normalization", "message"),
    [
        ({"trust_remote_code": True}, "paper", "--trust-remote-code is refused"),
        ({"fp16_lm_cross_entropy": True}, "paper", "--fp16-lm-cross-entropy is refused"),
        ({"sft": True}, "paper", "--sft is refused: .* use --infoentropy-conversations"),
        (
            {"infoentropy_conversations": True, "mock_data": True},
            "paper",
            "--infoentropy-conversations cannot go with --mock-data",
        ),
        ({"cuda_graph_impl": "full_iteration"}, "paper", "full_iteration is refused"),
        ({"dataloader_inter_document_masking": True}, "paper", "would ignore the flag"),
        (hybrid("M*M-"), "paper", r"layers are attention \(\*\) or MLP \(-\), got M"),
        (hybrid("*E|*-"), "paper", "got E; others are built from Transformer Engine"),
        (
            hybrid("M*-", transformer_impl="transformer_engine"),
            "paper",
            "need the package mamba_ssm",
        ),
        (hybrid(use_rope_scaling=True), "paper", "--use-rope-scaling: .* ignores the flag"),
        (hybrid(rotary_interleaved=True), "paper", "--rotary-interleaved: .* different angles"),
        (hybrid(overlap_moe_expert_parallel_comm=True), "paper", "has no schedule plan"),
        (hybrid(position_embedding_type="mrope"), "paper", "type mrope, .* ignores"),
        ({"logits_load_dir": "D"}, "paper", "no loss against a teacher"),
        ({"logits_save_dir": "D"}, "paper", "go on training the model whose logits are saved"),
        ({"perform_rl_step": True}, "paper", "no loss of a policy"),
        ({"inprocess_restart": True}, "paper", "restarts are torchrun's"),
        ({"num_experts": 8}, "global", "cannot go with --num-experts"),
        ({"mtp_num_layers": 1}, "global", "cannot go with --mtp-num-layers"),
        ({"dsa_indexer_loss_coeff": 0.1}, "global", "cannot go with --dsa-indexer-loss-coeff"),
        ({"use_torch_fsdp2": True}, "global", "cannot go with --use-torch-fsdp2"),
        ({"ddp_average_in_collective": True}, "global", "cannot go with --ddp-average-in-collect"),
    ],
)
def test_incompatible_megatron_flags_are_refused(changes, normalization, message):
    config = InfoEntropyConfig(normalization=normalization)
    with pytest.raises(ValueError, match=message):
        check_megatron_args(megatron_args(**changes), config)
    if normalization == "global":
        check_megatron_args(megatron_args(**changes), InfoEntropyConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mtp_num_layers": None}, "has no effect without multi-token-prediction heads"),
        ({"overlap_moe_expert_parallel_comm": True}, "when the forward step has ended"),
    ],
)
def test_heads_that_cannot_have_this_loss_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_megatron_args(
            megatron_args(**{"mtp_num_layers": 1} | changes), InfoEntropyConfig(mtp_loss="weighted")
        )


def test_hybrid_patterns_of_attention_and_mlp_are_taken():
    config = InfoEntropyConfig(fused_linear=True)
    check_megatron_args(megatron_args(**hybrid("*-*-|--")), config)
    heads = megatron_args(**hybrid("*-|*-/*-", mtp_num_layers=1))
    check_megatron_args(heads, dataclasses.replace(config, mtp_loss="weighted"))
    given = hybrid("M*E-", spec=["package.module", "stack"])  # layers of one's own
    with mock.patch.object(arguments, "find_spec"):
        check_megatron_args(megatron_args(**given), InfoEntropyConfig())


@pytest.mark.parametrize(("setting", "value"), [("softcap", 30.0), ("temperature", 2.0)])
def test_a_model_that_cannot_be_exported_is_refused_unless_it_need_not_be(setting, value):
    config, words = InfoEntropyConfig(**{setting: value}), [f"--infoentropy-{setting}", str(value)]
    message = f"--infoentropy-{setting} {value:g} becomes .* give --infoentropy-no-export too"
    with pytest.raises(ValueError, match=message):
        check_megatron_args(megatron_args(infoentropy_no_export=False), config)
    with pytest.raises(ValueError, match=message):
        read_facts(words)
    words.append("--infoentropy-no-export")
    check_megatron_args(megatron_args(**vars(parse(*words))), config)
    read_facts(words)


def test_a_histogram_interval_without_a_log_line_is_refused():
    for interval in (-2, 3):
        args = megatron_args(infoentropy_histogram_interval=interval)
        with pytest.raises(ValueError, match=rf"multiple of --log-interval \(2\), got {interval}"):
            check_megatron_args(args, InfoEntropyConfig())
    for interval in (0, 2, 4):
        args = megatron_args(infoentropy_histogram_interval=interval)
        check_megatron_args(args, InfoEntropyConfig())


def test_global_normalization_turns_per_token_loss_on():
    args = megatron_args()
    assert not require_per_token_loss(args, InfoEntropyConfig())
    assert not args.calculate_per_token_loss
    assert require_per_token_loss(args, InfoEntropyConfig(normalization="global"))
    assert args.calculate_per_token_loss


def test_a_weighting_that_cannot_be_used_is_refused_before_anything_is_built(tmp_path):
    flags = [
        *TINY_MODEL,
        *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256", "--lr=1e-3"),
        *("--micro-batch-size=1", "--train-iters=1", "--infoentropy-objective=custom"),
        "--infoentropy-weighting=copy:copy",  # gives back what it is given
    ]
    with pytest.raises(AssertionError, match="must return a tensor of shape"):
        run_trainer(1, pretrain.prepare, (), flags, tmp_path)


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
        ({}, {"mtp_loss": "weighted"}, "mtp_loss=megatron and this run goes on with"),
        ({"ignore_target": 0}, {}, "ignore_target=0 and this run goes on with"),
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
    earlier.infoentropy_ignore_target = None  # which was none
    assert other_objective(earlier, InfoEntropyConfig()) is None


def test_settings_that_an_earlier_version_took_are_told_of():
    saved = saved_by(InfoEntropyConfig())
    saved.infoentropy_gamma_end = 0.5
    said = other_objective(saved, InfoEntropyConfig())
    assert said.startswith("the checkpoint was trained with settings that are refused now: gamma_e")


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


def train_without_saying_the_factor():
    """As a trainer that ignores it."""
    from megatron_infoentropy.integration import compat

    make = compat.model_config_from_args

    def make_silently(args):
        model_config = make(args)
        del args.infoentropy_rope_scaling_factor
        return model_config

    compat.model_config_from_args = make_silently
    plain_run.main()


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_training_goes_on_from_no_model_of_unknown_rotary_scaling(tmp_path, flag):
    flags = [
        *TINY_MODEL,
        *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256"),
        *("--micro-batch-size=2", "--global-batch-size=2", "--lr=1e-3", "--train-iters=1"),
        *("--ckpt-format=torch_dist", "--use-rope-scaling", "--rope-scaling-factor=32"),
    ]
    save = [f"--save={tmp_path}/theirs", "--save-interval=1"]
    run_trainer(1, train_without_saying_the_factor, (), [*flags, *save], tmp_path)
    with pytest.raises(AssertionError, match="its trainer does not say that it obeyed"):
        run_trainer(1, plain_run.main, (), [*flags, f"{flag}={tmp_path}/theirs"], tmp_path)


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
