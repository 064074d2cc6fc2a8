"""One tiny random Llama and one small dataset for all tests of the evaluation."""

from pathlib import Path

import pytest
import torch
from tiny_llama import write_model
from token_folder import random_documents, write_token_folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
