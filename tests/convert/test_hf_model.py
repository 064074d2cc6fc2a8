"""Models of transformers: layer by layer with the memory of one, and of a checkpoint itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import FAMILIES, TOKENS, weights_of, write_tiny
from tiny_tokenizer import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_infoentropy.convert import (
    ConversionError,
    convert_checkpoint,
    verify,
    verify_conversion,
)
from megatron_infoentropy.convert.checkpoint import MegatronCheckpoint
from megatron_infoentropy.convert.hf_model import (
    is_checkpoint,
    streamed_model,
    tokenizer_of,
    training_tokenizer_sha256,
)
from megatron_infoentropy.convert.megatron_model import MegatronModel
from megatron_infoentropy.data.manifest import DomainFacts, Manifest, TokenizerFacts


def export(folder: Path, family: str = "llama") -> Path:
    write_tiny(folder / "save", **FAMILIES[family], num_layers=3)
    convert_checkpoint(folder / "save", folder / "hf", shard_bytes=60_000)
    return folder / "hf"


def streamed(hf: Path) -> Any:
    return streamed_model(hf, AutoConfig.from_pretrained(hf))


def one_file(hf: Path) -> dict[str, torch.Tensor]:
    """The folder's weights, whose files are removed."""
    weights = weights_of(hf)
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
        assert torch.equal(streamed(hf)(ids).logits, expected)


def materialized_when_run(modules: list[Any]) -> list[int]:
    """Return a list that gets, when any of them is run, how many have their weights in memory."""
    seen: list[int] = []
    for module in modules:
        module.register_forward_hook(
            lambda *_: seen.append(sum(not other.weight.is_meta for other in modules))
        )
    return seen


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = streamed(export(tmp_path))
    seen = materialized_when_run([layer.mlp.up_proj for layer in model.model.layers])
    with torch.no_grad():
        model(torch.tensor([TOKENS[0]]))
    assert seen == [1] * 3


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(export(tmp_path, "mixtral"))
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    build, seen = MegatronModel._build, []

    def built(*arguments: Any) -> Any:
        megatron = build(*arguments)
        experts = [layer.mlp.experts.local_experts for layer in megatron.decoder.layers]
        seen.append(materialized_when_run([e.linear_fc1 for each in experts for e in each]))
        return megatron

    monkeypatch.setattr(MegatronModel, "_build", built)
    side = MegatronModel(MegatronCheckpoint(tmp_path / "save"), torch.float32)
    side.logits(torch.tensor(TOKENS[0]), lambda layers: None)
    assert seen == [[1] * 3 * 4]


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
    result = verify_conversion(tmp_path / "save", hf, TOKENS)
    assert used
    assert result.passed
    assert result.hf_loss == expected.hf_loss
    assert "GB of memory" in result.not_megatron, "the scores of its attention"
    assert expected.passed


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    hf = export(tmp_path)
    weights = one_file(hf)
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        tensor = weights[name]
        without = {n: t for n, t in weights.items() if n != name}
        more, fewer = {f"{name}_2": tensor.clone()}, {name: tensor[:-1].clone()}
        for state in (without, weights | more, without | fewer):
            save_file(state, hf / "model.safetensors", {"format": "pt"})
            with pytest.raises(ConversionError, match=name.rsplit(".", maxsplit=2)[-2]):
                streamed(hf)


def test_an_expert_that_is_not_there_is_named(tmp_path: Path) -> None:
    hf = export(tmp_path, "mixtral")
    weights = one_file(hf)
    del weights["model.layers.2.block_sparse_moe.experts.3.w3.weight"]
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers\.2.*experts\.3\.up_proj"):
        streamed(hf)


def test_a_checkpoint_whose_tokenizer_is_gone_asks_for_it(tmp_path: Path) -> None:
    named = tmp_path / "tokenizer"
    opened = MegatronCheckpoint(write_tiny(tmp_path / "save", tokenizer_model=str(named)))
    with pytest.raises(ValueError, match=f"{named}', where there is no tokenizer"):
        tokenizer_of(opened)
    write_tokenizer(named, 60)
    assert tokenizer_of(opened) == named


def test_the_training_data_says_with_which_tokenizer_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, here = tmp_path / "data" / "train", tmp_path / "here"
    save = write_tiny(
        tmp_path / "save", train_data_path=["0.4", str(data / "web"), "0.6", str(data / "code")]
    )
    opened = MegatronCheckpoint(save)
    assert is_checkpoint(save)
    assert not is_checkpoint(tmp_path)
    assert training_tokenizer_sha256(opened) is None
    data.mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)

    def write_manifest(folder: Path, sha256: str) -> None:
        domains = {"Code": DomainFacts("code", documents=0, tokens=0, bytes=0)}
        facts = TokenizerFacts(sha256, 60, 59)
        Manifest(
            folder=folder, tokenizer=facts, dtype="uint16", append_eod=True, domains=domains
        ).save()

    write_manifest(here, "of other data, beside the weight 0.4")
    assert training_tokenizer_sha256(opened) is None
    (data / "manifest.json").write_text('{"files": []}')  # of another program
    assert training_tokenizer_sha256(opened) is None
    write_manifest(data, "abc")
    assert training_tokenizer_sha256(opened) == "abc"
