"""Exported folders: every convention, the dtype, the tokenizer, and what is overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config_check import config_differences
from tiny_checkpoint import (
    FAMILIES,
    TOKENS,
    export_tiny,
    tiny_args,
    tiny_tensors,
    unstacked,
    write_checkpoint,
    write_tiny,
)
from tiny_tokenizer import write_tokenizer
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


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "Qwen2": FAMILIES["qwen2"],
    "Llama with biases of queries, keys and values": FAMILIES["qwen2"] | {"kv_channels": 12},
    "Qwen3": FAMILIES["qwen3"],
    "Qwen3, interleaved": FAMILIES["qwen3"] | {"rotary_interleaved": True},
    "Mixtral": FAMILIES["mixtral"],
    "Qwen3-MoE, interleaved, norms around zero": FAMILIES["qwen3_moe"]
    | {"rotary_interleaved": True, "layernorm_zero_centered_gamma": True},
    "GPT-NeoX": FAMILIES["gpt_neox"],
    "GPT-NeoX, interleaved, fused gelu": FAMILIES["gpt_neox"]
    | {"rotary_interleaved": True, "bias_gelu_fusion": True, "rotary_percent": 0.25},
    "GPT-2": FAMILIES["gpt2"],
    "GPT-2, untied, norms around zero": FAMILIES["gpt2"]
    | {"untie_embeddings_and_output_weights": True, "layernorm_zero_centered_gamma": True},
    "biases": {"add_bias_linear": True},
    "the scaling of Llama 3": {"use_rope_scaling": True, "rotary_base": 500000},
    "a key for all queries": {"num_query_groups": 1},
    "a key for every query": {"group_query_attention": False, "num_query_groups": 1},
    "tied": {"untie_embeddings_and_output_weights": False, "kv_channels": 16},
    "interleaved": {"rotary_interleaved": True},
    "norms around zero": {"layernorm_zero_centered_gamma": True},
    "wide heads": {"kv_channels": 12, "rotary_base": 500000},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_convention_is_undone(tmp_path: Path, variant: str) -> None:
    """With layers stacked or one by one, which gives the same; by logits and by the fields."""
    args = tiny_args(**VARIANTS[variant], layernorm_epsilon=1e-3)
    tensors = tiny_tensors(args)
    write_checkpoint(tmp_path / "save", args, tensors)
    write_checkpoint(tmp_path / "single", args, unstacked(tensors))
    convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    convert_checkpoint(tmp_path / "single", tmp_path / "same")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    verification = verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS)
    assert verification.passed, verification
    assert verification.tokens == 96
    assert config_differences(tmp_path / "save", tmp_path / "hf") == []


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


def test_the_tokenizer_is_copied_and_says_where_the_vocabulary_ends(tmp_path: Path) -> None:
    args = tiny_args(vocab_size=None)  # as saved after training with a Hugging Face tokenizer
    write_checkpoint(tmp_path / "save", args, tiny_tensors(args))
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 61)
    summary = convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tokenizer)
    assert summary.vocab_size == 61
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tokenizer / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 60
    model = load(tmp_path / "hf")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 60
    assert verify_conversion(tmp_path / "save", tmp_path / "hf", [[60, 1, 2]]).passed
    change = tmp_path / "hf" / "tokenizer.json"  # another tokenizer than the one it was cut for
    change.write_bytes((write_tokenizer(tmp_path / "other", 62) / "tokenizer.json").read_bytes())
    verification = verify_conversion(tmp_path / "save", tmp_path / "hf", [[60, 1, 2]])
    assert verification.differences == ("tokenizer: it has 62 tokens, the model 61 rows",)


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
def test_how_to_generate_is_kept(tmp_path: Path, said: dict[str, Any], kept: object) -> None:
    write_tiny(tmp_path / "save", vocab_size=None)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 61)
    (tokenizer / "generation_config.json").write_text(json.dumps(said))
    convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tokenizer)
    config = GenerationConfig.from_pretrained(tmp_path / "hf")
    expected = said | {"eos_token_id": kept}
    assert {name: getattr(config, name) for name in expected} == expected


def test_special_tokens_are_those_that_transformers_finds(tmp_path: Path) -> None:
    write_tiny(tmp_path / "save", vocab_size=None)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 61)
    special = {"eos_token": {"content": "t5"}, "bos_token": "t6"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    path = tokenizer / "tokenizer_config.json"
    for more in ({}, {"added_tokens_decoder": {}}, {"added_tokens_decoder": {}, "eos_token": "t7"}):
        path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | more))
        convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tokenizer, overwrite=True)
        used, config = (
            kind.from_pretrained(tmp_path / "hf") for kind in (AutoTokenizer, AutoConfig)
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(config, name) == getattr(used, name), (more, name)


def test_every_chat_template_is_copied(tmp_path: Path) -> None:
    write_tiny(tmp_path / "save", vocab_size=None)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 61)
    used = AutoTokenizer.from_pretrained(tokenizer)
    used.chat_template = {"default": "{{ messages }}", "tool_use": "tools: {{ messages }}"}
    used.save_pretrained(tmp_path / "saved")
    convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == used.chat_template


@pytest.mark.parametrize(("size", "saved"), [(65, None), (61, 60)])
def test_a_tokenizer_of_another_size_is_refused(
    tmp_path: Path, size: int, saved: int | None
) -> None:
    write_tiny(tmp_path / "save", vocab_size=saved)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", size)
    with pytest.raises(ValueError, match=f"{size}.*the tokenizer of the training data"):
        convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tokenizer)
    assert not (tmp_path / "hf").exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "save")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tmp_path)


def test_without_a_tokenizer_no_special_ids_are_invented(tmp_path: Path) -> None:
    export_tiny(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_zero_centred_norms_get_their_one_back_in_fp32() -> None:
    model = architecture_of(tiny_args(layernorm_zero_centered_gamma=True), None)
    stored = torch.full((32,), 0.001, dtype=torch.bfloat16)  # 1 + 0.001 is 1 in bf16
    (weight,) = plain_norm(stored, model)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.full((32,), 1.001), atol=1e-5, rtol=0)


def test_an_output_is_only_replaced_if_asked_and_only_by_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "save")
    output = tmp_path / "hf"
    output.mkdir()
    (output / "old.json").write_text("old")
    with pytest.raises(ValueError, match="not empty"):
        convert_checkpoint(tmp_path / "save", output)
    with monkeypatch.context() as broken:
        broken.setattr("megatron_infoentropy.convert.to_hf.hf_config", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_checkpoint(tmp_path / "save", output, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["old.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"save", "hf"}, "nothing is left behind"
    convert_checkpoint(tmp_path / "save", output, overwrite=True)
    assert not (output / "old.json").exists()
    assert (output / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"save", "hf"}
    (output / "notes.md").touch()
    with pytest.raises(ValueError, match=r"refusing to replace .*notes\.md"):
        convert_checkpoint(tmp_path / "save", output, overwrite=True)
