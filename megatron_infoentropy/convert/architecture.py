"""The model that training arguments describe: its family, sizes, constants and conventions.

A family is a class of transformers. The tables say, for each training argument that changes the
computation, which of its values mean that family. What no family has is refused by name.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_infoentropy.config import OF_THE_MODEL, InfoEntropyConfig
from megatron_infoentropy.convert.errors import ConversionError

Family = Literal["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_neox", "gpt2"]

ROTARY, LEARNED = "rope", "learned_absolute"
_LLAMA: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": (ROTARY,),
    "rotary_percent": (1.0,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
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
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"add_qkv_bias": (True,)},
    "qwen3": _LLAMA | {"qk_layernorm": (True,)},
    "mixtral": _LLAMA | {"moe_router_pre_softmax": (False,)},
    "qwen3_moe": _LLAMA | {"qk_layernorm": (True,), "moe_router_pre_softmax": (False, True)},
    "gpt_neox": _LAYER_NORM_GELU | {"position_embedding_type": (ROTARY,)},
    "gpt2": _LAYER_NORM_GELU | {"position_embedding_type": (LEARNED,)},
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
_LLAMA_WITH_BIASES = _LLAMA | {"add_bias_linear": (True,), "add_qkv_bias": (False, True)}

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
    "mtp_num_layers": (None, 0),
    "use_mup": (False,),
    "spec": (None,),
    **{f"infoentropy_{name}": (getattr(InfoEntropyConfig, name),) for name in OF_THE_MODEL},
}
# The same of a HybridModel, which ignores some of them, and is given the layers it has by default.
NEUTRAL_FOR_HYBRIDS: dict[str, tuple[Any, ...]] = {
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "num_experts": (None,),
    "spec": (
        *(None, "hybrid_stack_spec", "megatron.core.models.hybrid.hybrid_layer_specs"),
        *("mamba_stack_spec", "megatron.core.models.mamba.mamba_layer_specs"),
    ),
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
_ABSENT_MEANS: dict[str, Any] = {
    **{"add_qkv_bias": False, "qk_layernorm": False, "use_rope_scaling": False},
    **{"attention_dropout": 0.0, "hidden_dropout": 0.0},
}
_FLAGS = {"add_bias_linear": "--disable-bias-linear"}  # where it is not named as the argument


def family_of(args: argparse.Namespace) -> Family:
    """Return the family that computes what these training arguments describe."""
    has_experts = getattr(args, "num_experts", None) is not None
    pattern = getattr(args, "hybrid_layer_pattern", None)
    neutral = NEUTRAL | (NEUTRAL_FOR_EXPERTS if has_experts else {})
    neutral |= {} if pattern is None else NEUTRAL_FOR_HYBRIDS
    others = [] if pattern is None else list(_pattern_problems(pattern))
    others += _deviations(args, neutral, optional=True)
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
        raise ConversionError(
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


_KINDS = {
    "*": "attention",
    "-": "an MLP",
    "M": "Mamba",
    "G": "a gated delta net",
    "D": "sparse attention",
    "E": "experts",
    "+": "latent attention",
}


def _pattern_problems(pattern: str) -> Iterator[str]:
    """Yield what keeps a hybrid's layers from being those of a GPT: attention, then an MLP.

    Layers are numbered as in the names of parameters, where a pipeline stage ends (|) left out.
    """
    said = f"hybrid_layer_pattern={pattern!r:.80} (flag --hybrid-layer-pattern)"
    main, _, heads = pattern.partition("/")
    layers = main.replace("|", "")
    if heads:
        yield f"{said} has multi-token-prediction heads behind /"
    for number, kind in enumerate(layers):
        expected = "*-"[number % 2]
        if kind != expected:
            what = _KINDS.get(kind, f"unknown ({kind!r})")
            yield f"{said}: layer {number} is {what}, expected {_KINDS[expected]}"
            return
    if len(layers) % 2 or not layers:
        yield f"{said}: behind its {len(layers)} layers an MLP is missing"


OBEYED_FACTOR = "infoentropy_rope_scaling_factor"
"""The argument by which our trainer says that its model has --rope-scaling-factor."""
IGNORANT_FACTOR = 8.0  # what models have where a trainer does not hand the argument on
TOKENS = "infoentropy_tokens"
"""The argument that says how many tokens the tokenizer has, where the model may have more rows."""
Activation = Literal["silu_gated", "gelu", "gelu_tanh"]
# The names under which transformers has the same function; the first is the one to write.
ACTIVATIONS: dict[Activation, tuple[str, ...]] = {
    "silu_gated": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": (
        *("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    ),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and constants of a model, by Megatron's names, and how its weights are stored."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    kv_channels: int
    layernorm_epsilon: float
    activation: Activation
    rotary_base: float
    rotary_percent: float  # of the head, from its start
    rope_scaling_factor: float | None  # Llama 3's stretching of slow rotations
    max_position_embeddings: int
    vocab_size: int  # the true one
    padded_vocab_size: int
    init_method_std: float
    attention_dropout: float
    hidden_dropout: float
    # Which parameters there are, by the names that `naming` uses for it.
    untie_embeddings_and_output_weights: bool
    add_bias_linear: bool
    qkv_bias: bool
    # Conventions about stored numbers.
    rotary_interleaved: bool  # pairs (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ...
    layernorm_zero_centered_gamma: bool  # norm weights are stored minus 1
    hybrid: bool = False  # two layers are stored for each one, see `naming`
    # Experts, of which a dense model has none.
    num_experts: int = 0
    moe_router_topk: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True  # the shares of a token's experts are made to sum to 1
    moe_aux_loss_coeff: float = 0.0

    @property
    def rotary_dim(self) -> int:
        return int(self.kv_channels * self.rotary_percent)

    @property
    def zero_proj_bias(self) -> bool:
        """Llama's attention has biases everywhere or nowhere: the one Megatron lacks is zero."""
        return self.family == "llama" and self.qkv_bias and not self.add_bias_linear


