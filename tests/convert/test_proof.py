"""The proof as a part of the commands: what it reads, insists on, and leaves when it fails."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_command import infoentropy
from tiny_checkpoint import weights_of, write_tiny
from tiny_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

from megatron_infoentropy.convert import (
    Verification,
    convert_checkpoint,
    convert_from_hf,
    prove,
    verify,
)
from megatron_infoentropy.convert.tokenizer import tokenizer_differences
from megatron_infoentropy.convert.verify import LONGEST, sequences_for, why_not_now
from megatron_infoentropy.data.writer import DatasetWriter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `save`, its `tokenizer`, and the Hugging Face folder `hf` made of both."""
    folder = tmp_path_factory.mktemp("proof")
    write_tiny(folder / "save")
    tokenizer = write_tokenizer(folder / "tokenizer", 60)
    convert_checkpoint(folder / "save", folder / "hf", tokenizer=tokenizer)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def convert(folder: Path, *words: object) -> str:
    command = ("convert", "save", "--tokenizer", "tokenizer", "--output", "out")
    return infoentropy(*command, *words, cwd=folder)


def test_the_time_left_counts_both_models_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works: list[int] = []
    totals: list[object] = []

    @contextmanager
    def noted(_: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        totals.append((total, unit))
        yield works.append

    monkeypatch.setattr(verify, "progress", noted)
    prove(folder / "save", folder / "hf")
    assert totals == [(12, "layers")]
    assert works == 3 * [1, 1, 2], "of three texts, two layers of one model and all of the other"


def test_without_a_tokenizer_the_tokens_are_drawn(folder: Path) -> None:
    convert_checkpoint(folder / "save", folder / "bare")
    sequences = sequences_for(folder / "bare")
    assert [len(sequence) for sequence in sequences] == [64, 64, 64]
    assert sequences == sequences_for(folder / "bare")
    different = {token for sequence in sequences for token in sequence}
    assert len(different) > 40
    assert different <= set(range(60))
    assert prove(folder / "save", folder / "bare").tokens == 192


def write_dataset(prefix: Path, tokens: np.ndarray, lengths: list[int]) -> None:
    writer = DatasetWriter(prefix, vocab_size=60, lengths=prefix.with_suffix(".lengths"))
    writer.add(tokens, np.array(lengths))
    writer.finish()


def test_a_held_out_dataset_has_the_same_loss_on_both_sides(folder: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60, 500)
    write_dataset(folder / "held_out", tokens, [7, 293, 200])
    same = [sequences_for(folder / "hf", data=folder / f"held_out{end}") for end in ("", ".bin")]
    assert same[0] == same[1]
    output = convert(folder, "--data", "held_out.bin")
    said = re.search(r"loss of these tokens: ([\d.]+) nats in Megatron, ([\d.]+)", output)
    slices = torch.tensor(np.stack([tokens[:64], tokens[218:282], tokens[436:]]))
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    expected = model(slices, labels=slices).loss.item()
    assert float(said[1]) == pytest.approx(expected, abs=1e-5)
    assert float(said[2]) == pytest.approx(expected, abs=1e-5)


def test_another_loss_is_not_the_same() -> None:
    same = Verification(9, 0.0, 1.0, 1.0, 2.0, 2.00009)
    assert same.passed
    assert not replace(same, hf_loss=2.00011).passed
    assert not replace(same, hf_loss=float("nan")).passed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "absent"], "no such dataset file"),
        (["--data", "short"], "less than two tokens"),
        (["--text", "absent"], "found no file absent"),
        (["--text", "empty"], "empty is empty"),
        (["--text", "a", "--data", "b"], "got both"),
        (["--text", "absent", "--no-verify"], "leave out --no-verify"),
    ],
)
def test_what_cannot_be_compared_on_is_refused_before_anything_is_converted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    (folder / "empty").touch()
    write_dataset(folder / "short", np.array([1]), [1])
    monkeypatch.setattr("megatron_infoentropy.convert.convert_checkpoint", None)
    with pytest.raises(AssertionError, match=said):
        convert(folder, *words)


def test_very_long_contexts_are_compared_on_a_part(folder: Path) -> None:
    path = folder / "hf" / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 131072}
    path.write_text(json.dumps(config))
    assert {len(sequence) for sequence in sequences_for(folder / "hf")} == {LONGEST}


