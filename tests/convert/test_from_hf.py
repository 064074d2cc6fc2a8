"""Hugging Face models in Megatron: in its own trainer, and there and back without a bit changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config_check import config_differences
from safetensors.torch import load_file, save_file
from tiny_checkpoint import FAMILIES, TOKENS, export_tiny, same, write_tiny
from tiny_tokenizer import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_infoentropy.convert import (
    ConversionError,
    convert_checkpoint,
    convert_from_hf,
    hf_weights,
    prove,
    verify_conversion,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.verify import why_not_now
from megatron_infoentropy.launch.recipe import load_recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_to_the_bit(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    write_tiny(tmp_path / "save", dtype, **FAMILIES[family])
    convert_checkpoint(tmp_path / "save", tmp_path / "hf", shard_bytes=20_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    summary = convert_from_hf(tmp_path / "hf", tmp_path / "megatron")
    assert (summary.family, summary.vocab_size) == (family, 60)
    convert_checkpoint(tmp_path / "megatron", tmp_path / "again")
    assert same(tmp_path / "hf", tmp_path / "again")
    first, second = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "again")
    )
    assert first == second
    assert config_differences(tmp_path / "megatron", tmp_path / "hf") == []
    verification = verify_conversion(tmp_path / "megatron", tmp_path / "hf", TOKENS, imported=True)
    assert verification.passed, verification


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_norm_before_experts_has_the_names_of_local_layers_and_of_transformer_engines(
    tmp_path: Path, family: str
) -> None:
    """Transformer Engine's join it to the linear layer behind it, but not to a router."""
    export_tiny(tmp_path, **FAMILIES[family])
    convert_from_hf(tmp_path / "hf", tmp_path / "megatron")
    checkpoint = MegatronCheckpoint(tmp_path / "megatron")
    local = checkpoint.read("decoder.layers.mlp.linear_fc1.layer_norm_weight")
    assert torch.equal(checkpoint.read("decoder.layers.pre_mlp_layernorm.weight"), local)
    assert len(local) == 2


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "vocab_size": 60}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gpt_neox", {}, "use_parallel_residual=True"),  # every Pythia
        ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "relu"}, "hidden_act"),
        ("llama", {"mlp_bias": True}, r"attention_bias=False \(expected True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": LLAMA_3 | {"low_freq_factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_theta": 26564.5}, "whole number"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        (
            "mixtral",
            {"num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 32},
            "sliding_window=32",
        ),
        ("mixtral", {"num_key_value_heads": 2, "num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("mistral", {"max_position_embeddings": 64, "sliding_window": 63}, "sliding_window=63"),
        ("gemma", {}, "model_type='gemma'"),
    ],
)
def test_a_model_megatron_cannot_compute_is_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], named: str
) -> None:
    sizes = {} if kind == "gpt2" else SMALL
    AutoConfig.for_model(kind, **sizes | changes).save_pretrained(tmp_path / "hf")
    with pytest.raises(ConversionError, match=named):
        convert_from_hf(tmp_path / "hf", tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("window", [None, 64])
def test_mistral_without_a_window_is_llama(tmp_path: Path, window: int | None) -> None:
    config = AutoConfig.for_model(
        "mistral", **SMALL, num_key_value_heads=2, max_position_embeddings=64, sliding_window=window
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    assert convert_from_hf(tmp_path / "hf", tmp_path / "megatron").family == "llama"
    verification = verify_conversion(tmp_path / "megatron", tmp_path / "hf", TOKENS, imported=True)
    assert verification.passed, verification
    convert_checkpoint(tmp_path / "megatron", tmp_path / "llama")
    assert same(tmp_path / "hf", tmp_path / "llama")


def test_the_scaling_of_llama_3_is_taken_over(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", **SMALL, rope_parameters=LLAMA_3, max_position_embeddings=64, head_dim=16
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    summary = convert_from_hf(tmp_path / "hf", tmp_path / "megatron")
    assert summary.flags["use-rope-scaling"] is True
    verification = verify_conversion(tmp_path / "megatron", tmp_path / "hf", TOKENS, imported=True)
    assert verification.passed, verification
    assert verification.max_logit > 0.1


@pytest.mark.parametrize("said", [None, "bfloat16"])
def test_the_dtype_is_that_of_the_weights_whatever_the_configuration_says(
    tmp_path: Path, said: str | None
) -> None:
    """Old exports say none; others that of the training, beside weights in fp32."""
    export_tiny(tmp_path)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | {"torch_dtype": said}
    path.write_text(json.dumps({k: v for k, v in config.items() if v or k != "torch_dtype"}))
    assert convert_from_hf(tmp_path / "hf", tmp_path / "megatron").dtype == "float32"
    assert why_not_now(tmp_path / "hf") is None
    result = prove(tmp_path / "megatron", tmp_path / "hf", imported=True)
    assert result.max_difference < 1e-5 * result.max_logit


def test_masks_among_the_weights_of_old_exports_are_left_out(tmp_path: Path) -> None:
    export_tiny(tmp_path, torch.bfloat16, **FAMILIES["gpt_neox"])
    masks = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    }
    path = tmp_path / "hf" / "model.safetensors"
    save_file(load_file(path) | masks, path, {"format": "pt"})
    assert convert_from_hf(tmp_path / "hf", tmp_path / "megatron").dtype == "bfloat16"
    assert prove(tmp_path / "megatron", tmp_path / "hf", imported=True).passed


@pytest.fixture
def with_more_rows(tmp_path: Path) -> Path:
    """A model `hf` of 60 rows whose tokenizer has 50 tokens, and its import `start`."""
    export_tiny(tmp_path)
    for file in write_tokenizer(tmp_path / "tokenizer", 50).glob("*.json"):
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    convert_from_hf(tmp_path / "hf", tmp_path / "start")
    return tmp_path


def test_rows_beyond_the_tokenizer_go_there_and_back(with_more_rows: Path) -> None:
    """Every Qwen and Pythia has some; they are part of the softmax."""
    folder = with_more_rows
    assert load_recipe(folder / "start" / "model.yaml")["vocab-size"] == 60
    summary = convert_checkpoint(
        folder / "start", folder / "again", tokenizer=folder / "tokenizer", family="llama"
    )
    assert summary.vocab_size == 60
    assert same(folder / "hf", folder / "again")
    sequences = [[token % 50 for token in text] for text in TOKENS]
    assert verify_conversion(folder / "start", folder / "again", sequences).passed


@pytest.mark.parametrize("size", [49, 51, 60])
def test_another_tokenizer_than_the_imported_models_is_refused(
    with_more_rows: Path, size: int
) -> None:
    other = write_tokenizer(with_more_rows / "other", size)
    with pytest.raises(ValueError, match=f"has {size} tokens, but the model was trained with 50"):
        convert_checkpoint(with_more_rows / "start", with_more_rows / "out", tokenizer=other)


def test_a_tokenizer_is_looked_at_when_its_model_is_imported(with_more_rows: Path) -> None:
    """And not only at the export, after the training."""
    hf = with_more_rows / "hf"
    large = write_tokenizer(with_more_rows / "large", 61)
    (hf / "tokenizer.json").write_bytes((large / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="has 61 tokens, the model 60 rows"):
        convert_from_hf(hf, with_more_rows / "out")
    (hf / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a Git LFS pointer"):
        convert_from_hf(hf, with_more_rows / "out")
    assert not (with_more_rows / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_head_beside_tied_embeddings_is_dropped_only_where_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(hf_weights, "_COMPARED_ROWS", 7)
    export_tiny(tmp_path, **FAMILIES[family] | {"untie_embeddings_and_output_weights": False})
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    names = {"llama": "model.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}
    head = tensors[names.get(family, "transformer.wte") + ".weight"].clone()
    name = "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
    save_file(tensors | {name: head}, path, {"format": "pt"})
    convert_from_hf(tmp_path / "hf", tmp_path / "megatron")
    head[-1, -1] += 1
    save_file(tensors | {name: head}, path, {"format": "pt"})
    with pytest.raises(ConversionError, match=f"{name} holds other numbers than"):
        convert_from_hf(tmp_path / "hf", tmp_path / "again")
