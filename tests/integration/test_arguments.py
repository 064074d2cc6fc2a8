"""The flags are the configuration's fields; what cannot go together is refused before anything."""

import argparse
import dataclasses
from types import SimpleNamespace

import pytest
from launch import TINY_MODEL, run_trainer

from megatron_infoentropy import InfoEntropyConfig, pretrain
from megatron_infoentropy.integration.arguments import (
    add_trainer_args,
    check_megatron_args,
    config_from_args,
    require_per_token_loss,
)


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


def test_no_flags_give_the_default_configuration():
    assert config_from_args(parse()) == InfoEntropyConfig()


def test_every_field_can_be_set_by_its_flag():
    given = {
        "objective": "custom",
        "gamma": 2.5,
        "sigma": 0.5,
        "quantile": 0.25,
        "normalization": "global",
        "detach_weight": False,
        "backend": "reference",
        "collective": "all_reduce",
        "gamma_schedule": "cosine",
        "gamma_end": 0.5,
        "gamma_samples": 1000,
        "blend": 0.25,
        "weighting": "package.module:weight",
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
        "entropy_bonus": 0.01,
        "softcap": 30.0,
        "temperature": 0.9,
        "fused_linear": True,
        "chunk_tokens": 512,
        "skip_masked": False,
    }
    assert given.keys() == {field.name for field in dataclasses.fields(InfoEntropyConfig)}
    words = []
    for name, value in given.items():
        flag = f"infoentropy-{name.replace('_', '-')}"
        switch = {True: [f"--{flag}"], False: [f"--no-{flag}"]}
        words += switch[value] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert config_from_args(parse(*words)) == InfoEntropyConfig(**given)


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
        ({"sft": True}, "paper", "--sft is refused"),
        ({"cuda_graph_impl": "full_iteration"}, "paper", "full_iteration is refused"),
        ({"dataloader_inter_document_masking": True}, "paper", "would ignore the flag"),
        ({"hybrid_layer_pattern": "M*M-"}, "paper", "no Mamba layers; use Megatron's own"),
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
