"""Whether an exported folder computes what the checkpoint computes.

Two things are compared, because each misses what the other sees: the logits of both models, in
fp32 on given tokens (a wrong constant such as the norm's epsilon may leave every next-token choice
as it was, and still moves the largest logit difference a hundredfold), and the configuration, as
transformers understands it, with the training arguments (a wrong maximal length moves no logit).
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.reference_model import ReferenceModel
from megatron_infoentropy.convert.tokenizer_files import read_tokenizer
from megatron_infoentropy.progress import progress

TOLERANCE = 1e-4
"""The largest difference between two fp32 logits that rounding explains."""


@dataclass(frozen=True)
class Verification:
    """The outcome of a comparison; `passed` is the verdict."""

    tokens: int
    max_difference: float  # largest |logit - logit|
    max_logit: float  # largest |logit|, the scale of the above
    top1_agreement: float  # share of positions where both predict the same token
    config_differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        close = self.max_difference <= TOLERANCE
        return close and self.top1_agreement == 1.0 and not self.config_differences


def verify_conversion(
    checkpoint: Path,
    output: Path,
    sequences: Sequence[Sequence[int]],
    *,
    iteration: int | None = None,
) -> Verification:
    """Compare a LlamaForCausalLM folder with the checkpoint it was made from.

    The checkpoint's parameters are rounded to the folder's dtype first, so that what is measured
    is the conversion and not the rounding that was asked for.

    Args:
        checkpoint: as for `convert_checkpoint`.
        output: the folder it wrote.
        sequences: token ids to run both models on; real text, up to the full length, tells most.
        iteration: as for `convert_checkpoint`.

    Raises:
        ValueError: no tokens, or ids outside the vocabulary.
    """
    from transformers import AutoConfig, LlamaForCausalLM

    opened = MegatronCheckpoint(checkpoint, iteration)
    config = AutoConfig.from_pretrained(output)
    _require_tokens(sequences, config.vocab_size, config.max_position_embeddings)
    reference = ReferenceModel(opened, config.dtype)
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    difference = largest = 0.0
    agree = total = 0
    with progress("verify", sum(map(len, sequences)), "tokens") as advance, torch.no_grad():
        for sequence in sequences:
            tokens = torch.tensor(sequence)
            expected = reference.logits(tokens)[:, : config.vocab_size]
            actual = model(tokens[None]).logits[0]
            difference = max(difference, (actual - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
            agree += int((actual.argmax(-1) == expected.argmax(-1)).sum())
            total += len(sequence)
            advance(len(sequence))
    return Verification(
        tokens=total,
        max_difference=difference,
        max_logit=largest,
        top1_agreement=agree / total,
        config_differences=tuple(config_differences(config, opened.args, _vocab_size(output))),
    )


def config_differences(config: Any, args: Namespace, vocab_size: int | None) -> list[str]:
    """Compare a loaded LlamaConfig with the training arguments; say every field that differs.

    `vocab_size` is that of the tokenizer, if there is one; arguments may not hold the true size.
    """
    grouped = args.group_query_attention
    expected = {
        "num_hidden_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups if grouped else args.num_attention_heads,
        "head_dim": args.kv_channels,
        "rms_norm_eps": args.layernorm_epsilon,
        "max_position_embeddings": args.max_position_embeddings,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    actual = {name: getattr(config, name) for name in expected}
    rope = config.rope_parameters
    expected |= {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    actual |= {"rope_type": rope["rope_type"], "rope_theta": rope["rope_theta"]}
    for size in (vocab_size, args.vocab_size):
        if size is not None:
            expected["vocab_size"], actual["vocab_size"] = size, config.vocab_size
    return [
        f"{name} is {actual[name]!r}, expected {value!r}"
        for name, value in expected.items()
        if actual[name] != value
    ]


def _vocab_size(folder: Path) -> int | None:
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return read_tokenizer(folder).vocab_size if has_tokenizer else None


def _require_tokens(sequences: Sequence[Sequence[int]], vocab_size: int, max_length: int) -> None:
    if not any(len(sequence) for sequence in sequences):
        raise ValueError("expected at least one token to compare the models on, got none")
    for sequence in sequences:
        if len(sequence) > max_length or not all(0 <= token < vocab_size for token in sequence):
            raise ValueError(
                f"expected sequences of at most {max_length} ids below {vocab_size}, got one of "
                f"{len(sequence)} with ids up to {max(sequence)}"
            )
