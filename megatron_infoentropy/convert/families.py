"""Which Hugging Face families there are, and what training arguments mean each: tables.

A family is a class of transformers. The tables say, for each training argument that changes the
computation, which of its values mean that family. What no family has is refused by name.
"""

import argparse
from collections.abc import Iterator
from typing import Any, Literal

from megatron_infoentropy.convert.errors import UnsupportedModelError

Family = Literal["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_neox", "gpt2"]

ROTARY, LEARNED = "rope", "learned_absolute"
_RMS_SWIGLU: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": (ROTARY,),
    "rotary_percent": (1.0,),
}
_LAYER_NORM_GELU: dict[str, tuple[Any, ...]] = {
    "normalization": ("LayerNorm",),
    "swiglu": (False,),
    "add_bias_linear": (True,),
    "qk_layernorm": (False,),
    "group_query_attention": (False,),
    "use_rope_scaling": (False,),
}
# Arguments that must be there, with the values that mean the family; the first that fits is it.
FAMILIES: dict[Family, dict[str, tuple[Any, ...]]] = {
    "llama": {
        **_RMS_SWIGLU,
        "add_bias_linear": (False,),
        "add_qkv_bias": (False,),
        "qk_layernorm": (False,),
    },
    "qwen2": {
        **_RMS_SWIGLU,
        "add_bias_linear": (False,),
        "add_qkv_bias": (True,),
        "qk_layernorm": (False,),
    },
    "qwen3": {
        **_RMS_SWIGLU,
        "add_bias_linear": (False,),
        "add_qkv_bias": (False,),
        "qk_layernorm": (True,),
    },
    "mixtral": {
        **_RMS_SWIGLU,
        "add_bias_linear": (False,),
        "add_qkv_bias": (False,),
        "qk_layernorm": (False,),
        "moe_router_pre_softmax": (False,),
    },
    "qwen3_moe": {
        **_RMS_SWIGLU,
        "add_bias_linear": (False,),
        "add_qkv_bias": (False,),
        "qk_layernorm": (True,),
        "moe_router_pre_softmax": (False, True),
    },
    "gpt_neox": {**_LAYER_NORM_GELU, "position_embedding_type": (ROTARY,)},
    "gpt2": {**_LAYER_NORM_GELU, "position_embedding_type": (LEARNED,)},
}
CLASSES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
OF_EXPERTS: tuple[Family, ...] = ("mixtral", "qwen3_moe")
# With biases everywhere Llama is exact too: its attention_bias and mlp_bias mean the same four.
_LLAMA_WITH_BIASES = {
    **FAMILIES["llama"],
    "add_bias_linear": (True,),
    "add_qkv_bias": (False, True),
}

# Arguments that some versions lack; where they are there, these values leave the model as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "qk_l2_norm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "openai_gelu": (False,),
    "softmax_scale": (None,),
    "rope_type": (None, "rope"),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "rotary_scaling_factor": (None, 1.0),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": (False,),
    "window_size": (None,),
    "softmax_type": (None, "vanilla"),
    "apply_residual_connection_post_layernorm": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (None, 0.0),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "is_hybrid_model": (False,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
    "spec": (None,),
    "infoentropy_softcap": (0.0,),
    "infoentropy_temperature": (1.0,),
}
# The same of models with experts; a dense model ignores them.
NEUTRAL_FOR_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (1,),
    "moe_router_score_function": ("softmax",),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_token_dropping": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_input_jitter_eps": (None,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
}
_ABSENT_MEANS = {"add_qkv_bias": False, "qk_layernorm": False, "use_rope_scaling": False}
_FLAGS = {"add_bias_linear": "--disable-bias-linear"}  # where it is not named as the argument


def family_of(args: argparse.Namespace) -> Family:
    """Return the family that computes what these training arguments describe.

    Raises:
        UnsupportedModelError: naming every argument that no family has a counterpart for.
    """
    has_experts = getattr(args, "num_experts", None) is not None
    neutral = NEUTRAL | NEUTRAL_FOR_EXPERTS if has_experts else NEUTRAL
    others = list(_deviations(args, neutral, optional=True))
    candidates: list[tuple[Family, dict[str, tuple[Any, ...]]]] = [
        (family, table)
        for family, table in [*FAMILIES.items(), ("llama", _LLAMA_WITH_BIASES)]
        if (family in OF_EXPERTS) == has_experts
    ]
    problems = {
        index: list(_deviations(args, table)) for index, (_, table) in enumerate(candidates)
    }
    nearest = min(problems, key=lambda index: len(problems[index]))
    if others or problems[nearest]:
        classes = dict.fromkeys(CLASSES[family] for family, _ in candidates)
        raise UnsupportedModelError(
            f"{CLASSES[candidates[nearest][0]]}, the nearest of {', '.join(classes)}, "
            f"cannot compute this model: {'; '.join(problems[nearest] + others)}"
        )
    return candidates[nearest][0]


def _deviations(
    args: argparse.Namespace, table: dict[str, tuple[Any, ...]], *, optional: bool = False
) -> Iterator[str]:
    for name, accepted in table.items():
        if not optional and name not in _ABSENT_MEANS and not hasattr(args, name):
            yield f"the argument {name} was not saved (expected {accepted[0]!r})"
            continue
        value = getattr(args, name, accepted[0] if optional else _ABSENT_MEANS.get(name))
        values = value if isinstance(value, list) and value else [value]  # one for each layer
        if any(each not in accepted for each in values):
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            yield f"{name}={value!r} (flag {flag}; expected {accepted[0]!r})"
