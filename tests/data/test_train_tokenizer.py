"""The tokenizer: exact size, exact round trip, and the same ids as transformers and Megatron."""

import os
import subprocess
import sys

import pytest
from golden import assert_same_files
from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from text_files import line, write
from transformers import AutoTokenizer

from megatron_infoentropy.data.blocks import BrokenLineError
from megatron_infoentropy.data.tokenizer import (
    END_OF_TEXT,
    train_tokenizer,
)


def test_transformers_and_megatron_find_what_they_need(tokenizer, tokenizer_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(reference) == tokenizer.vocab_size == 600
    assert reference.eos_token_id == reference.bos_token_id == tokenizer.eod_id
    assert reference.all_special_tokens == [END_OF_TEXT]
    # Megatron would take the ends of documents out of the loss if they were padding.
    assert reference.pad_token is None
    megatron, text = HuggingFaceTokenizer(str(tokenizer_folder)), "def f(x):\n    return x ** 2\n"
    assert (megatron.vocab_size, megatron.eod) == (600, tokenizer.eod_id)
    assert megatron.text_to_ids(text) == tokenizer.tokenizer.encode(text).ids


def test_training_gives_the_same_bytes_in_another_process(
    training_text, tokenizer_folder, tmp_path
):
    program = """
import sys
from pathlib import Path
from megatron_infoentropy.data.tokenizer import train_tokenizer
train_tokenizer(*map(Path, sys.argv[1:]), vocab_size=600)
"""
    words = [sys.executable, "-c", program, training_text, tmp_path / "again"]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert_same_files(tmp_path / "again", tokenizer_folder)


def test_files_are_trained_on_together(training_text, tmp_path):
    plain = write(tmp_path / "plain.jsonl", [line("only bytes")])
    with pytest.raises(ValueError, match=r"the corpus supports a vocabulary of 2.. tokens"):
        train_tokenizer(plain, plain.with_name("out"), vocab_size=600)
    both = train_tokenizer([plain, training_text], plain.with_name("out"), vocab_size=600)
    assert both.vocab_size == 600


def test_every_byte_has_a_token_even_if_the_corpus_lacks_it(tokenizer):
    text = "".join(map(chr, range(0x80, 0x800))) + "\U0010ffff"
    ids = tokenizer.tokenizer.encode(text).ids
    assert tokenizer.tokenizer.decode(ids) == text


def test_errors_leave_no_folder(tmp_path):
    text = write(tmp_path / "a.jsonl.zst", [line("a"), "{"])
    with pytest.raises(ValueError, match=r"at least 257 .* got 256"):
        train_tokenizer(text, tmp_path / "out", vocab_size=256)
    with pytest.raises(BrokenLineError, match=r"a\.jsonl\.zst:2: not JSON"):
        train_tokenizer(text, tmp_path / "out", vocab_size=300)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.zst"]
