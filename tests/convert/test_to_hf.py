"""Exported folders: the dtype, the tokenizer, how to generate, and what is overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import FAMILIES, TOKENS, tiny_args, write_tiny
from tiny_tokenizer import write_gpt2_tokenizer, write_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from megatron_infoentropy.convert import convert_checkpoint, verify_conversion
from megatron_infoentropy.convert.architecture import architecture_of
from megatron_infoentropy.convert.layout import plain_norm
from megatron_infoentropy.convert.to_hf import Dtype
from megatron_infoentropy.convert.tokenizer import tokenizer_differences


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint `save`, as after training with a Hugging Face tokenizer, and `tokenizer`."""
    write_tiny(tmp_path / "save", vocab_size=None)
    write_tokenizer(tmp_path / "tokenizer", 61)
    return tmp_path


def export(folder: Path, tokenizer: str = "tokenizer", **options: Any) -> Path:
    summary = convert_checkpoint(
        folder / "save", folder / "hf", tokenizer=folder / tokenizer, **options
    )
    assert summary.vocab_size == 61
    return folder / "hf"


@pytest.mark.parametrize(
    ("stored", "asked", "exported"),
    [
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, "auto", torch.float16),
    ],
)
def test_the_dtype_asked_for_is_exported_and_checked_without_its_rounding(
    tmp_path: Path, stored: torch.dtype, asked: Dtype, exported: torch.dtype
) -> None:
    write_tiny(tmp_path / "save", stored)
    convert_checkpoint(tmp_path / "save", tmp_path / "hf", dtype=asked)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "hf").dtype == exported
    assert verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS).passed


def test_the_tokenizer_is_copied_and_says_where_the_vocabulary_ends(folder: Path) -> None:
    hf, tokenizer = export(folder), folder / "tokenizer"
    assert {path.name for path in hf.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (hf / name).read_bytes() == (tokenizer / name).read_bytes()
    assert AutoTokenizer.from_pretrained(hf).eos_token_id == 60
    model = AutoModelForCausalLM.from_pretrained(hf)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 60
    assert verify_conversion(folder / "save", hf, [[60, 1, 2]]).passed
    change = hf / "tokenizer.json"  # another tokenizer than the one it was cut for
    change.write_bytes((write_tokenizer(folder / "other", 62) / "tokenizer.json").read_bytes())
    verification = verify_conversion(folder / "save", hf, [[60, 1, 2]])
    assert verification.differences == ("tokenizer: it has 62 tokens, the model 61 rows",)


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


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({}, 60),
        ({"eos_token_id": None}, 60),
        ({"eos_token_id": [3, 60], "temperature": 0.6, "pad_token_id": 0}, [3, 60]),
        ({"eos_token_id": [3, 4]}, [3, 4, 60]),  # and the one that the model was trained to write
        ({"eos_token_id": 3}, [3, 60]),
    ],
)
def test_how_to_generate_is_kept(folder: Path, said: dict[str, Any], kept: object) -> None:
    (folder / "tokenizer" / "generation_config.json").write_text(json.dumps(said))
    config = GenerationConfig.from_pretrained(export(folder))
    expected = said | {"eos_token_id": kept}
    assert {name: getattr(config, name) for name in expected} == expected


def test_special_tokens_are_those_that_transformers_finds(folder: Path) -> None:
    special = {"eos_token": {"content": "t5"}, "bos_token": "t6"}
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(special))
    path = folder / "tokenizer" / "tokenizer_config.json"
    for more in ({}, {"added_tokens_decoder": {}}, {"added_tokens_decoder": {}, "eos_token": "t7"}):
        path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | more))
        hf = export(folder, overwrite=True)
        used, config = (kind.from_pretrained(hf) for kind in (AutoTokenizer, AutoConfig))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(config, name) == getattr(used, name), (more, name)


def test_every_chat_template_is_copied(folder: Path) -> None:
    used = AutoTokenizer.from_pretrained(folder / "tokenizer")
    used.chat_template = {"default": "{{ messages }}", "tool_use": "tools: {{ messages }}"}
    used.save_pretrained(folder / "saved")
    again = AutoTokenizer.from_pretrained(export(folder, "saved"))
    assert again.chat_template == used.chat_template


@pytest.mark.parametrize(
    ("saved", "tokenizer", "match"),
    [
        (None, 65, "65.*the tokenizer of the training data"),
        (60, 61, "61.*the tokenizer of the training data"),
        (60, None, r"no tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(
    tmp_path: Path, saved: int | None, tokenizer: int | None, match: str
) -> None:
    write_tiny(tmp_path / "save", vocab_size=saved)
    given = tmp_path if tokenizer is None else write_tokenizer(tmp_path / "tokenizer", tokenizer)
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=given)
    assert not (tmp_path / "hf").exists()


def test_zero_centred_norms_get_their_one_back_in_fp32() -> None:
    model = architecture_of(tiny_args(layernorm_zero_centered_gamma=True), None)
    stored = torch.full((32,), 0.001, dtype=torch.bfloat16)  # 1 + 0.001 is 1 in bf16
    (weight,) = plain_norm(stored, model)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.full((32,), 1.001), atol=1e-5, rtol=0)


def test_an_output_is_only_replaced_if_asked_and_if_it_is_an_export(tmp_path: Path) -> None:
    """That it is replaced whole or not at all is new_folder's part, in tests/test_files.py."""
    write_tiny(tmp_path / "save")
    output = tmp_path / "hf"
    output.mkdir()
    (output / "old.json").write_text("old")
    with pytest.raises(ValueError, match="not empty"):
        convert_checkpoint(tmp_path / "save", output)
    convert_checkpoint(tmp_path / "save", output, overwrite=True)
    assert not (output / "old.json").exists()
    assert (output / "model.safetensors").is_file()
    (output / "notes.md").touch()
    with pytest.raises(ValueError, match=r"refusing to replace .*notes\.md"):
        convert_checkpoint(tmp_path / "save", output, overwrite=True)
