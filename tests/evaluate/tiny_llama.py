"""A tiny random Llama as a Hugging Face folder."""

from pathlib import Path

import torch
from token_folder import TOKENIZER, VOCAB
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 16


def write_model(folder: Path, seed: int, vocab_size: int = VOCAB) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # large, so that the random model is far from uniform
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    return folder
