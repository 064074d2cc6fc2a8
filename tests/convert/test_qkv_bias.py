"""Models with --add-qkv-bias: Qwen2 where the tokenizer is Qwen2's, Llama where it is another."""

import json
import re
from pathlib import Path

import pytest
from run_command import infoentropy
from safetensors.torch import load_file, save_file
from tiny_checkpoint import FAMILIES, write_tiny
from tiny_tokenizer import write_gpt2_tokenizer, write_qwen2_tokenizer
from transformers import AutoTokenizer

from megatron_infoentropy.convert import ConversionError, convert_checkpoint, convert_from_hf
from megatron_infoentropy.convert.tokenizer import cuts_as_qwen2, tokenizer_differences

O_BIAS = "model.layers.1.self_attn.o_proj.bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint `save`, the tokenizers `gpt2` and `qwen2`, and `hf`, made with GPT-2's."""
    write_tiny(tmp_path / "save", **FAMILIES["qwen2"], vocab_size=258, padded_vocab_size=384)
    write_gpt2_tokenizer(tmp_path / "gpt2")
    write_qwen2_tokenizer(tmp_path / "qwen2")
    convert_checkpoint(tmp_path / "save", tmp_path / "hf", tokenizer=tmp_path / "gpt2")
    return tmp_path


def convert(folder: Path, tokenizer: str, *words: str) -> str:
    command = ("convert", "save", "--tokenizer", tokenizer, "--output", "out")
    return infoentropy(*command, *words, cwd=folder)


@pytest.mark.parametrize(
    ("tokenizer", "words", "family"),
    [
        ("gpt2", [], "llama"),
        ("qwen2", [], "qwen2"),
        ("qwen2", ["--family", "llama"], "llama"),
    ],
)
def test_the_class_is_one_in_which_transformers_cuts_text_as_in_training(
    folder: Path, tokenizer: str, words: list[str], family: str
) -> None:
    output = convert(folder, tokenizer, *words)
    assert "same top token 100.00%" in output
    assert f"out: {family}, " in output
    assert ("not Qwen2: transformers 5 cuts text" in output) == (tokenizer == "gpt2")
    assert json.loads((folder / "out" / "config.json").read_text())["model_type"] == family
    used = AutoTokenizer.from_pretrained(folder / "out")
    assert len(used.encode("12")) == (1 if tokenizer == "gpt2" else 2)


@pytest.mark.parametrize("words", [[], ["--no-verify"]])
def test_an_export_that_would_be_misread_is_not_made(folder: Path, words: list[str]) -> None:
    with pytest.raises(AssertionError, match="Qwen2Tokenizer: --family llama"):
        convert(folder, "gpt2", "--family", "qwen2", *words)
    assert not (folder / "out").exists()


def test_a_family_that_does_not_compute_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(AssertionError, match="qwen2 or llama; got 'mistral'"):
        convert(folder, "gpt2", "--family", "mistral")
    write_tiny(folder / "wide", **FAMILIES["qwen2"], kv_channels=12)
    with pytest.raises(ConversionError, match="--kv-channels"):
        convert_checkpoint(folder / "wide", folder / "out", family="qwen2")
    assert "its heads" in convert_checkpoint(folder / "wide", folder / "out").not_qwen2


def test_a_bias_that_megatron_cannot_hold_is_refused_before_anything_is_written(
    folder: Path,
) -> None:
    path = folder / "hf" / "model.safetensors"
    weights = load_file(path)
    weights[O_BIAS][3] = -0.25
    save_file(weights, path, {"format": "pt"})
    before = set(folder.iterdir())
    with pytest.raises(ConversionError, match=r"layers\.1.*o_proj\.bias to be.*up to 0\.25"):
        convert_from_hf(folder / "hf", folder / "megatron")
    assert set(folder.iterdir()) == before


def test_a_token_that_the_other_rules_never_make_is_found(folder: Path) -> None:
    """No sample of text would do: a vocabulary may have few numbers."""
    tokenizer = write_gpt2_tokenizer(folder / "rare", "90")
    path = tokenizer / "tokenizer.json"  # with Qwen2's normaliser, which would show elsewhere
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    assert not cuts_as_qwen2(tokenizer)
    convert_checkpoint(folder / "save", folder / "out", tokenizer=tokenizer, family="qwen2")
    (difference,) = tokenizer_differences(folder / "out")
    assert difference.startswith("tokenizer: '90' is cut")


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_a_tokenizer_that_names_no_class_is_exported_with_one(folder: Path, family: str) -> None:
    write_tiny(folder / family, **FAMILIES[family], vocab_size=258, padded_vocab_size=384)
    config = {"eos_token": "<|endoftext|>"}
    (folder / "gpt2" / "tokenizer_config.json").write_text(json.dumps(config))
    convert_checkpoint(folder / family, folder / "out", tokenizer=folder / "gpt2")
    exported = folder / "out" / "tokenizer_config.json"
    named = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert json.loads(exported.read_text()) == named
    assert tokenizer_differences(folder / "out") == []
    exported.write_text(json.dumps(config))  # as it was copied by earlier versions
    (difference,) = tokenizer_differences(folder / "out")
    assert re.search("added|another way than in training", difference)
    assert "; beside this model transformers takes its" in difference


def test_a_class_that_a_model_has_chosen_in_training_is_named_beside_another(folder: Path) -> None:
    """The ids of the data are Qwen2's, because of the config.json beside the tokenizer."""
    (folder / "qwen2" / "config.json").write_text('{"model_type": "qwen2"}')
    write_tiny(folder / "llama", vocab_size=258, padded_vocab_size=384)
    (folder / "qwen2" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    path = folder / "qwen2" / "tokenizer.json"  # of which Qwen2's class leaves the rules
    gpt2 = json.loads((folder / "gpt2" / "tokenizer.json").read_text())
    rules = {name: gpt2[name] for name in ("pre_tokenizer", "normalizer")}
    path.write_text(json.dumps(json.loads(path.read_text()) | rules))
    expected = AutoTokenizer.from_pretrained(folder / "qwen2")("12 .\n\n").input_ids
    convert_checkpoint(folder / "llama", folder / "out", tokenizer=folder / "qwen2")
    exported = json.loads((folder / "out" / "tokenizer_config.json").read_text())
    assert exported["tokenizer_class"] == "Qwen2Tokenizer"
    assert AutoTokenizer.from_pretrained(folder / "out")("12 .\n\n").input_ids == expected
    assert tokenizer_differences(folder / "out") == []
