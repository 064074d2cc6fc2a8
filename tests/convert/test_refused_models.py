"""Models no Hugging Face family can compute: refused by name, before anything is written."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import (
    FAMILIES,
    hybrid_twin,
    tiny_args,
    tiny_tensors,
    unstacked,
    write_checkpoint,
    write_tiny,
)
from torch import Tensor

from megatron_infoentropy.commands.training import next_step
from megatron_infoentropy.convert import ConversionError, convert_checkpoint

LAYERS = "decoder.layers."
FC2 = LAYERS + "mlp.linear_fc2.weight"
OF_EXPERTS: dict[str, Any] = {
    "moe_layer_freq": [1, 0],
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
# Of which model, the argument with another value, and what else is said than the argument's name.
ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"normalization": "LayerNorm"}, ""),
    ("llama", {"swiglu": False}, ""),
    ("llama", {"position_embedding_type": "learned_absolute"}, ""),
    ("llama", {"rotary_percent": 0.5}, ""),
    ("llama", {"rope_type": "yarn"}, ""),
    ("llama", {"rotary_seq_len_interpolation_factor": 4}, ""),
    ("llama", {"no_rope_freq": 4}, ""),
    ("llama", {"multi_latent_attention": True}, ""),
    ("llama", {"window_size": (128, 0)}, ""),
    ("llama", {"softmax_type": "learnable"}, ""),
    ("llama", {"attention_output_gate": True}, ""),
    ("llama", {"apply_residual_connection_post_layernorm": True}, ""),
    ("llama", {"mtp_num_layers": 1}, ""),
    ("llama", {"use_mup": True}, ""),
    ("llama", {"spec": ["some.module", "spec"]}, ""),
    ("llama", {"softmax_scale": 0.1}, ""),
    ("llama", {"squared_relu": True}, ""),
    ("llama", {"infoentropy_softcap": 30.0}, ""),
    ("llama", {"infoentropy_temperature": 2.0}, ""),
    ("llama", {"normalization": None}, ""),
    ("llama", {"num_attention_heads": 6, "kv_channels": 4}, "does not divide"),
    ("llama", {"rotary_percent": 0.5, "window_size": (8, 0)}, "--rotary-percent.*--window-size"),
    ("mixtral", {"add_bias_linear": True}, ""),
    ("mixtral", {"add_qkv_bias": True}, ""),
    ("mixtral", {"normalization": "LayerNorm"}, ""),
    ("mixtral", {"moe_router_pre_softmax": True}, ""),
    *(("mixtral", {name: value}, "") for name, value in OF_EXPERTS.items()),
    ("qwen3", {"add_qkv_bias": True}, "add_qkv_bias|qk_layernorm"),
    ("qwen2", {"add_bias_linear": True, "qk_layernorm": True}, "qk_layernorm"),
    ("gpt_neox", {"kv_channels": 16}, "--kv-channels"),
    ("gpt_neox", {"add_bias_linear": False}, ""),
    ("gpt_neox", {"group_query_attention": True}, ""),
    ("gpt_neox", {"use_rope_scaling": True}, ""),
    ("gpt2", {"normalization": "RMSNorm"}, ""),
    ("gpt2", {"position_embedding_type": "none"}, ""),
    ("hybrid", {"rotary_interleaved": True}, "--rotary-interleaved"),
    ("hybrid", {"use_rope_scaling": True}, "--use-rope-scaling"),
    ("hybrid", {"mtp_num_layers": 1}, "--mtp-num-layers"),
    ("hybrid", {"num_experts": 4}, "--num-experts"),
    ("hybrid", {"spec": ["some.module", "hybrid_stack_spec"]}, "--spec"),
    *(
        (
            "hybrid",
            {"hybrid_layer_pattern": pattern},
            re.escape(f"{pattern!r} (flag --hybrid-layer-pattern)") + f".*{said}",
        )
        for pattern, said in {
            "M*-*-*": "layer 0 is Mamba, expected attention",
            "*-*-M-": "layer 4 is Mamba, expected attention",
            "*E*E*E": "layer 1 is experts, expected an MLP",
            "G-*-*-": "layer 0 is a gated delta net, expected attention",
            "*-+-D-": "layer 2 is latent attention, expected attention",
            "*--*-*": "layer 2 is an MLP, expected attention",
            "**-*--": "layer 1 is attention, expected an MLP",
            "-*-*-*": "layer 0 is an MLP, expected attention",
            "*-*|-*": "behind its 5 layers an MLP is missing",
            "": "behind its 0 layers an MLP is missing",
            "*-?-*-": r"layer 2 is unknown \('\?'\), expected attention",
            "*-*-*-/*-": "has multi-token-prediction heads behind /",
        }.items()
    ),
]


def model(family: str) -> tuple[Namespace, dict[str, Tensor]]:
    """Arguments and parameters of a family's model, or of a hybrid of three layers."""
    if family != "hybrid":
        args = tiny_args(**FAMILIES[family])
        return args, tiny_tensors(args)
    args = tiny_args(num_layers=3)
    return hybrid_twin(args, tiny_tensors(args))


