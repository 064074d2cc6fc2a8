"""config.json of every family: written for transformers 4 and 5, and read back.

`_FIELDS` says which field holds which property, `_CONSTANTS` what else must be so for the family to
compute what Megatron computes. Both directions use the same tables; `config_check` does not.
"""

from pathlib import Path
from typing import Any

import torch

from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.errors import UnsupportedModelError
from megatron_infoentropy.convert.families import CLASSES, Family

_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_groups",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
    "initializer_range": "initializer_range",
    "rms_norm_eps": "norm_epsilon",
}
_FIELDS: dict[Family, dict[str, str]] = {
    "llama": {**_LLAMA_FIELDS, "attention_bias": "qkv_bias", "mlp_bias": "linear_bias"},
    "qwen2": _LLAMA_FIELDS,
    "qwen3": {**_LLAMA_FIELDS, "attention_bias": "qkv_bias"},
    "gpt_neox": {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_positions",
        "initializer_range": "initializer_range",
        "layer_norm_eps": "norm_epsilon",
    },
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_embd": "hidden_size",
        "n_inner": "ffn_hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_positions": "max_positions",
        "initializer_range": "initializer_range",
        "layer_norm_epsilon": "norm_epsilon",
    },
}
_FULL_ATTENTION = {"use_sliding_window": False}
_CONSTANTS: dict[Family, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_dropout": 0.0},
    "qwen2": {"hidden_act": "silu", "attention_dropout": 0.0, **_FULL_ATTENTION},
    "qwen3": {"hidden_act": "silu", "attention_dropout": 0.0, **_FULL_ATTENTION},
    "gpt_neox": {
        "use_parallel_residual": False,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}
_ACTIVATION_FIELD = {"gpt_neox": "hidden_act", "gpt2": "activation_function"}
_GELU = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_TANH_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # of transformers, one function
LLAMA_3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's --use-rope-scaling has built in."""


def hf_config(model: Architecture, dtype: torch.dtype, ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json; `ids` are those of special tokens, as far as they are known."""
    activation = _ACTIVATION_FIELD.get(model.family)
    return {
        "architectures": [CLASSES[model.family]],
        "model_type": model.family,
        **{field: getattr(model, name) for field, name in _FIELDS[model.family].items()},
        **_CONSTANTS[model.family],
        **({activation: _GELU[model.activation]} if activation else {}),
        # llama.cpp reads n_ctx, as in GPT-2's own config.json.
        **({"n_ctx": model.max_positions} if model.family == "gpt2" else _rope(model)),
        "tie_word_embeddings": not model.untied,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **ids},
    }


def _rope(model: Architecture) -> dict[str, Any]:
    """transformers 5 reads rope_parameters; 4 ignores it and would take its default of 10000."""
    parameters: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling_factor is not None:
        parameters = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            **LLAMA_3_SCALING,
        }
    both = {"rope_parameters": {**parameters, "rope_theta": model.rotary_base}}
    if model.family == "gpt_neox":
        both["rope_parameters"]["partial_rotary_factor"] = model.rotary_percent
        return {**both, "rotary_pct": model.rotary_percent, "rotary_emb_base": model.rotary_base}
    scaling = {} if model.rope_scaling_factor is None else {"rope_scaling": parameters}
    return {**both, **scaling, "rope_theta": model.rotary_base}


def read_config(folder: Path) -> Any:
    """Return config.json as transformers understands it; no code of the folder is run."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def architecture_from_config(config: Any) -> Architecture:
    """Return what Megatron needs to be told to compute what transformers computes.

    Args:
        config: a configuration as transformers loaded it.

    Raises:
        UnsupportedModelError: naming every field that Megatron has no counterpart for.
    """
    family = config.model_type
    if family not in _FIELDS:
        raise UnsupportedModelError(
            f"expected a model of {', '.join(CLASSES.values())}, got model_type={family!r}"
        )
    rope = {} if family == "gpt2" else dict(config.rope_parameters)
    if problems := _problems(config, family, rope):
        raise UnsupportedModelError(
            f"Megatron's GPTModel cannot compute this {CLASSES[family]}: {'; '.join(problems)}"
        )
    values: dict[str, Any] = {
        name: getattr(config, field, None) for field, name in _FIELDS[family].items()
    }
    heads = values["num_heads"]
    if family == "gpt2" and values["ffn_hidden_size"] is None:
        values["ffn_hidden_size"] = 4 * values["hidden_size"]
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
    values.setdefault("num_groups", heads)
    values.setdefault("linear_bias", family in ("gpt_neox", "gpt2"))
    values.setdefault("qkv_bias", values["linear_bias"] or family == "qwen2")
    return Architecture(
        family=family,
        **values,
        activation=_activation(config, family),
        rotary_base=float(rope.get("rope_theta", 10000.0)),
        rotary_percent=float(rope.get("partial_rotary_factor", 1.0)),
        rope_scaling_factor=rope.get("factor"),
        padded_vocab_size=config.vocab_size,
        untied=not config.tie_word_embeddings,
        interleaved_rotary=False,
        zero_centered_norms=False,
    )


def _problems(config: Any, family: Family, rope: dict[str, Any]) -> list[str]:
    dropouts = ("dropout", "pdrop")  # change nothing that a trained model computes
    expected = {k: v for k, v in _CONSTANTS[family].items() if not k.endswith(dropouts)}
    if family == "qwen3" or (family == "llama" and config.mlp_bias):
        expected |= {"attention_bias": family == "llama"}
    problems = [
        f"{name}={getattr(config, name, None)!r} (expected {value!r})"
        for name, value in expected.items()
        if getattr(config, name, value) != value
    ]
    if getattr(config, "quantization_config", None):
        problems.append("quantization_config: its weights are quantised")
    field = _ACTIVATION_FIELD.get(family)
    if field and getattr(config, field) not in ("gelu", *_TANH_NAMES):
        problems.append(f"{field}={getattr(config, field)!r} (expected a form of gelu)")
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        changed = {k: rope.get(k) for k, v in LLAMA_3_SCALING.items() if rope.get(k) != v}
        if changed or family == "gpt_neox":
            problems.append(f"rope scaling with {changed} (Megatron has {LLAMA_3_SCALING})")
    elif kind != "default":
        problems.append(f"rope_type={kind!r} (expected 'default' or 'llama3')")
    if not float(base := rope.get("rope_theta", 10000)).is_integer():
        problems.append(f"rope_theta={base} (Megatron's --rotary-base is a whole number)")
    if family != "gpt_neox" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor, which this family ignores")
    return problems


def _activation(config: Any, family: Family) -> Any:
    field = _ACTIVATION_FIELD.get(family)
    if field is None:
        return "silu_gated"
    return "gelu" if getattr(config, field) == "gelu" else "gelu_tanh"
