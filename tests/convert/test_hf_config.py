"""config.json as others write it: read as transformers reads it, or refused by name."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import LLAMA_3
from transformers import AutoConfig
from transformers.activations import ACT2FN

from megatron_infoentropy.convert import ConversionError
from megatron_infoentropy.convert.architecture import ACTIVATIONS, activation_named
from megatron_infoentropy.convert.from_hf import flags_of
from megatron_infoentropy.convert.hf_config import architecture_from_config, read_config
from megatron_infoentropy.convert.verify import length_for

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_neox": {"use_parallel_residual": False},
    "gpt2": {},
}
WRONG: tuple[Any, ...] = ("x", "4", None, True, [], [1, 2], {}, {"a": 1}, -1, 0, 1.5, 1e300)
WRONG += (float("nan"),)


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def defaults(kind: str) -> dict[str, Any]:
    """Return what transformers writes for a model of this kind with nothing said."""
    return AutoConfig.for_model(kind, **KINDS.get(kind, {})).to_dict()


def flags(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return flags_of(architecture_from_config(read_config(write(folder, config))))


def test_equal_activations_are_those_of_transformers() -> None:
    x = torch.linspace(-20, 20, 4001)  # some end at 10
    gelu = torch.nn.functional.gelu
    functions = {"gelu": gelu(x), "gelu_tanh": gelu(x, approximate="tanh")}
    functions["silu_gated"] = torch.nn.functional.silu(x)
    assert ACTIVATIONS.keys() == functions.keys()
    for name in ACT2FN:
        if name == "prelu" or name == "xielu":  # have parameters
            continue
        computed = ACT2FN[name](x)
        equal = [
            kind
            for kind, values in functions.items()
            if values.shape == computed.shape and torch.allclose(values, computed, atol=2e-6)
        ]
        assert equal == [kind for kind in [activation_named(name)] if kind is not None], name


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        *(
            (kind, {field: name}, {"no-bias-gelu-fusion": True if name == "gelu" else None})
            for kind, field in (("gpt2", "activation_function"), ("gpt_neox", "hidden_act"))
            for name in ("gelu", "gelu_new", "gelu_fast")
        ),
        ("llama", {}, {"attention-dropout": 0.0, "hidden-dropout": 0.0}),
        ("qwen3", {"attention_dropout": 0.2}, {"attention-dropout": 0.2, "hidden-dropout": 0.0}),
        ("gpt_neox", {"hidden_dropout": 0.3}, {"attention-dropout": 0.0, "hidden-dropout": 0.3}),
        (
            "gpt2",
            {"attn_pdrop": 0.2, "embd_pdrop": 0.4},  # and resid_pdrop 0.1
            {"attention-dropout": 0.2, "hidden-dropout": 0.1},
        ),
        *(
            ("llama", {"max_position_embeddings": positions}, {"seq-length": length})
            for positions, length in ((131072, 4096), (1000, 1000))
        ),
        (
            "llama",
            {"rope_parameters": LLAMA_3 | {"rope_type": "default"}},
            {"use-rope-scaling": None},  # which is said, and not switched on
        ),
    ],
)
def test_a_field_becomes_its_flags(
    tmp_path: Path, kind: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    said = flags(tmp_path, defaults(kind) | changes)
    assert {name: said.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "absent"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions")]
)
def test_an_unsaid_number_of_positions_is_that_of_transformers(
    tmp_path: Path, kind: str, absent: str
) -> None:
    config = {name: value for name, value in defaults(kind).items() if name != absent}
    expected = AutoConfig.for_model(kind).max_position_embeddings
    assert flags(tmp_path, config)["max-position-embeddings"] == expected
    assert length_for(tmp_path) == expected < 4096


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_any_type_is_taken_or_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    config, refused = defaults(kind), 0
    nested = [("rope_parameters", name) for name in config.get("rope_parameters") or {}]
    for names in [*((name,) for name in config), ("quantization_config",), *nested]:
        for value in WRONG:
            changed = json.loads(json.dumps(config))
            inner = changed if len(names) == 1 else changed[names[0]]
            inner[names[-1]] = value
            with suppress(ValueError):
                flags(tmp_path, changed)
                continue
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"hidden_size": "64"}, "hidden_size"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads"),
        ("llama", {"mlp_bias": True}, r"attention_bias=False \(expected True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": LLAMA_3 | {"low_freq_factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_parameters": LLAMA_3 | {"rope_theta": 26564.5}}, "whole number"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ("mistral", {"max_position_embeddings": 64, "sliding_window": 63}, "sliding_window=63"),
        ("qwen2", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"head_dim": -1}, "head_dim"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("mixtral", {"sliding_window": 32}, "sliding_window=32"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("gpt_neox", {"use_parallel_residual": True}, "use_parallel_residual=True"),  # every Pythia
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act"),
        ("gpt_neox", {"intermediate_size": None}, "intermediate_size"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "full_attention": {}}}, "full_"),
        ("gpt2", {"n_head": 0}, "n_head"),
        ("gpt2", {"resid_pdrop": -0.1}, "resid_pdrop"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gemma", {}, "model_type='gemma'"),
    ],
)
def test_a_model_megatron_cannot_compute_is_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConversionError, match=named):
        flags(tmp_path, defaults(kind) | changes)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\xff"])
def test_a_configuration_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)
