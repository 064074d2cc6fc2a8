"""Every convention of every family: in any layout the same export, proved, and back to the bit."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_checkpoint import (
    FAMILIES,
    TOKENS,
    hybrid_twin,
    same,
    tiny_args,
    tiny_tensors,
    unstacked,
    write_checkpoint,
)
from tiny_tokenizer import write_tokenizer
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from transformers import AutoConfig

from megatron_infoentropy.convert import (
    convert_checkpoint,
    convert_from_hf,
    verify,
    verify_conversion,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.hf_config import read_config
from megatron_infoentropy.convert.hf_model import network_of, streamed_model, whole_model
from megatron_infoentropy.launch.recipe import load_recipe

INTERLEAVED = {"rotary_interleaved": True}
AROUND_ZERO = {"layernorm_zero_centered_gamma": True}
BFLOAT16 = {"dtype": torch.bfloat16}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "Llama of an FP8 run": BFLOAT16 | {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "Qwen2": FAMILIES["qwen2"],
    "Llama with biases of queries, keys and values": FAMILIES["qwen2"] | {"kv_channels": 12},
    "Qwen3": FAMILIES["qwen3"],
    "Qwen3, interleaved": FAMILIES["qwen3"] | INTERLEAVED,
    "Mixtral": FAMILIES["mixtral"],
    "Qwen3-MoE in bfloat16": FAMILIES["qwen3_moe"] | BFLOAT16,
    "Qwen3-MoE, interleaved, norms around zero": FAMILIES["qwen3_moe"] | INTERLEAVED | AROUND_ZERO,
    "GPT-NeoX": FAMILIES["gpt_neox"],
    "GPT-NeoX, interleaved, fused gelu": FAMILIES["gpt_neox"]
    | INTERLEAVED
    | {"bias_gelu_fusion": True, "rotary_percent": 0.25},
    "GPT-2 in bfloat16": FAMILIES["gpt2"] | BFLOAT16,
    "GPT-2, untied, norms around zero": FAMILIES["gpt2"]
    | AROUND_ZERO
    | {"untie_embeddings_and_output_weights": True},
    "biases": {"add_bias_linear": True},
    "the scaling of Llama 3": {"use_rope_scaling": True, "rotary_base": 500000},
    "a key for all queries": {"num_query_groups": 1},
    "a key for every query": {"group_query_attention": False, "num_query_groups": 1},
    "tied": {"untie_embeddings_and_output_weights": False, "kv_channels": 16},
    "interleaved": INTERLEAVED,
    "norms around zero": AROUND_ZERO,
    "wide heads": {"kv_channels": 12, "rotary_base": 500000},
}
NO_HYBRIDS = ("num_experts", "rotary_interleaved", "use_rope_scaling")


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `save`, its Hugging Face folder `hf`, and the same model in other `forms`.

    Layers one by one (`single`), as Megatron-FSDP saves (`fsdp`), and of a HybridModel of one or
    of several pipeline stages (`hybrid`, `stages`), where there is one.
    """
    folder = tmp_path_factory.mktemp("made")
    changes = {"layernorm_epsilon": 1e-3, "mtp_num_layers": 0} | VARIANTS[request.param]
    dtype = changes.pop("dtype", torch.float32)
    args = tiny_args(**changes)
    tensors = tiny_tensors(args, dtype)
    write_checkpoint(folder / "save", args, tensors)
    write_checkpoint(folder / "forms" / "single", args, unstacked(tensors))
    write_fsdp(folder / "forms" / "fsdp", args, unstacked(tensors))
    if not any(changes.get(name) for name in NO_HYBRIDS):
        write_checkpoint(folder / "forms" / "hybrid", *hybrid_twin(args, tensors))
        write_checkpoint(folder / "forms" / "stages", *as_before(*hybrid_twin(args, tensors, "|")))
    convert_checkpoint(folder / "save", folder / "hf", shard_bytes=20_000)
    return folder


def as_before(args: Namespace, tensors: dict[str, Tensor]) -> tuple[Namespace, dict[str, Tensor]]:
    """With the pattern under its old name, and Megatron's default layers named."""
    args.spec = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]
    args.hybrid_override_pattern = args.hybrid_layer_pattern
    del args.hybrid_layer_pattern
    return args, tensors


