"""One tiny random Llama and one small dataset for all tests of the evaluation."""

from pathlib import Path

import pytest
import torch
from token_folder import TOKENIZER, VOCAB, random_documents, write_token_folder
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 16


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("other"), seed=2)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains; documents shorter than, equal to, and several times the context length."""
    folder = tmp_path_factory.mktemp("data") / "validation"
    domains = {
        "Prose <b>": random_documents(3, [5, 16, 17, 40, 1, 33, 9, 48, 12, 20]),
        "Code": random_documents(4, [64, 2, 15, 31]),
    }
    return write_token_folder(folder, domains)
