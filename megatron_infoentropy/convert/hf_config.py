"""config.json of every family: written for transformers 4 and 5, and read back.

`_FIELDS` says which field holds which property, `_CONSTANTS` what else must be so for the family to
compute what Megatron computes. Both directions use the same tables; the tests have others.
"""

import math
from pathlib import Path
from typing import Any, get_type_hints

import torch

from megatron_infoentropy.convert.architecture import (
    ACTIVATIONS,
    CLASSES,
    Activation,
    Architecture,
    Family,
    activation_named,
)
from megatron_infoentropy.convert.errors import ConversionError

_COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
}
_LLAMA_FIELDS = {
    **_COMMON_FIELDS,
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
}
_FIELDS: dict[str, dict[str, str]] = {  # by config.json's model_type
    "llama": {**_LLAMA_FIELDS, "attention_bias": "qkv_bias", "mlp_bias": "add_bias_linear"},
    "mistral": _LLAMA_FIELDS,
    "qwen2": _LLAMA_FIELDS,
    "qwen3": {**_LLAMA_FIELDS, "attention_bias": "qkv_bias"},
    "mixtral": {
        **_LLAMA_FIELDS,
        "intermediate_size": "moe_ffn_hidden_size",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
    },
    "qwen3_moe": {
        **_LLAMA_FIELDS,
        "attention_bias": "qkv_bias",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "num_experts": "num_experts",
        "num_experts_per_tok": "moe_router_topk",
        "norm_topk_prob": "norm_topk_prob",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
    },
    "gpt_neox": {
        **_COMMON_FIELDS,
        "layer_norm_eps": "layernorm_epsilon",
        "hidden_dropout": "hidden_dropout",
    },
    "gpt2": {
        "vocab_size": "vocab_size",
        "n_embd": "hidden_size",
        "n_inner": "ffn_hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "initializer_range": "init_method_std",
        "layer_norm_epsilon": "layernorm_epsilon",
        "attn_pdrop": "attention_dropout",
        # Megatron has one number for both: of two fields the later is read.
        "embd_pdrop": "hidden_dropout",
        "resid_pdrop": "hidden_dropout",
    },
}
_FULL_ATTENTION = {"use_sliding_window": False}
_CONSTANTS: dict[Family, dict[str, Any]] = {
    "llama": {},
    "qwen2": _FULL_ATTENTION,
    "qwen3": _FULL_ATTENTION,
    "mixtral": {},
    "qwen3_moe": {**_FULL_ATTENTION, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gpt_neox": {"use_parallel_residual": False, "attention_bias": True},
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
}
# Model types that compute, under the same names, what a family does.
_TWINS: dict[str, Family] = {"mistral": "llama"}
_WINDOWED = ("mistral", "mixtral")  # they say sliding_window: null for none
_GELU_FAMILIES: tuple[Family, ...] = ("gpt_neox", "gpt2")
LLAMA_3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's --use-rope-scaling has built in."""
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor")


def hf_config(model: Architecture, dtype: torch.dtype, ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json; `ids` are those of special tokens, as far as they are known."""
    return {
        "architectures": [CLASSES[model.family]],
        "model_type": model.family,
        **{field: getattr(model, name) for field, name in _FIELDS[model.family].items()},
        **_CONSTANTS[model.family],
        _activation_field(model.family): ACTIVATIONS[model.activation][0],
        # llama.cpp reads n_ctx, as in GPT-2's own config.json.
        **({"n_ctx": model.max_position_embeddings} if model.family == "gpt2" else _rope(model)),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "torch_dtype": name_of(dtype),
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **ids},
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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

    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # wrong types end in errors of every kind
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConversionError(
            f"{folder / 'config.json'} is no configuration that transformers can read: {said}"
        ) from error


def architecture_from_config(config: Any) -> Architecture:
    """Return what Megatron needs to be told to compute what transformers computes.

    Args:
        config: a configuration as transformers loaded it.
    """
    kind = config.model_type
    if kind not in _FIELDS:
        raise ConversionError(
            f"expected a model of {', '.join(CLASSES.values())}, or Mistral without a sliding "
            f"window; got model_type={kind!r}"
        )
    family: Family = _TWINS.get(kind, kind)
    rope = {} if family == "gpt2" else dict(config.rope_parameters)
    values = _values(config, family)
    problems = [*_size_problems(config, values), *_rope_problems(family, rope)]
    if problems := problems + _problems(config, family):
        raise ConversionError(
            f"Megatron's GPTModel cannot compute this {kind} model: {'; '.join(problems)}"
        )
    values.setdefault("add_bias_linear", family in _GELU_FAMILIES)
    values.setdefault("qkv_bias", values["add_bias_linear"] or family == "qwen2")
    values.setdefault("hidden_dropout", 0.0)
    return Architecture(
        family=family,
        **values,
        rotary_base=float(rope.get("rope_theta", 10000.0)),
        rotary_percent=float(rope.get("partial_rotary_factor", 1.0)),
        rope_scaling_factor=rope.get("factor") if rope.get("rope_type") == "llama3" else None,
        padded_vocab_size=config.vocab_size,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        rotary_interleaved=False,
        layernorm_zero_centered_gamma=False,
    )


def _values(config: Any, family: Family) -> dict[str, Any]:
    """Return {property: its value in the configuration}, absent ones as transformers has them."""
    values: dict[str, Any] = {
        name: getattr(config, field, None) for field, name in _FIELDS[config.model_type].items()
    }
    values["activation"] = activation_named(getattr(config, _activation_field(family)))
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if family == "gpt2" and values["ffn_hidden_size"] is None:
        values["ffn_hidden_size"] = 4 * hidden
    if values.get("kv_channels") is None:
        values["kv_channels"] = hidden // heads if heads else 0
    values.setdefault("num_query_groups", heads)
    if "moe_ffn_hidden_size" in values:
        values.setdefault("ffn_hidden_size", values["moe_ffn_hidden_size"])
    return values


def _size_problems(config: Any, values: dict[str, Any]) -> list[str]:
    """Look at what transformers lets through: sizes below 1, numbers below 0, NaN and infinity."""
    kinds = get_type_hints(Architecture)
    problems = [
        f"{field}={getattr(config, field, None)!r} (expected {_expected(kinds[name])})"
        for field, name in _FIELDS[config.model_type].items()
        if not _is_valid(values[name], kinds[name])
    ]
    if not problems and values["num_attention_heads"] % values["num_query_groups"]:
        problems.append(
            f"num_key_value_heads={values['num_query_groups']} (expected a divisor of "
            f"num_attention_heads={values['num_attention_heads']})"
        )
    if not problems and "num_experts" in values:
        normalised, most = values.get("norm_topk_prob", True), values["num_experts"]
        if not 1 + normalised <= values["moe_router_topk"] <= most:
            problems.append(
                f"num_experts_per_tok={values['moe_router_topk']} (expected at most {most}, and "
                "from 2 on where their shares are made to sum to 1: Megatron refuses a single one)"
            )
    return problems


def _is_valid(value: object, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and value >= 1
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _expected(kind: type) -> str:
    return {int: "a whole number from 1 on", bool: "true or false"}.get(kind, "a number from 0 on")


def _rope_problems(family: Family, rope: dict[str, Any]) -> list[str]:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        return [f"rope_type={kind!r} (expected 'default' or 'llama3')"]
    problems = []
    if kind == "llama3":
        changed = {k: rope.get(k) for k, v in LLAMA_3_SCALING.items() if rope.get(k) != v}
        if changed or family == "gpt_neox":
            problems.append(f"rope scaling with {changed} (Megatron has {LLAMA_3_SCALING})")
        if not _is_valid(rope.get("factor"), float):
            problems.append(f"factor={rope.get('factor')!r} (expected a number)")
    known = {*_ROPE_KEYS, *LLAMA_3_SCALING}
    if unknown := [key for key in rope if key not in known]:
        problems.append(f"rope_parameters has {', '.join(map(repr, unknown))}")
    base, share = rope.get("rope_theta", 10000), rope.get("partial_rotary_factor", 1.0)
    if not (_is_valid(base, float) and base >= 1 and float(base).is_integer()):
        problems.append(f"rope_theta={base!r} (Megatron's --rotary-base is a whole number)")
    if not (_is_valid(share, float) and 0 < share <= 1):
        problems.append(f"partial_rotary_factor={share!r} (expected a number up to 1)")
    elif family != "gpt_neox" and share != 1:
        problems.append("partial_rotary_factor, which this family ignores")
    return problems


def _problems(config: Any, family: Family) -> list[str]:
    expected = dict(_CONSTANTS[family])
    if family in ("qwen3", "qwen3_moe") or getattr(config, "mlp_bias", False):
        expected |= {"attention_bias": family == "llama"}
    problems = [
        f"{name}={getattr(config, name, None)!r} (expected {value!r})"
        for name, value in expected.items()
        if getattr(config, name, value) != value
    ]
    window = config.sliding_window if config.model_type in _WINDOWED else None
    if window is not None and window < (positions := config.max_position_embeddings):
        problems.append(
            f"sliding_window={window} (expected null, or at least max_position_embeddings="
            f"{positions})"
        )
    if getattr(config, "quantization_config", None):
        problems.append("quantization_config: its weights are quantised")
    field = _activation_field(family)
    kinds = _activations(family)
    if activation_named(name := getattr(config, field)) not in kinds:
        names = [name for kind in kinds for name in ACTIVATIONS[kind]]
        problems.append(f"{field}={name!r} (expected {' or '.join(names)})")
    return problems


def _activation_field(family: Family) -> str:
    return "activation_function" if family == "gpt2" else "hidden_act"


def _activations(family: Family) -> tuple[Activation, ...]:
    return ("gelu", "gelu_tanh") if family in _GELU_FAMILIES else ("silu_gated",)