def refuse(folder: Path, args: Namespace, tensors: dict[str, Tensor], match: str) -> None:
    write_checkpoint(folder / "save", args, tensors)
    with pytest.raises(ConversionError, match=match):
        convert_checkpoint(folder / "save", folder / "hf")
    assert [path.name for path in folder.iterdir()] == ["save"], "nothing may be written"


@pytest.mark.parametrize(("family", "changes", "match"), ARGUMENTS)
def test_arguments_that_mean_another_model_are_named(
    tmp_path: Path, family: str, changes: dict[str, Any], match: str
) -> None:
    args, tensors = model(family)
    refuse(tmp_path, Namespace(**vars(args) | changes), tensors, match or next(iter(changes)))


def test_an_argument_that_must_be_there_is_named(tmp_path: Path) -> None:
    args, tensors = model("llama")
    del args.normalization
    refuse(tmp_path, args, tensors, "normalization was not saved")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "next: infoentropy convert"),
        (FAMILIES["mixtral"], "next: infoentropy convert"),
        (OF_EXPERTS, "next: infoentropy convert"),  # which a dense model ignores
        (FAMILIES["mixtral"] | {"moe_latent_size": 8}, "no export to Hugging Face: .*latent"),
    ],
)
def test_the_step_after_training_is_named_only_where_it_can_be_taken(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_tiny(tmp_path / "checkpoints", **changes)
    assert re.match(said, next_step(tmp_path, tmp_path / "tokenizer"))


@pytest.mark.parametrize(
    ("family", "name", "tensor", "match"),
    [
        ("llama", LAYERS + "self_attention.linear_qkv.bias", torch.zeros(2), ""),
        ("llama", LAYERS + "self_attention.linear_qkv.weight_scale_inv", torch.zeros(2), ""),
        ("llama", LAYERS + "self_attention.q_layernorm.weight", torch.zeros(2), ""),
        ("llama", LAYERS + "0.mlp.experts.linear_fc1.weight", torch.zeros(2), ""),
        ("llama", LAYERS + "2.mlp.linear_fc1.weight", torch.zeros(2), ""),
        (
            "llama",
            LAYERS + "input_layernorm.weight",
            torch.zeros(2, 32),
            r"more than one .*layers\.0\.input_",
        ),
        ("llama", "decoder.final_norm.weight", torch.zeros(2), ""),
        ("llama", "embedding.position_embeddings.weight", torch.zeros(2), ""),
        ("llama", "mtp.layers.0.eh_proj.weight", torch.zeros(2), ""),
        ("gpt2", "output_layer.weight", torch.zeros(64, 32), ""),
        ("llama", FC2, None, r"lacks .* model\.layers\.0\.mlp\.down_proj\.weight"),
        *(
            ("llama", FC2, torch.zeros(2, 32, 48).to(dtype), rf"{FC2} in {dtype}")
            for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
        ),
        ("hybrid", LAYERS + "1.self_attention.linear_proj.weight", torch.zeros(2), ""),
        ("hybrid", LAYERS + "6.self_attention.linear_proj.weight", torch.zeros(2), ""),
        ("hybrid", FC2, torch.zeros(2), ""),
        ("hybrid", "decoder.final_layernorm.weight", torch.zeros(2), ""),
        ("hybrid", LAYERS + "0.mixer.in_proj.weight", torch.zeros(2), ""),
        ("hybrid", LAYERS + "3.mlp.linear_fc2.weight", None, r"lacks .*layers\.1\.mlp\.down_proj"),
    ],
)
def test_parameters_of_another_model_are_named(
    tmp_path: Path, family: str, name: str, tensor: Tensor | None, match: str
) -> None:
    args, tensors = model(family)
    changed = {n: t for n, t in (tensors | {name: tensor}).items() if t is not None}
    refuse(tmp_path, args, changed, match or f"no counterpart for .*{name}")


def test_a_layer_more_than_the_arguments_say_is_named(tmp_path: Path) -> None:
    deeper = unstacked(tiny_tensors(tiny_args(num_layers=3)))
    refuse(tmp_path, tiny_args(), deeper, r"no counterpart for decoder\.layers\.2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 65}, "at most 64 tokens"),
        ({"num_layers": 3}, r"\[3, .*got \[2, "),
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
