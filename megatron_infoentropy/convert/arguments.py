"""Megatron's training arguments for a model that comes from elsewhere, as flags and as saved."""

from argparse import Namespace
from typing import Any

from megatron_infoentropy.convert.architecture import OBEYED_FACTOR, TOKENS, Architecture
from megatron_infoentropy.convert.families import FAMILIES, LEARNED

_SEQUENCE = 4096
"""Tokens a training sequence, unless the model has fewer positions or the user says otherwise."""


def arguments_of(model: Architecture, tokens: int | None = None) -> Namespace:
    """Return the arguments that describe this model, as a checkpoint of Megatron keeps them.

    tokens: of the model's tokenizer, where that is known; the model may have more rows.
    """
    table = {name: values[0] for name, values in FAMILIES[model.family].items()}
    scaled = model.rope_scaling_factor is not None
    return Namespace(
        **table
        | {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_heads,
            "group_query_attention": model.num_groups != model.num_heads,
            "num_query_groups": model.num_groups,
            "kv_channels": model.head_dim,
            "max_position_embeddings": model.max_positions,
            "seq_length": min(model.max_positions, _SEQUENCE),
            "add_position_embedding": True,
            "rotary_base": int(model.rotary_base),
            "rotary_percent": model.rotary_percent,
            "rotary_interleaved": model.interleaved_rotary,
            "use_rope_scaling": scaled,
            "rope_scaling_factor": model.rope_scaling_factor if scaled else 8.0,
            **({OBEYED_FACTOR: model.rope_scaling_factor} if scaled else {}),
            "layernorm_epsilon": model.norm_epsilon,
            "layernorm_zero_centered_gamma": model.zero_centered_norms,
            "add_bias_linear": model.linear_bias,
            "add_qkv_bias": model.qkv_bias and not model.linear_bias,
            "bias_gelu_fusion": model.activation == "gelu_tanh",
            "init_method_std": model.initializer_range,
            "attention_dropout": model.attention_dropout,
            "hidden_dropout": model.hidden_dropout,
            "untie_embeddings_and_output_weights": model.untied,
            "vocab_size": model.vocab_size,
            TOKENS: tokens,
            "padded_vocab_size": model.padded_vocab_size,
            **(_expert_arguments(model) if model.num_experts else {}),
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "iteration": 0,
            "consumed_train_samples": 0,
        }
    )


def _expert_arguments(model: Architecture) -> dict[str, Any]:
    return {
        "num_experts": model.num_experts,
        "moe_router_topk": model.experts_per_token,
        "moe_ffn_hidden_size": model.expert_ffn_size,
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": model.router_aux_loss,
    }


def flags_of(model: Architecture) -> dict[str, Any]:
    """Return the flags that tell Megatron's trainer of this model: {name without dashes: value}."""
    args = arguments_of(model)
    learned = args.position_embedding_type == LEARNED
    flags = {
        name.replace("_", "-"): getattr(args, name)
        for name in (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            *("kv_channels", "max_position_embeddings", "seq_length", "position_embedding_type"),
            *("normalization", "swiglu", "add_qkv_bias", "qk_layernorm", "init_method_std"),
            *("untie_embeddings_and_output_weights", "attention_dropout", "hidden_dropout"),
            *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax"),
            *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "vocab_size"),
        )
        if hasattr(args, name)
    }
    flags["norm-epsilon"] = args.layernorm_epsilon
    flags["disable-bias-linear"] = not args.add_bias_linear
    if args.group_query_attention:
        flags |= {"group-query-attention": True, "num-query-groups": args.num_query_groups}
    if not learned:
        flags |= {"rotary-base": args.rotary_base, "rotary-percent": args.rotary_percent}
    if args.use_rope_scaling:
        flags |= {"use-rope-scaling": True, "rope-scaling-factor": args.rope_scaling_factor}
    # Megatron's fused gelu is the tanh approximation; its other gelu is exact.
    flags["no-bias-gelu-fusion"] = model.activation == "gelu"
    return {name: value for name, value in flags.items() if value is not False}