# What training arguments say as it is. They have no value for a dense model's experts.
SAME = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "rotary_percent"),
    *("layernorm_epsilon", "layernorm_zero_centered_gamma", "max_position_embeddings"),
    *("padded_vocab_size", "untie_embeddings_and_output_weights", "add_bias_linear"),
    *("init_method_std", "attention_dropout", "hidden_dropout"),
)
SAME_OF_EXPERTS = ("num_experts", "moe_router_topk", "moe_ffn_hidden_size")


def activation_named(name: object) -> Activation | None:
    """Return the activation that transformers calls by this name; None for any other."""
    return next((kind for kind, names in ACTIVATIONS.items() if name in names), None)


def architecture_of(args: argparse.Namespace, vocab_size: int | None) -> Architecture:
    """Return the model that was trained with these arguments.

    Args:
        args: Megatron's training arguments, as a checkpoint holds them.
        vocab_size: the true size of the vocabulary; by default that of the arguments.
    """
    family, layers = family_of(args), _get(args, "num_layers")
    pattern = getattr(args, "hybrid_layer_pattern", None)
    has_experts = family in OF_EXPERTS
    grouped = _get(args, "group_query_attention")
    model = Architecture(
        family=family,
        num_layers=layers if pattern is None else len(pattern.replace("|", "")) // 2,
        num_query_groups=_get(args, "num_query_groups" if grouped else "num_attention_heads"),
        activation=_activation(args),
        rotary_base=float(_get(args, "rotary_base")),
        rope_scaling_factor=_rope_scaling_factor(args),
        vocab_size=_true_vocab_size(args, vocab_size),
        qkv_bias=_get(args, "add_bias_linear") or _get(args, "add_qkv_bias"),
        rotary_interleaved=family != "gpt2" and _get(args, "rotary_interleaved"),
        hybrid=pattern is not None,
        # Softmax over the best logits is softmax over all, of the best, made to sum to 1.
        norm_topk_prob=not (has_experts and _get(args, "moe_router_pre_softmax")),
        moe_aux_loss_coeff=_aux_loss(args) if has_experts else 0.0,
        **{name: _get(args, name) for name in (*SAME, *(SAME_OF_EXPERTS if has_experts else ()))},
    )
    if family == "qwen2" and not _heads_fill(model):
        return as_family(model, "llama")
    _require_expressible(model)
    return model


