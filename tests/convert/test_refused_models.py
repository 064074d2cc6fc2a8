"""Models no Hugging Face family can compute: refused by name, before anything is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import (
    FAMILIES,
    tiny_args,
    tiny_tensors,
    unstacked,
    write_checkpoint,
    write_tiny,
)
from torch import Tensor

from megatron_infoentropy.commands.training import next_step
from megatron_infoentropy.convert import (
    ConversionError,
    convert_checkpoint,
)

LAYERS = "decoder.layers."
ARGUMENTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 0.5,
    "rope_type": "yarn",
    "rotary_seq_len_interpolation_factor": 4,
    "no_rope_freq": 4,
    "multi_latent_attention": True,
    "window_size": (128, 0),
    "softmax_type": "learnable",
    "attention_output_gate": True,
    "apply_residual_connection_post_layernorm": True,
    "mtp_num_layers": 1,
    "use_mup": True,
    "spec": ["some.module", "spec"],
    "softmax_scale": 0.1,
    "squared_relu": True,
    "infoentropy_softcap": 30.0,
    "infoentropy_temperature": 2.0,
}

OF_EXPERTS: dict[str, Any] = {
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "normalization": "LayerNorm",
    "moe_layer_freq": [1, 0],
    "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 16,
    "moe_expert_capacity_factor": 1.0,
    "moe_input_jitter_eps": 0.1,
    "moe_latent_size": 8,
}


def refuse(
    folder: Path,
    args: Any,
    tensors: dict[str, Tensor],
    match: str,
) -> None:
    write_checkpoint(folder / "save", args, tensors)
    with pytest.raises(ConversionError, match=match):
        convert_checkpoint(folder / "save", folder / "hf")
    assert [path.name for path in folder.iterdir()] == ["save"], "nothing may be written"


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        *(("llama", *argument) for argument in ARGUMENTS.items()),
        *(("mixtral", *argument) for argument in OF_EXPERTS.items()),
    ],
)
def test_an_argument_that_means_another_model_is_named(
    tmp_path: Path, family: str, name: str, value: object
) -> None:
    changes = FAMILIES[family]
    refuse(tmp_path, tiny_args(**changes | {name: value}), tiny_tensors(tiny_args(**changes)), name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "next: infoentropy convert"),
        (FAMILIES["mixtral"], "next: infoentropy convert"),
        (FAMILIES["mixtral"] | {"moe_latent_size": 8}, "no export to Hugging Face: .*latent"),
    ],
)
def test_the_step_after_training_is_named_only_where_it_can_be_taken(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_tiny(tmp_path / "checkpoints", **changes)
    assert re.match(said, next_step(tmp_path, tmp_path / "tokenizer"))


def test_a_dense_model_ignores_what_is_said_of_experts(tmp_path: Path) -> None:
    write_tiny(
        tmp_path / "save",
        **{name: OF_EXPERTS[name] for name in OF_EXPERTS if name.startswith("moe")},
    )
    assert convert_checkpoint(tmp_path / "save", tmp_path / "hf").family == "llama"


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("qwen3", {"add_qkv_bias": True}, "add_qkv_bias|qk_layernorm"),
        ("qwen2", {"add_bias_linear": True, "qk_layernorm": True}, "qk_layernorm"),
        ("gpt_neox", {"kv_channels": 16}, "--kv-channels"),
        ("gpt_neox", {"add_bias_linear": False}, "add_bias_linear"),
        ("gpt_neox", {"group_query_attention": True}, "group_query_attention"),
        ("gpt_neox", {"use_rope_scaling": True}, "use_rope_scaling"),
        ("gpt2", {"normalization": "RMSNorm"}, "normalization"),
        ("gpt2", {"position_embedding_type": "none"}, "position_embedding_type"),
        ("llama", {"num_attention_heads": 6, "kv_channels": 4}, "does not divide"),
        (  # all of them at once, with their flags
            "llama",
            {"rotary_percent": 0.5, "window_size": (8, 0)},
            "--rotary-percent.*--window-size",
        ),
    ],
)
def test_what_a_family_has_no_field_for_is_named(
    tmp_path: Path, family: str, changes: dict[str, Any], match: str
) -> None:
    args = tiny_args(**FAMILIES[family] | changes)
    refuse(tmp_path, args, tiny_tensors(args), match)


def test_an_argument_that_must_be_there_is_named(tmp_path: Path) -> None:
    args = tiny_args()
    tensors = tiny_tensors(args)
    del args.normalization
    refuse(tmp_path, args, tensors, "normalization was not saved")


@pytest.mark.parametrize(
    "name",
    [
        LAYERS + "self_attention.linear_qkv.bias",
        LAYERS + "self_attention.linear_qkv.weight_scale_inv",  # of a quantised parameter
        LAYERS + "self_attention.q_layernorm.weight",
        LAYERS + "0.mlp.experts.linear_fc1.weight",
        "decoder.final_norm.weight",
        "embedding.position_embeddings.weight",
        "mtp.layers.0.eh_proj.weight",
    ],
)
def test_a_parameter_llama_has_not_is_named(tmp_path: Path, name: str) -> None:
    args = tiny_args()
    refuse(tmp_path, args, tiny_tensors(args) | {name: torch.zeros(2)}, name)


def test_parameters_of_another_model_are_named(tmp_path: Path) -> None:
    args = tiny_args()
    untied, lacking = tiny_tensors(args), tiny_tensors(args)
    del lacking[LAYERS + "mlp.linear_fc2.weight"]
    match = r"lacks.*model\.layers\.0\.mlp\.down_proj\.weight"
    refuse(tmp_path / "lacking", args, lacking, match)
    twice = tiny_tensors(args) | {LAYERS + "input_layernorm.weight": torch.zeros(2, 32)}
    refuse(tmp_path / "twice", args, twice, "input_layernorm")
    deeper = unstacked(tiny_tensors(tiny_args(num_layers=3)))
    refuse(tmp_path / "deeper", args, deeper, r"no counterpart for decoder\.layers\.2")
    tied = tiny_args(untie_embeddings_and_output_weights=False)
    refuse(tmp_path / "tied", tied, untied, r"output_layer\.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 65}, "at most 64 tokens"),
        ({"num_layers": 3}, r"\[3, 64, 32\].*got \[2, 64, 32\]"),
        ({"hidden_size": 40}, "shape"),
        ({"num_query_groups": 4}, "shape"),
    ],
)
def test_arguments_that_do_not_fit_the_parameters_are_an_error_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path / "save", tiny_args(**changes), tiny_tensors(tiny_args()))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["save"]
