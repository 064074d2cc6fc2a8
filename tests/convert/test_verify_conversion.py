"""The check fails for every mistake a conversion has been seen to make."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoint import (
    FAMILIES,
    TOKENS,
    export_tiny,
    hybrid_twin,
    tiny_args,
    tiny_tensors,
    write_checkpoint,
)
from torch import Tensor

from megatron_infoentropy.convert import convert_checkpoint, verify, verify_conversion
from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.layout import LAYOUTS, split_qkv
from megatron_infoentropy.convert.reference_model import ReferenceModel
from megatron_infoentropy.convert.verify import TOLERANCE


def naive_qkv(qkv: Tensor, model: Architecture) -> tuple[Tensor, ...]:
    """All queries, then all keys, then all values: not how Megatron stores them."""
    heads = (model.num_attention_heads, model.num_query_groups, model.num_query_groups)
    return qkv.split([number * model.kv_channels for number in heads])


def unpaired_qkv(qkv: Tensor, model: Architecture) -> tuple[Tensor, ...]:
    return split_qkv(qkv, replace(model, rotary_interleaved=False))


def unchanged(tensor: Tensor, model: Architecture) -> tuple[Tensor]:
    return (tensor,)


INTERLEAVED = {"rotary_interleaved": True}


@pytest.mark.parametrize(
    ("layout", "mistake", "changes"),
    [
        ("qkv", naive_qkv, {}),
        ("qkv", naive_qkv, {"group_query_attention": False}),
        ("qkv", unpaired_qkv, INTERLEAVED),
        ("gate_up", lambda fc1, _: fc1.chunk(2)[::-1], {}),
        ("gate_up", lambda fc1, _: fc1.chunk(2)[::-1], FAMILIES["mixtral"]),
        ("vocabulary", lambda table, model: (table[1 : model.vocab_size + 1],), {}),
        ("norm", unchanged, {"layernorm_zero_centered_gamma": True}),
        ("head_norm", unchanged, FAMILIES["qwen3"] | INTERLEAVED),
        ("qkv_by_head", unchanged, FAMILIES["gpt_neox"] | INTERLEAVED),
        ("qkv_in_columns", lambda qkv, _: (qkv.t().contiguous(),), FAMILIES["gpt2"]),
        ("and_zeros", lambda w, _: (w, w[:, 0]), FAMILIES["qwen2"] | {"kv_channels": 12}),
    ],
)
def test_a_wrong_layout_fails_the_check(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    mistake: Callable[[Tensor, Architecture], tuple[Tensor, ...]],
    changes: dict[str, Any],
) -> None:
    monkeypatch.setitem(LAYOUTS, layout, LAYOUTS[layout]._replace(to_hf=mistake))
    export_tiny(tmp_path, **changes)
    verification = verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS)
    assert not verification.passed
    assert verification.max_difference > 0.1


ROPE = {"rope_type": "default", "rope_theta": 10001.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rms_norm_eps": 1e-6}),
        ("llama", {"rope_parameters": ROPE}),
        ("llama", {"hidden_act": "gelu"}),
        ("gpt_neox", {"hidden_act": "gelu_pytorch_tanh"}),
        ("gpt_neox", {"use_parallel_residual": True}),
        ("gpt_neox", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}),
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"layer_norm_epsilon": 1e-6}),
        ("qwen2", {"rms_norm_eps": 1e-6}),
        ("qwen2", {"model_type": "llama", "attention_bias": False}),
        ("qwen3", {"rope_parameters": ROPE}),
    ],
)
def test_a_wrong_configuration_fails_the_check(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    export_tiny(tmp_path, **FAMILIES[family])
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    verification = verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS)
    assert verification.max_difference > TOLERANCE * verification.max_logit
    assert not verification.passed


def test_a_vocabulary_cut_off_by_one_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as wrong:
        wrong.setattr("megatron_infoentropy.convert.architecture._true_vocab_size", lambda *_: 59)
        export_tiny(tmp_path)
    tokens = [[token for token in sequence if token < 59] for sequence in TOKENS]
    verification = verify_conversion(tmp_path / "save", tmp_path / "hf", tokens)
    assert verification.differences == ("vocabulary: 59 rows, trained with 60",)
    assert not verification.passed


@pytest.mark.parametrize("more", [0.01, float("nan")])
def test_a_single_wrong_weight_fails_the_check(tmp_path: Path, more: float) -> None:
    path = export_tiny(tmp_path) / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += more
    save_file(tensors, path, {"format": "pt"})
    assert not verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS).passed


@pytest.mark.parametrize("layers", [(0, 2), (1, 3)])
def test_two_layers_of_a_hybrid_in_another_order_fail_the_check(
    tmp_path: Path, layers: tuple[int, int]
) -> None:
    """What both sides might take for the same, if they shared how layers are counted."""
    args, tensors = hybrid_twin(tiny_args(), tiny_tensors(tiny_args()))
    write_checkpoint(tmp_path / "save", args, tensors)
    convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    one, other = (f"decoder.layers.{number}." for number in layers)
    swapped = {
        name.replace(here, there): tensor
        for here, there in ((one, other), (other, one))
        for name, tensor in tensors.items()
        if name.startswith(here)
    }
    write_checkpoint(tmp_path / "swapped", args, tensors | swapped)
    assert not verify_conversion(tmp_path / "swapped", tmp_path / "hf", TOKENS).same_outputs


def test_tokens_the_model_has_not_are_an_error(tmp_path: Path) -> None:
    export_tiny(tmp_path)
    tokens: list[list[list[int]]] = [[], [[]], [[60]], [[-1]], [[1] * 65]]
    for sequences in tokens:
        with pytest.raises(ValueError, match="expected"):
            verify_conversion(tmp_path / "save", tmp_path / "hf", sequences)


def test_the_check_does_not_look_at_the_conversion_for_the_truth() -> None:
    for name, of in (("reference_model", "layers"), ("layers", "checkpoint")):
        path = Path(verify.__file__).with_name(f"{name}.py")
        lines = [line for line in path.read_text().splitlines() if "megatron_infoentropy" in line]
        assert [line.split()[1].rpartition(".")[2] for line in lines] == [of]


@pytest.mark.parametrize(("difference", "same"), [(1e-7, True), (1e-2, False)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("side", ["Megatron's own", "plain"])
def test_only_rounding_may_send_a_token_to_other_experts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    family: str,
    difference: float,
    same: bool,
) -> None:
    """The logits of the experts 2 and 3 differ by a share, and Megatron's side swaps them."""
    args = tiny_args(**FAMILIES[family])
    tensors = tiny_tensors(args)
    router = tensors["decoder.layers.mlp.router.weight"]
    router[:, 3] = router[:, 2] * (1 + difference)
    write_checkpoint(tmp_path / "save", args, tensors)
    convert_checkpoint(tmp_path / "save", tmp_path / "hf")
    assert not verify.why_not_megatron()  # which imports it
    from megatron.core.transformer.moe import router as megatrons

    of, name = megatrons, "topk_routing_with_score_function"
    if side == "plain":
        of, name = ReferenceModel, "_route"
        monkeypatch.setattr(verify, "why_not_megatron", lambda: "the other form is wanted")
    choose = getattr(of, name)

    def swapped(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Choose as if the two were each other, and give what is chosen its own shares."""
        logits = next(each for each in arguments if isinstance(each, Tensor))
        turned = (logits[:, [0, 1, 3, 2]] if each is logits else each for each in arguments)
        _, chosen = choose(*turned, **named)
        shares = logits.softmax(-1)
        shares = shares.gather(1, chosen) if side == "plain" else shares * chosen
        whole = 1.0 if family == "qwen3_moe" else shares.sum(-1, keepdim=True)
        return shares / whole, chosen

    monkeypatch.setattr(of, name, swapped)
    result = verify_conversion(tmp_path / "save", tmp_path / "hf", TOKENS)
    assert result.passed == same, str(result)
    assert bool(result.not_megatron) == (side == "plain")
