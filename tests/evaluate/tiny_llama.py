"""A tiny random Llama as a Hugging Face folder, and how it is scored."""

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from token_folder import TOKENIZER, VOCAB
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_infoentropy.evaluate.evaluation import Evaluation
from megatron_infoentropy.evaluate.perplexity import ScoringOptions, evaluate_model

CONTEXT = 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}


def write_model(
    folder: Path, seed: int, vocab_size: int = VOCAB, *, tokenizer: bytes = TOKENIZER, **sizes: int
) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        initializer_range=0.3,  # large, so that the random model is far from uniform
        **SIZES | sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return folder


def score(
    model: Path,
    dataset: Path,
    *,
    token_counts: Path | None = None,
    output: Path | None = None,
    **options,
) -> Evaluation:
    """Evaluate on the CPU; `options` are those of `evaluate_model` and of `ScoringOptions`."""
    names = {field.name for field in fields(ScoringOptions)}
    how = {name: value for name, value in options.items() if name in names}
    with TemporaryDirectory() as nowhere:  # files that are mapped stay until they are let go
        return evaluate_model(
            model,
            dataset,
            ScoringOptions(device="cpu", **how),
            token_counts=token_counts or dataset / "token_counts.npy",
            output=output or Path(nowhere),
            **{name: value for name, value in options.items() if name not in names},
        )
