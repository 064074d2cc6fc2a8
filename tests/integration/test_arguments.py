"""The flags are the configuration's fields; what cannot go together is refused before anything.

A run that goes on with another objective than its checkpoint's is told so, both named.
"""

import argparse
import dataclasses
import re
from argparse import Namespace
from pathlib import Path
from typing import get_args
from unittest import mock

import plain_run
import pytest
from launch import TINY_TRAINING, run_trainer
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


def hybrid(pattern="*-", **changes):
    plain = {"transformer_impl": "local", "position_embedding_type": "rope", "spec": None}
    return {"hybrid_layer_pattern": pattern, **plain, **changes}


def test_no_flags_give_the_default_configuration():
    assert config_from_args(parse()) == InfoEntropyConfig()


def other_value(field):
    """One that is not the default."""
    if field.type is bool:
        return not field.default
    plain = {float: 0.5, int: 3, str: "package.module:function"}
    return plain[field.type] if field.type in plain else get_args(field.type)[-1]


@pytest.mark.parametrize(
    "left_out",  # the two do not go together
    [("gamma_schedule", "gamma_end", "gamma_samples"), ("objective", "weighting")],
)
def test_every_field_can_be_set_by_its_flag(left_out):
    fields = [f for f in dataclasses.fields(InfoEntropyConfig) if f.name not in left_out]
    given = {field.name: other_value(field) for field in fields}
    words = []
    for name, value in given.items():
        flag = f"infoentropy-{name.replace('_', '-')}"
        switch = {True: [f"--{flag}"], False: [f"--no-{flag}"]}
        words += switch[value] if isinstance(value, bool) else [f"--{flag}", str(value)]
    config = config_from_args(parse(*words))
    assert config == InfoEntropyConfig(**given)
    assert all(getattr(config, field.name) != field.default for field in fields)


ELSEWHERE = {  # flags of Slurm, torchrun, llama.cpp and Megatron's preprocess_data.py
    *("--array", "--batch", "--cpu-bind", "--cpus-per-task", "--dependency", "--exclusive"),
    *("--mem", "--requeue", "--signal", "--test-only", "--time", "--nproc-per-node"),
    *("--standalone", "--model", "--outfile", "--json-keys"),
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


GLOBAL, FUSED, HEADS = {"normalization": "global"}, {"fused_linear": True}, {"mtp_loss": "weighted"}
REFUSED = [  # arguments of Megatron, settings of the loss beside which they are refused, words
    ({"trust_remote_code": True}, {}, "--trust-remote-code is refused"),
    ({"fp16_lm_cross_entropy": True}, {}, "--fp16-lm-cross-entropy is refused"),
    ({"sft": True}, {}, "--sft is refused: .* use --infoentropy-conversations"),
    (
        {"infoentropy_conversations": True, "mock_data": True},
        *({}, "--infoentropy-conversations cannot go with --mock-data"),
    ),
    ({"cuda_graph_impl": "full_iteration"}, {}, "full_iteration is refused"),
    ({"dataloader_inter_document_masking": True}, {}, "would ignore the flag"),
    (hybrid("M*M-"), {}, r"layers are attention \(\*\) or MLP \(-\), got M"),
    (hybrid("*E|*-"), {}, "got E; others are built from Transformer Engine"),
    (hybrid("M*-", transformer_impl="transformer_engine"), {}, "need the package mamba_ssm"),
    (hybrid(use_rope_scaling=True), {}, "--use-rope-scaling: .* ignores the flag"),
    (hybrid(rotary_interleaved=True), {}, "--rotary-interleaved: .* different angles"),
    (hybrid(overlap_moe_expert_parallel_comm=True), {}, "has no schedule plan"),
    (hybrid(position_embedding_type="mrope"), {}, "type mrope, .* ignores"),
    ({"logits_load_dir": "D"}, {}, "no loss against a teacher"),
    ({"logits_save_dir": "D"}, {}, "go on training the model whose logits are saved"),
    ({"perform_rl_step": True}, {}, "no loss of a policy"),
    ({"inprocess_restart": True}, {}, "restarts are torchrun's"),
    ({"lr": float("nan")}, {}, "--lr must be a finite number, got nan"),
    (
        {"num_distributed_optimizer_instances": 3, "data_parallel_size": 4},
        *({}, "instances 3 must divide the 4 data-parallel ranks"),
    ),
    *(
        ({"infoentropy_histogram_interval": n, "log_interval": 2}, {}, rf"interval \(2\), got {n}:")
        for n in (-2, 3)
    ),
    *(
        ({name: 1}, GLOBAL, f"cannot go with --{name.replace('_', '-')}: ")
        for name in ("num_experts", "mtp_num_layers", "dsa_indexer_loss_coeff", "use_torch_fsdp2")
    ),
    ({"ddp_average_in_collective": True}, GLOBAL, "cannot go with --ddp-average-in-collective"),
    *(
        ({name: True}, FUSED, f"cannot go with --{name.replace('_', '-')}: ")
        for name in ("use_mup", "defer_embedding_wgrad_compute", "fp8_output_proj")
    ),
    *(({name: True}, FUSED, "it gathers") for name in ("use_megatron_fsdp", "use_torch_fsdp2")),
    ({"gtp_weight_remat_size": 2}, FUSED, "cannot go with --tensor-parallel-num-weight-shards"),
    ({"mtp_num_layers": None}, HEADS, "has no effect without multi-token-prediction heads"),
    (
        {"mtp_num_layers": 1, "overlap_moe_expert_parallel_comm": True},
        *(HEADS, "when the forward step has ended"),
    ),
]


@pytest.mark.parametrize(("changes", "settings", "message"), REFUSED)
def test_incompatible_flags_are_refused(changes, settings, message):
    with pytest.raises(ValueError, match=message):
        check_megatron_args(Namespace(**changes), InfoEntropyConfig(**settings))
    if settings:
        check_megatron_args(Namespace(**changes), InfoEntropyConfig())


def test_hybrid_patterns_of_attention_and_mlp_are_taken():
    config = InfoEntropyConfig(fused_linear=True)
    check_megatron_args(Namespace(**hybrid("*-*-|--")), config)
    heads = Namespace(**hybrid("*-|*-/*-", mtp_num_layers=1))
    check_megatron_args(heads, dataclasses.replace(config, mtp_loss="weighted"))
    given = hybrid("M*E-", spec=["package.module", "stack"])  # layers of one's own
    with mock.patch.object(arguments, "find_spec"):
        check_megatron_args(Namespace(**given), InfoEntropyConfig())


@pytest.mark.parametrize(("setting", "value"), [("softcap", 30.0), ("temperature", 2.0)])
def test_a_model_that_cannot_be_exported_is_refused_unless_it_need_not_be(setting, value):
    config, words = InfoEntropyConfig(**{setting: value}), [f"--infoentropy-{setting}", str(value)]
    message = f"--infoentropy-{setting} {value:g} becomes .* give --infoentropy-no-export too"
    with pytest.raises(ValueError, match=message):
        check_megatron_args(Namespace(), config)
    with pytest.raises(ValueError, match=message):
        read_facts(words)
    words.append("--infoentropy-no-export")
    check_megatron_args(parse(*words), config)
    read_facts(words)


def test_global_normalization_turns_per_token_loss_on():
    args = Namespace(calculate_per_token_loss=False)
    assert not require_per_token_loss(args, InfoEntropyConfig())
    assert not args.calculate_per_token_loss
    assert require_per_token_loss(args, InfoEntropyConfig(normalization="global"))
    assert args.calculate_per_token_loss


HEADS_FIRST = ["--mtp-num-layers=1", "--pipeline-model-parallel-layout=Et|t|m|L"]
COPY = ["--infoentropy-objective=custom", "--infoentropy-weighting=copy:copy"]


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (1, COPY, "must return a tensor of shape"),  # it gives back what it is given
        (2, [*HEADS_FIRST, "--pipeline-model-parallel-size=2"], "on the first pipeline rank"),
    ],
)
def test_the_trainer_refuses_before_anything_is_built(tmp_path, ranks, flags, message):
    with pytest.raises(AssertionError, match=message):
        run_trainer(ranks, pretrain.prepare, (), [*TINY_TRAINING, *flags], tmp_path)


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
    rising = {"gamma_schedule": "linear", "gamma_end": 2.0, "gamma_samples": 9}
    for now, said in (
        ({}, "Megatron's own cross entropy"),
        ({"gamma": 0.0}, None),
        ({"objective": "cross_entropy", "label_smoothing": 0.1}, "label_smoothing=0.0 and this"),
        ({"gamma": 0.0, **rising}, "gamma_schedule=linear"),
    ):
        difference = other_objective(Namespace(), InfoEntropyConfig(**now))
        assert (difference is None) if said is None else (said in difference)


