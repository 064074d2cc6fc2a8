"""Megatron's own forward pass as a side of the proof, and arguments that never reach its model."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import FAMILIES, TOKENS, tiny_args, write_tiny
from torch import Tensor

from megatron_infoentropy.convert import convert_checkpoint, verify_conversion
from megatron_infoentropy.convert.architecture import NEUTRAL, NEUTRAL_FOR_EXPERTS
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.megatron_model import (
    arguments_read,
    build_model,
    one_cpu_rank,
    one_rank_inputs,
)
from megatron_infoentropy.integration import compat

OBEYED = {"rope_scaling_factor": 32.0, "infoentropy_rope_scaling_factor": 32.0}
STRETCHED: dict[str, Any] = {"use_rope_scaling": True, "rotary_base": 500000}
GELU = FAMILIES["gpt_neox"]
EXPERTS = FAMILIES["mixtral"]

CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    # argument that the conversion reads: (arguments of a model, another value for it), or all that
    # is other where no family has one without the other
    "normalization": ({}, GELU),
    "swiglu": ({}, GELU),
    "position_embedding_type": (GELU, "learned_absolute"),
    "rotary_percent": (GELU, 0.25),
    "rotary_base": ({}, 500),
    "rotary_interleaved": ({}, True),
    "use_rope_scaling": (STRETCHED | {"use_rope_scaling": False}, True),
    "rope_scaling_factor": (STRETCHED | OBEYED, 16.0),
    "add_bias_linear": ({}, True),
    "add_qkv_bias": ({}, True),
    "qk_layernorm": ({}, True),
    "group_query_attention": ({}, False),
    "num_query_groups": ({}, 4),
    "num_layers": ({}, 3),
    "num_attention_heads": ({}, 8),
    "hidden_size": ({}, 64),
    "ffn_hidden_size": ({}, 64),
    "kv_channels": ({}, 16),
    "padded_vocab_size": ({}, 128),
    "max_position_embeddings": (FAMILIES["gpt2"], 128),
    "layernorm_epsilon": ({}, 1e-2),
    "bias_gelu_fusion": (GELU, True),
    "untie_embeddings_and_output_weights": ({}, False),
    "num_experts": (EXPERTS, 8),
    "moe_router_topk": (EXPERTS, 3),
    "moe_ffn_hidden_size": (EXPERTS, 48),
    "moe_router_pre_softmax": (FAMILIES["qwen3_moe"], False),
    "hybrid_layer_pattern": ({}, {"hybrid_layer_pattern": "*-*-*-", "num_layers": 6}),
}
ELSEWHERE = {  # read as well, and no part of what the model computes
    "init_method_std": "of the weights before training",
    "attention_dropout": "of training only",
    "hidden_dropout": "of training only",
    "moe_aux_loss_coeff": "of training only",
    "vocab_size": "where the table is cut",
    "infoentropy_tokens": "how many tokens the tokenizer has",
    "infoentropy_rope_scaling_factor": "whether rope_scaling_factor was obeyed",
    "transformer_impl": "whether use_te_activation_func was obeyed",
    "use_te_activation_func": "of Transformer Engine's layers, which need a GPU",
    "layernorm_zero_centered_gamma": "how norms are stored; local layers have no other way",
}


def computed(args: Namespace) -> dict[str, Tensor]:
    """Logits and parameters, drawn by their names, of the model Megatron builds of arguments."""
    with one_cpu_rank(), torch.no_grad():
        model = build_model(args).to_empty(device="cpu").eval()
        drawn = {}
        for name, parameter in sorted(model.named_parameters()):
            torch.manual_seed(0)
            drawn[name] = parameter.normal_(std=0.3)
        tokens = torch.tensor(TOKENS[:1])
        return drawn | {"logits": model(tokens, *one_rank_inputs(tokens.shape[1]))}


@pytest.mark.parametrize("name", CHANGES)
def test_an_argument_that_is_converted_changes_megatrons_model(name: str) -> None:
    base, value = CHANGES[name]
    before = tiny_args(**base)
    after = Namespace(**vars(before) | (value if isinstance(value, dict) else {name: value}))
    assert getattr(before, name, None) != getattr(after, name)
    one, other = computed(before), computed(after)
    shapes = [{n: t.shape for n, t in tensors.items()} for tensors in (one, other)]
    assert shapes[0] != shapes[1] or not torch.equal(one["logits"], other["logits"])


def test_no_argument_is_read_that_was_not_looked_at_here() -> None:
    models = [*FAMILIES.values(), STRETCHED | OBEYED]
    read = set().union(*(arguments_read(tiny_args(**changes)) for changes in models))
    assert read - (NEUTRAL | NEUTRAL_FOR_EXPERTS).keys() == CHANGES.keys() | ELSEWHERE.keys()


def stretched(folder: Path, **changes: Any) -> Path:
    return write_tiny(folder / "save", **STRETCHED, rope_scaling_factor=32.0, **changes)


def test_a_model_without_its_factor_fails_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Megatron 0.19.2's own builder makes of the arguments has a factor of 8."""
    save = stretched(tmp_path, infoentropy_rope_scaling_factor=32.0)
    convert_checkpoint(save, tmp_path / "hf")
    assert verify_conversion(save, tmp_path / "hf", TOKENS).passed
    obeyed = compat.model_config_from_args

    def ignored(args: Namespace) -> Any:
        config = obeyed(args)
        config.rope_scaling_factor = 8.0
        return config

    monkeypatch.setattr(compat, "model_config_from_args", ignored)
    assert not verify_conversion(save, tmp_path / "hf", TOKENS).same_outputs


def test_a_factor_that_a_trainer_may_have_ignored_has_to_be_named(tmp_path: Path) -> None:
    save = stretched(tmp_path)
    with pytest.raises(ConversionError, match="trains with 8 whatever is asked"):
        convert_checkpoint(save, tmp_path / "hf")
    for factor in (8.0, 32.0):
        hf = tmp_path / f"hf{factor}"
        convert_checkpoint(save, hf, rope_scaling_factor=factor)
        result = verify_conversion(MegatronCheckpoint(save, rope_scaling_factor=factor), hf, TOKENS)
        assert result.passed, str(result)
    other = verify_conversion(MegatronCheckpoint(save, rope_scaling_factor=8.0), hf, TOKENS)
    assert not other.same_outputs


def test_the_gelu_that_local_layers_ignore_is_not_exported(tmp_path: Path) -> None:
    changes = {"use_te_activation_func": True, "bias_gelu_fusion": False}
    for impl, activation in (("local", "gelu"), ("transformer_engine", "gelu_pytorch_tanh")):
        save = write_tiny(tmp_path / impl, **GELU | changes, transformer_impl=impl)
        convert_checkpoint(save, tmp_path / f"hf-{impl}")
        result = verify_conversion(save, tmp_path / f"hf-{impl}", TOKENS)
        assert result.passed, str(result)
        assert f'"{activation}"' in (tmp_path / f"hf-{impl}" / "config.json").read_text()