def write_fsdp(folder: Path, args: Namespace, tensors: dict[str, Tensor]) -> None:
    """As Megatron-FSDP saves: wrapped names, one entry a layer, halves apart, no metadata.json."""
    state = {}
    for name, tensor in tensors.items():
        if args.swiglu and "mlp.linear_fc1." in name and "experts" not in name:
            gate, up = (half.clone() for half in tensor.chunk(2))
            state |= {f"module.{name}_w": gate, f"module.{name}_v": up}
        else:
            state[f"module.{name}"] = tensor
    everything = {
        "model": state,
        "args": args,
        "iteration": 9,
        "checkpoint_version": 3.0,
        "optimizer": {"state": {"module.output_layer.weight": {"exp_avg": torch.zeros(3)}}},
    }
    iteration = folder / "iter_0000009"
    dcp.save(everything, checkpoint_id=iteration, planner=DefaultSavePlanner(), no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("9")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.filterwarnings("ignore")
def test_every_form_of_a_checkpoint_is_exported_as_the_same_to_the_bit(
    made: Path, tmp_path: Path
) -> None:
    assert len(list((made / "hf").glob("*.safetensors"))) > 1
    for form in (made / "forms").iterdir():
        hf = tmp_path / form.name
        convert_checkpoint(form, hf)
        assert same(made / "hf", hf), form.name
        assert config_of(made / "hf") == config_of(hf)
        assert MegatronCheckpoint(form).iteration == (9 if form.name == "fsdp" else 7)


def test_both_forms_of_megatrons_side_compute_what_transformers_does(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for missing in ("", "it is not there"):
        if missing:
            monkeypatch.setattr(verify, "why_not_megatron", lambda: "it is not there")
        for form in (made / "save", *(made / "forms").iterdir()):
            result = verify_conversion(form, made / "hf", TOKENS)
            assert result.passed, result
            assert (result.tokens, result.not_megatron) == (96, missing)
            assert result.max_logit > 1, "logits near zero would hide mistakes"
            assert (missing or "Megatron's side is its own forward pass") in str(result)
            losses.append(result.megatron_loss)
    assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-6)


def test_there_and_back_is_the_same_to_the_bit(made: Path, tmp_path: Path) -> None:
    """As a GPT, and as a HybridModel where there is one."""
    hf, config = made / "hf", config_of(made / "hf")
    for form in filter(Path.exists, (made / "save", made / "forms" / "hybrid")):
        start, again = tmp_path / f"{form.name}-start", tmp_path / form.name
        summary = convert_from_hf(hf, start, hybrid=form.name == "hybrid")
        assert (summary.family, summary.vocab_size) == (config["model_type"], 60)
        assert load_recipe(start / "model.yaml") == summary.flags
        theirs, ours = MegatronCheckpoint(form), MegatronCheckpoint(start)
        assert ours.tensors.keys() >= theirs.tensors.keys()
        for name in ("num_layers", "hybrid_layer_pattern", "add_qkv_bias", "use_rope_scaling"):
            pair = [getattr(args, name, None) or None for args in (ours.args, theirs.args)]
            assert pair[0] == pair[1], name
        convert_checkpoint(start, again)
        assert same(hf, again)
        assert config == config_of(again)
        for checkpoint in (theirs, ours):
            require_same_fields(read_config(hf), config, checkpoint.args)
        verification = verify_conversion(start, hf, TOKENS, imported=True)
        assert verification.passed, verification


def test_all_of_transformers_forms_compute_the_same_to_the_bit(made: Path, tmp_path: Path) -> None:
    """The folder whole, and layer by layer; and a model that is filled from the checkpoint."""
    whole = whole_model(made / "hf")
    opened, tokenizer = MegatronCheckpoint(made / "save"), write_tokenizer(tmp_path / "t", 60)
    others = [
        streamed_model(made / "hf", AutoConfig.from_pretrained(made / "hf")),
        network_of(opened, tokenizer, torch.float32),
    ]
    with torch.no_grad():
        for tokens in TOKENS:
            ids = torch.tensor([tokens])
            expected = whole(ids, use_cache=False).logits
            assert expected.shape[-1] == 60
            for other in others:
                assert type(other) is type(whole)
                assert torch.equal(other(ids, use_cache=False).logits, expected)


def require_same_fields(config: Any, written: dict[str, Any], args: Namespace) -> None:
    """Compare what no logit shows with the arguments, and what transformers 4 and 5 read."""
    assert config.max_position_embeddings == args.max_position_embeddings
    assert config.initializer_range == args.init_method_std
    window = getattr(config, "sliding_window", None)
    assert window in (None, args.max_position_embeddings)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert written.get("n_ctx") == written.get("n_positions"), "where llama.cpp looks"
    if rope := written.get("rope_parameters"):
        assert written.get("rope_theta", written.get("rotary_emb_base")) == rope["rope_theta"]
        assert written.get("rotary_pct") == rope.get("partial_rotary_factor")
        if rope["rope_type"] != "default":
            assert written["rope_scaling"] | {"rope_theta": rope["rope_theta"]} == rope
