"""config.json against the saved training arguments, field by field: what no logit shows too.

It shares with `hf_config` no table but that of the names of equal activations.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_infoentropy.convert.architecture import ACTIVATIONS, activation_named
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.hf_config import read_config
from megatron_infoentropy.convert.reference_model import has_tanh_gelu

_LLAMA_3 = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
_MISSING = "missing"


def config_differences(checkpoint: Path, folder: Path) -> list[str]:
    """Compare a folder's configuration, as transformers loads it, with the training arguments.

    Returns one line for every field that differs, between transformers 4 and 5 too.
    """
    config, args = read_config(folder), MegatronCheckpoint(checkpoint).args
    expected = {
        "num_hidden_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "max_position_embeddings": args.max_position_embeddings,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        **(_rms_fields(args, config) if args.normalization == "RMSNorm" else _gelu_fields(args)),
    }
    actual = {name: _effective(config, name) for name in expected}
    if args.position_embedding_type == "rope":
        for name, value in _rope_fields(args).items():
            expected[name], actual[name] = value, config.rope_parameters.get(name, _MISSING)
    if args.vocab_size is not None:
        expected["vocab_size"], actual["vocab_size"] = args.vocab_size, config.vocab_size
    lines = [
        f"{name} is {actual[name]!r}, expected {value!r}"
        for name, value in expected.items()
        if actual[name] != value
    ]
    return lines + _file_differences(folder)


def _file_differences(folder: Path) -> list[str]:
    """Compare what transformers 4 reads of config.json with what transformers 5 does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" not in config:
        return []
    rope = config["rope_parameters"]
    old = config.get("rope_theta", config.get("rotary_emb_base", _MISSING))
    pairs = {"rope_theta": (old, rope["rope_theta"])}
    if "rotary_pct" in config:
        pairs["rotary_pct"] = (config["rotary_pct"], rope.get("partial_rotary_factor"))
    if rope["rope_type"] != "default":
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        pairs["rope_scaling"] = (config.get("rope_scaling", _MISSING), scaling)
    return [
        f"{name} is {four!r} for transformers 4, {five!r} for 5"
        for name, (four, five) in pairs.items()
        if four != five
    ]


def _effective(config: Any, name: str) -> Any:
    """Return what transformers computes with: absent fields follow from others, names are one."""
    value = getattr(config, name, None)
    if name in ("hidden_act", "activation_function"):
        kind = activation_named(value)
        return value if kind is None else ACTIVATIONS[kind][0]
    if name == "sliding_window" and value is not None and value >= config.max_position_embeddings:
        return None
    if value is None and name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    if value is None and name == "n_inner":
        return 4 * config.hidden_size
    return value


def _rms_fields(args: Namespace, config: Any) -> dict[str, Any]:
    grouped = args.group_query_attention
    biased = args.add_bias_linear
    qkv_biased = biased or getattr(args, "add_qkv_bias", False)
    fields = {
        "intermediate_size": args.ffn_hidden_size,
        "num_key_value_heads": args.num_query_groups if grouped else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "rms_norm_eps": args.layernorm_epsilon,
        "hidden_act": "silu",
    }
    if getattr(args, "num_experts", None) is not None:
        return fields | _expert_fields(args)
    if getattr(args, "qk_layernorm", False):
        return fields | {"model_type": "qwen3", "attention_bias": False, "sliding_window": None}
    if qkv_biased and not biased and config.model_type != "llama":
        return fields | {"model_type": "qwen2", "sliding_window": None}
    if not qkv_biased and config.model_type == "mistral":
        return fields | {"model_type": "mistral", "sliding_window": None}
    return fields | {"model_type": "llama", "attention_bias": qkv_biased, "mlp_bias": biased}


def _expert_fields(args: Namespace) -> dict[str, Any]:
    fields = {"num_experts_per_tok": args.moe_router_topk, "sliding_window": None}
    if not getattr(args, "qk_layernorm", False):
        return fields | {
            "model_type": "mixtral",
            "num_local_experts": args.num_experts,
            "intermediate_size": args.moe_ffn_hidden_size,
        }
    return fields | {
        "model_type": "qwen3_moe",
        "num_experts": args.num_experts,
        "moe_intermediate_size": args.moe_ffn_hidden_size,
        "norm_topk_prob": not args.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }


def _gelu_fields(args: Namespace) -> dict[str, Any]:
    fused = has_tanh_gelu(args)
    activation = "gelu_pytorch_tanh" if fused else "gelu"
    if args.position_embedding_type == "rope":
        return {
            "model_type": "gpt_neox",
            "intermediate_size": args.ffn_hidden_size,
            "layer_norm_eps": args.layernorm_epsilon,
            "hidden_act": activation,
            "use_parallel_residual": False,
            "attention_bias": True,
        }
    return {
        "model_type": "gpt2",
        "n_inner": args.ffn_hidden_size,
        "layer_norm_epsilon": args.layernorm_epsilon,
        "activation_function": activation,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }


def _rope_fields(args: Namespace) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if args.normalization != "RMSNorm":
        fields["partial_rotary_factor"] = args.rotary_percent
    if getattr(args, "use_rope_scaling", False):
        fields |= {"rope_type": "llama3", "factor": args.rope_scaling_factor, **_LLAMA_3}
    return fields
