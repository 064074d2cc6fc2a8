"""transformers' model, layer by layer: the same numbers, and the memory of one layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import FAMILIES, TOKENS, tiny_args, tiny_tensors, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_infoentropy.convert import (
    IncompleteCheckpointError,
    convert_checkpoint,
    verify,
    verify_conversion,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.megatron_model import MegatronModel
from megatron_infoentropy.convert.streamed_model import streamed_model

CASES = FAMILIES | {
    "tied": {"untie_embeddings_and_output_weights": False},
    "llama3": {"use_rope_scaling": True},
}


def export(folder: Path, case: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    args = tiny_args(**CASES[case] | {"num_layers": 3, "rotary_base": 500000})
    write_checkpoint(folder / "save", args, tiny_tensors(args, dtype))
    convert_checkpoint(folder / "save", folder / "hf", shard_bytes=60_000)
    return folder / "hf"


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_to_the_bit(tmp_path: Path, case: str) -> None:
    hf = export(tmp_path, case, torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    streamed = streamed_model(hf, AutoConfig.from_pretrained(hf))
    with torch.no_grad():
        for tokens in TOKENS:
            ids = torch.tensor([tokens])
            expected = whole(ids, use_cache=False).logits
            assert torch.equal(streamed(ids, use_cache=False).logits, expected)


def one_file(hf: Path) -> dict[str, torch.Tensor]:
    """The folder's weights, whose files are removed."""
    weights = {k: t for path in hf.glob("*.safetensors") for k, t in load_file(path).items()}
    for path in hf.glob("model*"):
        path.unlink()
    return weights


def test_the_names_of_old_exports_are_known(tmp_path: Path) -> None:
    """GPT-2 as it was published: no prefix, and masks among the weights."""
    hf = export(tmp_path, "gpt2")
    ids = torch.tensor([TOKENS[0]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf)(ids).logits
        old = {name.removeprefix("transformer."): t for name, t in one_file(hf).items()}
        old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
        save_file(old, hf / "model.safetensors", {"format": "pt"})
        assert torch.equal(streamed_model(hf, AutoConfig.from_pretrained(hf))(ids).logits, expected)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = streamed_model(export(tmp_path), AutoConfig.from_pretrained(tmp_path / "hf"))
    layers = model.model.layers
    seen = []

    def count(*_: object) -> None:
        seen.append([not layer.mlp.up_proj.weight.is_meta for layer in layers])

    for layer in layers:
        layer.mlp.register_forward_hook(count)
    with torch.no_grad():
        model(torch.tensor([TOKENS[0]]))
    assert seen == torch.eye(3, dtype=torch.bool).tolist()


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed_model(export(tmp_path, "mixtral"), AutoConfig.from_pretrained(tmp_path / "hf"))
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    build, seen = MegatronModel._build, []

    def built(*arguments: Any) -> Any:
        megatron = build(*arguments)
        linear = [
            expert.linear_fc1
            for layer in megatron.decoder.layers
            for expert in layer.mlp.experts.local_experts
        ]
        for module in linear:
            module.register_forward_hook(
                lambda *_: seen.append(sum(not other.weight.is_meta for other in linear))
            )
        return megatron

    monkeypatch.setattr(MegatronModel, "_build", built)
    side = MegatronModel(MegatronCheckpoint(tmp_path / "save"), torch.float32)
    list(side.logits([torch.tensor(TOKENS[0])]))
    assert seen == [1] * 3 * 4


def test_the_proof_streams_where_the_model_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = export(tmp_path)
    whole, least = (verify.memory_needed(hf, 48, streamed=flag) for flag in (False, True))
    monkeypatch.setattr(
        verify, "memory_needed", lambda *_, streamed=False: least if streamed else whole
    )
    expected = verify_conversion(tmp_path / "save", hf, TOKENS)
    used = []

    def noted(*words: object) -> object:
        used.append(words)
        return streamed_model(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "streamed_model", noted)
    monkeypatch.setattr(verify, "_free_memory", lambda: whole - 1)
    streamed = verify_conversion(tmp_path / "save", hf, TOKENS)
    assert used
    assert streamed.passed
    assert streamed.outputs.hf_loss == expected.outputs.hf_loss
    assert "GB of memory" in streamed.outputs.not_megatron, "the scores of its attention"
    assert expected.passed


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_tensor_that_is_not_there_or_not_known_is_named(tmp_path: Path, name: str) -> None:
    hf = export(tmp_path)
    weights = one_file(hf)
    tensor = weights.pop(name)
    last = name.rsplit(".", maxsplit=2)[-2]
    for state in (weights, weights | {name: tensor, f"{name}_2": tensor.clone()}):
        save_file(state, hf / "model.safetensors", {"format": "pt"})
        with pytest.raises(IncompleteCheckpointError, match=last), torch.no_grad():
            streamed_model(hf, AutoConfig.from_pretrained(hf))(torch.tensor([TOKENS[0]]))