def as_family(model: Architecture, family: str) -> Architecture:
    """Return the model as another family that computes it: with --add-qkv-bias there are two."""
    biased_qkv = model.qkv_bias and not model.add_bias_linear
    twins: tuple[Family, ...] = ("qwen2", "llama") if biased_qkv else (model.family,)
    for twin in twins:
        if twin == family:
            _require_expressible(new := replace(model, family=twin))
            return new
    raise ConversionError(
        f"expected a family that computes this model, {' or '.join(twins)}; got {family!r}"
    )


def _activation(args: argparse.Namespace) -> Activation:
    if args.swiglu:
        return "silu_gated"
    # Megatron's fused kernel and Transformer Engine's both compute the tanh approximation; the
    # local layers take the flag for the latter and ignore it.
    te = getattr(args, "transformer_impl", None) != "local"
    te = te and getattr(args, "use_te_activation_func", False)
    approximate = _get(args, "bias_gelu_fusion") or te
    return "gelu_tanh" if approximate else "gelu"


def _aux_loss(args: argparse.Namespace) -> float:
    """Return the coefficient of the one auxiliary loss that transformers has a number for."""
    kinds = getattr(args, "moe_router_load_balancing_type", "none")
    sizes = getattr(args, "moe_aux_loss_coeff", 0.0)
    kinds, sizes = (v if isinstance(v, list) else [v] for v in (kinds, sizes))
    return float(dict(zip(kinds, sizes, strict=False)).get("aux_loss", 0.0))


def _rope_scaling_factor(args: argparse.Namespace) -> float | None:
    """Return the factor that the model was built with, which is not always the argument's."""
    if not getattr(args, "use_rope_scaling", False):
        return None
    factor = float(_get(args, "rope_scaling_factor"))
    if factor != IGNORANT_FACTOR and not hasattr(args, OBEYED_FACTOR):
        raise ConversionError(
            f"the checkpoint says --rope-scaling-factor {factor:g}, but its trainer does not say "
            f"that it obeyed: Megatron-Core up to 0.19.2 trains with {IGNORANT_FACTOR:g} whatever "
            "is asked for; name the one that the model was trained with by `infoentropy convert "
            f"--rope-scaling-factor` ({IGNORANT_FACTOR:g}, unless you know better)"
        )
    return factor


def _require_expressible(model: Architecture) -> None:
    """Refuse sizes that the configuration class of the family has no field for."""
    if model.family in ("qwen2", "gpt_neox", "gpt2") and not _heads_fill(model):
        raise ConversionError(
            f"{CLASSES[model.family]} has heads of hidden_size / num_attention_heads = "
            f"{model.hidden_size} / {model.num_attention_heads} numbers; got "
            f"kv_channels={model.kv_channels} (flag --kv-channels)"
        )
    if model.family == "llama" and model.hidden_size % model.num_attention_heads:
        raise ConversionError(
            f"LlamaForCausalLM refuses a hidden_size ({model.hidden_size}) that "
            f"num_attention_heads ({model.num_attention_heads}) does not divide"
        )


def _heads_fill(model: Architecture) -> bool:
    return model.num_attention_heads * model.kv_channels == model.hidden_size


def _true_vocab_size(args: argparse.Namespace, given: int | None) -> int:
    """Return how many rows of the embedding are part of the model: all that its softmax has.

    They may be more than its tokenizer has tokens; then the arguments say how many those are.
    """
    saved, padded = getattr(args, "vocab_size", None), _get(args, "padded_vocab_size")
    tokens = getattr(args, TOKENS, saved)
    if given is not None and tokens is not None and given != tokens:
        raise ValueError(
            f"the tokenizer has {given} tokens, but the model was trained with {tokens}; give the "
            "tokenizer of the training data"
        )
    size: int = next(size for size in (saved, given, padded) if size is not None)
    if given is not None and given > size:
        raise ValueError(
            f"the tokenizer has {given} tokens, but the model has {size} rows; give the model's own"
        )
    if not 0 < size <= padded:
        raise ValueError(
            f"expected a vocabulary of at most {padded} tokens, the rows of the embedding; "
            f"got {size}: is this the tokenizer of the training data?"
        )
    return size


def _get(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name, _ABSENT_MEANS.get(name))
    if value is None:
        raise ConversionError(f"the checkpoint's training arguments lack {name}")
    return value
