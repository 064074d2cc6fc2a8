"""Checkpoints of Megatron's own trainer: exported, and started from imported models.

In one file, so that they are trained once.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import same
from torch.nn.functional import cross_entropy
from train_checkpoints import IMPORTED, train_all
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron_infoentropy.convert import convert_checkpoint, convert_from_hf, verify_conversion
from megatron_infoentropy.launch.recipe import load_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<case>/save and <case>/golden.pt: see train_checkpoints.py."""
    folder = tmp_path_factory.mktemp("trained")
    train_all(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "case", ["tp2", "pp2", "other", "hybrid", "rope32", "experts", "pre_softmax"]
)
def test_an_export_computes_what_megatrons_model_computed(
    trained: Path, tmp_path: Path, case: str
) -> None:
    summary = convert_checkpoint(trained / case / "save", tmp_path / "hf")
    assert (summary.vocab_size, summary.dtype) == (250, "float32")
    golden = torch.load(trained / case / "golden.pt")
    model = load(tmp_path / "hf")
    with torch.no_grad():
        for tokens, expected in zip(golden["tokens"], golden["logits"], strict=True):
            actual = model(torch.tensor([tokens])).logits[0]
            targets = torch.tensor(tokens[1:])
            losses = [cross_entropy(z[:-1, :250], targets).item() for z in (actual, expected)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-5), "nats a token"
            assert expected.abs().max() > 3, "logits near zero would hide mistakes"
            torch.testing.assert_close(actual, expected[:, :250], atol=2e-5, rtol=0)
            assert torch.equal(actual.argmax(-1), expected[:, :250].argmax(-1))
        prompt = torch.tensor([golden["generated"][:16]])
        generated = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert generated[0].tolist() == golden["generated"]


@pytest.mark.parametrize("case", ["tp2", "other", "bf16", "experts"])
def test_the_check_passes_for_real_checkpoints(trained: Path, tmp_path: Path, case: str) -> None:
    convert_checkpoint(trained / case / "save", tmp_path / "hf")
    tokens = torch.load(trained / case / "golden.pt")["tokens"]
    verification = verify_conversion(trained / case / "save", tmp_path / "hf", tokens)
    assert verification.passed, verification
    assert verification.max_difference <= 1e-5 * verification.max_logit


def test_auto_keeps_the_dtype_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    save = trained / "bf16" / "save"
    assert convert_checkpoint(save, tmp_path / "auto").dtype == "bfloat16"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "auto").dtype == torch.bfloat16
    convert_checkpoint(save, tmp_path / "fp32", dtype="float32")
    pairs = zip(load(tmp_path / "auto").parameters(), load(tmp_path / "fp32").parameters())  # noqa: B905
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("case", IMPORTED)
def test_megatrons_trainer_starts_where_the_model_was(trained: Path, case: str) -> None:
    """Loaded under TP2 or PP2 by the trainer itself: its first loss and its logits are HF's."""
    golden = torch.load(trained / case / "golden.pt")
    model = AutoModelForCausalLM.from_pretrained(trained / case / "hf", dtype=torch.float32).eval()
    batch = golden["batch"]
    with torch.no_grad():
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        assert golden["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
        assert abs(loss.item() - torch.tensor(256.0).log().item()) > 1, "a loss that says something"
        for tokens, expected in zip(golden["tokens"], golden["logits"], strict=True):
            actual = model(torch.tensor([tokens])).logits[0]
            largest = expected.abs().max().item()
            torch.testing.assert_close(actual, expected, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("case", IMPORTED)
def test_what_the_trainer_saves_again_is_the_same_model_to_the_bit(
    trained: Path, tmp_path: Path, case: str
) -> None:
    convert_checkpoint(trained / case / "save", tmp_path / "hf")
    assert same(trained / case / "hf", tmp_path / "hf")


def test_the_flags_are_a_recipe(trained: Path, tmp_path: Path) -> None:
    summary = convert_from_hf(trained / "qwen3" / "hf", tmp_path / "megatron")
    assert load_recipe(tmp_path / "megatron" / "model.yaml") == summary.flags
    assert summary.flags["qk-layernorm"] is True
    assert summary.flags["kv-channels"] == 16


def test_conversion_needs_neither_megatron_nor_transformers(trained: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["megatron"] = sys.modules["transformers"] = None  # importing them would fail
from pathlib import Path
from megatron_infoentropy.convert import convert_checkpoint
convert_checkpoint(Path({str(trained / "tp2" / "save")!r}), Path({str(tmp_path / "hf")!r}))
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)
    assert (tmp_path / "hf" / "config.json").is_file()