def test_an_earlier_version_had_the_defaults_of_new_fields_and_other_limits():
    earlier = saved_by(InfoEntropyConfig(), without=("blend", "z_loss"))
    assert other_objective(earlier, InfoEntropyConfig()) is None
    assert "blend=0.0" in other_objective(earlier, InfoEntropyConfig(blend=0.5))
    earlier.infoentropy_ignore_target = None  # which was none
    assert other_objective(earlier, InfoEntropyConfig()) is None
    earlier.infoentropy_gamma_end = 0.5
    said = other_objective(earlier, InfoEntropyConfig())
    assert said.startswith("the checkpoint was trained with settings that are refused now: gamma_e")


def test_the_trainer_says_it_before_the_first_step(tmp_path):
    places = [f"--save={tmp_path}/checkpoints", f"--load={tmp_path}/checkpoints"]
    flags = [*TINY_TRAINING, *places, "--save-interval=2", "--ckpt-format=torch_dist"]
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
    flags = [*TINY_TRAINING, "--use-rope-scaling", "--rope-scaling-factor=32"]
    save = [f"--save={tmp_path}/theirs", "--save-interval=1", "--ckpt-format=torch_dist"]
    run_trainer(1, train_without_saying_the_factor, (), [*flags, *save], tmp_path)
    with pytest.raises(AssertionError, match="its trainer does not say that it obeyed"):
        run_trainer(1, plain_run.main, (), [*flags, f"{flag}={tmp_path}/theirs"], tmp_path)


@pytest.mark.parametrize(
    ("said", "ours", "obeyed", "is_refused"),
    [
        *((32.0, 8.0, False, False), (8.0, 32.0, False, False), (32.0, 16.0, True, False)),
        (32.0, 32.0, False, True),
    ],
)
def test_a_rotary_scaling_that_a_trainer_may_have_ignored_is_refused(
    said, ours, obeyed, is_refused
):
    saved = Namespace(use_rope_scaling=True, rope_scaling_factor=said)
    if obeyed:
        saved.infoentropy_rope_scaling_factor = said
    args = Namespace(rope_scaling_factor=ours)
    if is_refused:
        with pytest.raises(ValueError, match="go on with --rope-scaling-factor 8, or"):
            check_rope_scaling(saved, args)
        saved.use_rope_scaling = False
    check_rope_scaling(saved, args)
    check_rope_scaling(None, args)
