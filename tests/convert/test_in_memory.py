"""A checkpoint opened in memory is the model that its export is, of every family."""

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import FAMILIES, tiny_args, tiny_tensors, write_checkpoint
from tiny_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

from megatron_infoentropy.convert import convert_checkpoint
from megatron_infoentropy.convert.in_memory import is_checkpoint, open_checkpoint

TOKENS = torch.arange(48).reshape(2, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_in_memory_computes_what_its_export_computes(tmp_path: Path, family: str):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 60)
    args = tiny_args(**FAMILIES[family], tokenizer_model=str(tokenizer))
    save = write_checkpoint(tmp_path / "save", args, tiny_tensors(args))
    # With this tokenizer a model with biases of q, k and v alone would be exported as Llama.
    family_of_export = "qwen2" if family == "qwen2" else "auto"
    convert_checkpoint(save, tmp_path / "hf", tokenizer=tokenizer, family=family_of_export)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    opened = open_checkpoint(save)
    network = opened.network(torch.float32)
    assert type(network) is type(exported)
    assert opened.tokenizer == tokenizer
    with torch.no_grad():
        logits = network(TOKENS).logits
        assert logits.shape[-1] == 60
        assert torch.equal(logits, exported(TOKENS).logits)


def test_a_checkpoint_whose_tokenizer_is_gone_asks_for_it(tmp_path: Path):
    args = tiny_args(tokenizer_model="elsewhere/tokenizer")
    save = write_checkpoint(tmp_path / "save", args, tiny_tensors(args))
    with pytest.raises(ValueError, match="'elsewhere/tokenizer', where there is no tokenizer"):
        open_checkpoint(save)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 60)
    assert open_checkpoint(save, tokenizer=tokenizer).tokenizer == tokenizer


def test_the_training_data_says_with_which_tokenizer_it_was_written(tmp_path: Path):
    data = tmp_path / "data" / "train"
    args = tiny_args(train_data_path=["0.4", str(data / "web"), "0.6", str(data / "code")])
    save = write_checkpoint(tmp_path / "save", args, tiny_tensors(args))
    opened = open_checkpoint(save, tokenizer=write_tokenizer(tmp_path / "tokenizer", 60))
    assert opened.tokenizer_sha256 is None
    data.mkdir(parents=True)
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": "abc"}}))
    assert opened.tokenizer_sha256 == "abc"


def test_a_checkpoint_is_known_by_its_files(tmp_path: Path):
    args = tiny_args()
    save = write_checkpoint(tmp_path / "save", args, tiny_tensors(args))
    assert is_checkpoint(save)
    assert not is_checkpoint(tmp_path)
