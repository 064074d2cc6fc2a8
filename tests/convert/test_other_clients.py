"""What programs other than transformers' models make of an exported folder."""

import json
from pathlib import Path

import pytest
from tiny_checkpoint import FAMILIES, tiny_args, tiny_tensors, write_checkpoint, write_tiny
from tiny_tokenizer import write_gpt2_tokenizer

from megatron_infoentropy.convert import convert_checkpoint
from megatron_infoentropy.convert.tokenizer import tokenizer_differences


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_by_which_transformers_cuts_text_are_those_of_the_file(
    tmp_path: Path, family: str
) -> None:
    """transformers 5 has a tokenizer of its own for Qwen2 and would cut 12 into 1 and 2."""
    tokenizer = write_gpt2_tokenizer(tmp_path / "tokenizer")
    write_tiny(tmp_path / "save", **FAMILIES[family], vocab_size=258, padded_vocab_size=384)
    summary = convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tokenizer)
    assert tokenizer_differences(tmp_path / "hf") == []
    assert summary.family == ("llama" if family == "qwen2" else family)


def test_gpt2_says_its_length_where_llama_cpp_looks_for_it(tmp_path: Path) -> None:
    args = tiny_args(**FAMILIES["gpt2"])
    write_checkpoint(tmp_path / "save", args, tiny_tensors(args))
    convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == args.max_position_embeddings