def test_an_output_that_fails_the_proof_never_appears(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "text").write_text("t1 t2 t3 " * 50)
    monkeypatch.setattr(verify, "TOLERANCE", 0.0)
    before = set(folder.iterdir())
    with pytest.raises(AssertionError, match="do not compute the same; logits over 128"):
        convert(folder, "--text", "text")
    assert set(folder.iterdir()) == before


def test_without_the_memory_for_it_the_proof_is_left_out_unless_demanded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "memory_needed", lambda *words, **more: 10**18)
    reason = why_not_now(folder / "hf")
    assert reason is not None
    assert "1000000000.0 GB of memory" in reason
    assert "not verified: comparing the models takes" in convert(folder)
    output = " ".join(convert(folder, "--verify", "--overwrite").split())
    assert "logits over 192 tokens" in output, "three texts of full length"
    assert "same top token 100.00%" in output
    assert "verified" not in convert(folder, "--no-verify", "--overwrite")


@pytest.mark.parametrize("words", [[], ["--no-verify"]])
def test_the_tokenizer_is_looked_at_also_where_the_models_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr(verify, "memory_needed", lambda *words, **more: 10**18)
    monkeypatch.setattr(verify, "tokenizer_differences", lambda _: ["tokenizer: other ids"])
    with pytest.raises(AssertionError, match="tokenizer: other ids"):
        convert(folder, *words)
    assert not (folder / "out").exists()


def test_a_token_that_only_the_settings_name_has_no_row(folder: Path) -> None:
    assert tokenizer_differences(folder / "hf") == []
    path = folder / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<pad>"}))
    result = verify.verify_conversion(folder / "save", folder / "hf", [[1, 2, 3]])
    assert result.differences == ("tokenizer: it has 61 tokens, the model 60 rows",)
    assert not result.passed


def test_the_card_states_how_the_model_was_trained(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_tiny(
        run / "checkpoints",
        infoentropy_objective="infoentropy",
        infoentropy_gamma=2.0,
        infoentropy_sigma=1.0,
        infoentropy_normalization="global",
        infoentropy_z_loss=1e-4,
        infoentropy_backend="auto",
        infoentropy_gamma_schedule="constant",  # as by default
        infoentropy_detach_weight=True,
        infoentropy_verify_checkpoint="checksums",  # not of the loss
        infoentropy_keep_last=3,
        infoentropy_ignore_target=0,
        train_data_path=["0.25", "/somewhere/books", "0.75", "/somewhere/web"],
    )
    versions = {"megatron-core": "0.19.2", "commit": "0123abc"}
    (run / "run.json").write_text(json.dumps({"gamma": 2.0, "versions": versions}))
    convert_checkpoint(run / "checkpoints", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    for row in (
        "| objective | infoentropy |",
        "| gamma | 2.0 |",
        "| normalization | global |",
        "| other settings of the loss | z_loss 0.0001, ignore_target 0 |",
        "| data | 0.25 books 0.75 web |",
        "| iterations | 7 |",
        "| commit at training | 0123abc |",
    ):
        assert row in card
    assert "/somewhere" not in card
    parameters = sum(tensor.numel() for tensor in weights_of(tmp_path / "hf").values())
    assert f"{parameters:,} parameters" in card


def test_the_card_names_the_model_that_training_started_from(tmp_path: Path) -> None:
    hub, start = tmp_path / "models--some--model-1B" / "snapshots" / "0123abc", tmp_path / "start"
    convert_checkpoint(write_tiny(tmp_path / "save"), hub)
    convert_from_hf(hub, start)
    write_tiny(tmp_path / "run", pretrained_checkpoint=str(start))
    for name, base, said in (
        ("save", None, "Pre-trained with Megatron-Core"),
        ("start", "some/model-1B", "Converted from `some/model-1B`, and not trained since"),
        ("run", "some/model-1B", "Trained further, from `some/model-1B`, with"),
        ("run", None, "Trained further, from `start`, with"),  # which has gone since
    ):
        convert_checkpoint(tmp_path / name, tmp_path / "hf", overwrite=True)
        _, facts, text = (tmp_path / "hf" / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(facts).get("base_model") == base
        assert ("base_model_relation: finetune" in facts) == (base is not None)
        assert said in text
        if name == "run" and start.exists():
            start.rename(tmp_path / "elsewhere")
