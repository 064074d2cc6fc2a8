"""Hugging Face models in Megatron: in its own trainer, and there and back without a bit changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_command import infoentropy
from safetensors.torch import load_file, save_file
from tiny_checkpoint import FAMILIES, LLAMA_3, TOKENS, export_tiny, same
from tiny_tokenizer import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_infoentropy.convert import (
    ConversionError,
    convert_checkpoint,
    convert_from_hf,
    prove,
    verify_conversion,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.verify import why_not_now
from megatron_infoentropy.launch.recipe import load_recipe


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


def small(folder: Path, kind: str, **changes: Any) -> Path:
    """Write a random model of transformers' own making."""
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"intermediate_size": 48, "vocab_size": 60, "num_key_value_heads": 2} | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    model.save_pretrained(folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("gemma", {}, "model_type='gemma'"),
        ("mixtral", {}, "HybridModel with experts"),
        ("llama", {"rope_parameters": LLAMA_3}, "scaling, which it ignores, .* without --hybrid"),
    ],
)
def test_a_model_that_is_refused_leaves_nothing(
    tmp_path: Path, kind: str, changes: dict[str, Any], named: str
) -> None:
    small(tmp_path, kind, **changes)
    with pytest.raises(ConversionError, match=named):
        convert_from_hf(tmp_path / "hf", tmp_path / "megatron", hybrid=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 64}),
        ("llama", {"rope_parameters": LLAMA_3}),
    ],
)
def test_what_is_llama_in_transformers_own_words_is_llama(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    hf = small(tmp_path, kind, max_position_embeddings=64, **changes)
    summary = convert_from_hf(hf, tmp_path / "megatron")
    assert summary.family == "llama"
    assert ("use-rope-scaling" in summary.flags) == ("rope_parameters" in changes)
    verification = verify_conversion(tmp_path / "megatron", hf, TOKENS, imported=True)
    assert verification.passed, verification
    convert_checkpoint(tmp_path / "megatron", tmp_path / "llama")
    assert same(hf, tmp_path / "llama")


def test_the_command_makes_a_hybrid_when_asked(tmp_path: Path) -> None:
    small(tmp_path, "llama")
    output = infoentropy("convert-from-hf", "hf", "--output", "start", "--hybrid", cwd=tmp_path)
    assert "Megatron's side is its own forward pass" in output
    assert "--hybrid-layer-pattern '*-' " in output, "no pattern of files for a shell"
    assert "num-layers" not in load_recipe(tmp_path / "start" / "model.yaml")


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
    """A model `hf` of 60 rows whose tokenizer has 50 tokens; every Qwen and Pythia has more."""
    export_tiny(tmp_path)
    for file in write_tokenizer(tmp_path / "tokenizer", 50).glob("*.json"):
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("size", [49, 51, 60])
def test_another_tokenizer_than_the_imported_models_is_refused(
    with_more_rows: Path, size: int
) -> None:
    """What it is like with the right one is in tests/end_to_end/test_more_rows.py."""
    convert_from_hf(with_more_rows / "hf", with_more_rows / "start")
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
    tmp_path: Path, family: str
) -> None:
    export_tiny(tmp_path, **FAMILIES[family] | {"untie_embeddings_and_output_weights": False})
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    names = {"llama": "model.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}
    head = tensors[names.get(family, "transformer.wte") + ".weight"].clone()
    name = "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
    save_file(tensors | {name: head}, path, {"format": "pt"})
    convert_from_hf(tmp_path / "hf", tmp_path / "megatron")
    head[-1, -1] += 1
    for other in (head, head.half()):
        save_file(tensors | {name: other}, path, {"format": "pt"})
        with pytest.raises(ConversionError, match=f"{name} holds other numbers than"):
            convert_from_hf(tmp_path / "hf", tmp_path / "again")
