"""What model a checkpoint holds, from its training arguments; refused if Llama cannot express it.

LlamaForCausalLM is: RMSNorm, SwiGLU, rotary positions over the whole head, causal attention over
everything with grouped queries, and no biases. The tables below say, for each training argument
that changes the computation, which values mean that model.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class UnsupportedModelError(ValueError):
    """The checkpoint holds a model that LlamaForCausalLM cannot compute."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and constants of a Llama model, with the two conventions Megatron has about weights."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int  # key/value heads
    head_dim: int
    norm_epsilon: float
    rotary_base: float
    max_positions: int
    vocab_size: int  # the true one
    padded_vocab_size: int
    tied_embeddings: bool
    initializer_range: float
    interleaved_rotary: bool  # pairs (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ...
    zero_centered_norms: bool  # norm weights are stored minus 1


# Arguments that must be there, with the values that mean Llama.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0,),
}
# Arguments that some versions lack; where they are there, these values mean Llama.
_OPTIONAL: dict[str, tuple[Any, ...]] = {
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "use_rope_scaling": (False,),
    "rope_type": (None, "rope"),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "rotary_scaling_factor": (None, 1.0),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "num_experts": (None,),
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
}
_FLAGS = {"add_bias_linear": "--disable-bias-linear"}  # where it is not named as the argument


def architecture_of(args: argparse.Namespace, vocab_size: int | None) -> Architecture:
    """Return the model that was trained with these arguments.

    Args:
        args: Megatron's training arguments, as a checkpoint holds them.
        vocab_size: the true size of the vocabulary; by default that of the arguments.

    Raises:
        UnsupportedModelError: naming every argument that LlamaForCausalLM has no counterpart for.
        ValueError: the vocabulary sizes do not fit each other.
    """
    if problems := list(_unsupported(args)):
        raise UnsupportedModelError(
            "LlamaForCausalLM cannot compute this model: " + "; ".join(problems)
        )
    grouped = _get(args, "group_query_attention")
    heads = _get(args, "num_attention_heads")
    return Architecture(
        num_layers=_get(args, "num_layers"),
        hidden_size=_get(args, "hidden_size"),
        ffn_hidden_size=_get(args, "ffn_hidden_size"),
        num_heads=heads,
        num_groups=_get(args, "num_query_groups") if grouped else heads,
        head_dim=_get(args, "kv_channels"),
        norm_epsilon=_get(args, "layernorm_epsilon"),
        rotary_base=float(_get(args, "rotary_base")),
        max_positions=_get(args, "max_position_embeddings"),
        vocab_size=_true_vocab_size(args, vocab_size),
        padded_vocab_size=_get(args, "padded_vocab_size"),
        tied_embeddings=not _get(args, "untie_embeddings_and_output_weights"),
        initializer_range=_get(args, "init_method_std"),
        interleaved_rotary=_get(args, "rotary_interleaved"),
        zero_centered_norms=_get(args, "layernorm_zero_centered_gamma"),
    )


def _unsupported(args: argparse.Namespace) -> Iterator[str]:
    for name, accepted in {**_REQUIRED, **_OPTIONAL}.items():
        if name not in _OPTIONAL and not hasattr(args, name):
            yield f"the argument {name} was not saved (expected {accepted[0]!r})"
        value = getattr(args, name, accepted[0])
        if value not in accepted:
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            yield f"{name}={value!r} (flag {flag}; expected {accepted[0]!r})"


def _true_vocab_size(args: argparse.Namespace, given: int | None) -> int:
    saved, padded = getattr(args, "vocab_size", None), _get(args, "padded_vocab_size")
    if given is not None and saved is not None and given != saved:
        raise ValueError(
            f"the tokenizer has {given} tokens, but the model was trained with vocab_size={saved}; "
            "give the tokenizer of the training data"
        )
    size: int = next(size for size in (given, saved, padded) if size is not None)
    if not 0 < size <= padded:
        raise ValueError(
            f"expected a vocabulary of at most {padded} tokens, the rows of the embedding; "
            f"got {size}: is this the tokenizer of the training data?"
        )
    return size


def _get(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name, None)
    if value is None:
        raise ValueError(f"the checkpoint's training arguments lack {name}")
    return value
