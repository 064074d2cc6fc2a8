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
from train_checkpoints import CASES, IMPORTED, NEW_TOKENS, PROMPT, train_all
from transformers import AutoModelForCausalLM

from megatron_infoentropy.convert import convert_checkpoint, verify_conversion


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<case>/save and <case>/golden.pt: see train_checkpoints.py."""
    folder = tmp_path_factory.mktemp("trained")
    train_all(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def require_logits(model: Any, golden: dict[str, Any], rows: int, atol: float) -> None:
    """Compare a model with what Megatron's computed for a few texts."""
    with torch.no_grad():
        for tokens, expected in zip(golden["tokens"], golden["logits"], strict=True):
            actual, expected = model(torch.tensor([tokens])).logits[0], expected[:, :rows]
            assert expected.abs().max() > 3, "logits near zero would hide mistakes"
            torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
            assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("case", CASES)
def test_an_export_computes_what_megatrons_model_computed(
    trained: Path, tmp_path: Path, case: str
) -> None:
    dtype = "bfloat16" if case == "bf16" else "float32"
    summary = convert_checkpoint(trained / case / "save", tmp_path / "hf")
    assert (summary.vocab_size, summary.dtype) == (250, dtype)
    golden = torch.load(trained / case / "golden.pt")
    verification = verify_conversion(trained / case / "save", tmp_path / "hf", golden["tokens"])
    assert verification.passed, verification
    if case != "bf16":  # in which Megatron computed
        model = load(tmp_path / "hf")
        require_logits(model, golden, 250, 2e-5)
        prompt = torch.tensor([golden["generated"][:PROMPT]])
        generated = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert generated[0].tolist() == golden["generated"]


@pytest.mark.parametrize("case", IMPORTED)
def test_megatrons_trainer_starts_where_the_model_was_and_saves_it_to_the_bit(
    trained: Path, tmp_path: Path, case: str
) -> None:
    """Loaded under TP2, PP2 or EP2 by the trainer itself: its logits are transformers'."""
    golden = torch.load(trained / case / "golden.pt")
    largest = max(logits.abs().max().item() for logits in golden["logits"])
    require_logits(load(trained / case / "hf"), golden, 256, 1e-5 * largest)
    convert_checkpoint(trained / case / "save", tmp_path / "hf")
    assert same(trained / case / "hf", tmp_path / "hf")


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
