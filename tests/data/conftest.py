"""A small tokenizer, and files written where the test may write."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from encoder_here import EncoderHere
from text_files import line, write

from megatron_infoentropy.data import blocks, journal, workers
from megatron_infoentropy.data.manifest import Manifest
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture
def worker_processes():
    """Real ones, for tests that are about them."""


@pytest.fixture(autouse=True)
def encode_here(request, monkeypatch):
    if "worker_processes" not in request.fixturenames:
        monkeypatch.setattr(workers, "_Worker", EncoderHere)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few lines, so that there is something to put in order and to add up."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(blocks, "_READ_BYTES", 1000)


@pytest.fixture
def small_steps(small_blocks, monkeypatch):
    """The journal written after each of them."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what it is for, no test can show
    monkeypatch.setattr(journal, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(journal, "SAVE_AFTER_INPUT_S", 0.0)


@pytest.fixture
def prepare(tokenizer_folder, tmp_path) -> Callable[..., Manifest]:
    """Preprocesses a file, or several, into a folder of that name, below the test's own or not."""

    def prepare(
        inputs: Path | list[Path],
        name: str | Path = "out",
        tokenizer: Path = tokenizer_folder,
        **options: Any,
    ) -> Manifest:
        inputs = [inputs] if isinstance(inputs, Path) else inputs
        return preprocess(inputs, tokenizer, tmp_path / name, **options)

    return prepare


@pytest.fixture(scope="session")
def training_text(tmp_path_factory):
    """This test suite's own sources, which is text enough for a few hundred merges."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    lines = [line(source.read_text()) for source in sources]
    return write(tmp_path_factory.mktemp("text") / "train.jsonl", lines)


@pytest.fixture(scope="session")
def tokenizer_folder(training_text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(training_text, folder, vocab_size=600)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)
