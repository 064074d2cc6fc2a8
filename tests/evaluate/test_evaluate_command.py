"""`infoentropy evaluate`: what it says, and what it does not do without being asked."""

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
from tiny_llama import CONTEXT, write_model
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import train_tokenizer
from megatron_infoentropy.evaluate.evaluation import SUMMARY_FILE


@pytest.fixture
def said(model, dataset, tmp_path):
    def evaluate(*options: str, output: Path = tmp_path / "run", counts: str = "") -> str:
        words = ["evaluate", model, "--data", dataset, "--output", output, "--device", "cpu"]
        words += ["--token-counts", counts or dataset / "token_counts.npy", *options]
        done = CliRunner().invoke(app, list(map(str, words)))
        return " ".join(done.output.split()) if done.exit_code == 0 else str(done.exception)

    return evaluate


def test_windows_that_do_not_overlap_are_called_separate(said, tmp_path):
    assert f"separate windows of {CONTEXT} tokens;" in said()
    slid = said("--stride", "4", output=tmp_path / "other")
    assert f"windows of {CONTEXT} tokens that slide by 4;" in slid
    packed = said("--packed", output=tmp_path / "packed")
    assert f"separate windows of {CONTEXT} tokens, packed;" in packed


def test_the_thirds_are_printed_with_the_share_that_they_really_hold(said):
    printed = said()
    total = int(printed.split("total ", 1)[1].split()[0])
    shares = []
    for name in ("easy", "medium", "hard"):
        line = printed.split(f" {name} ")[-1]  # the bucket of that name comes before
        shares.append(float(line.split("% of all")[0].split()[-1]))
        assert shares[-1] == pytest.approx(100 * int(line.split()[0]) / total, abs=0.06)
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_a_finished_evaluation_is_replaced_only_when_asked(said, tmp_path):
    said("--max-tokens", "100")
    before = (tmp_path / "run" / SUMMARY_FILE).read_bytes()
    refusal = said()
    assert "holds a finished evaluation" in refusal
    assert "--overwrite" in refusal
    assert (tmp_path / "run" / SUMMARY_FILE).read_bytes() == before
    assert "nats/token" in said("--overwrite")
    assert (tmp_path / "run" / SUMMARY_FILE).read_bytes() != before


def test_token_counts_that_cannot_be_read_are_named_with_the_cure(said, tmp_path):
    missing = tmp_path / "token_counts.npy"
    assert f"no token counts in {missing}" in said(counts=str(missing))
    missing.write_text("no array")
    assert f"{missing} holds no token counts" in said(counts=str(missing))
    assert "infoentropy preprocess" in said(counts=str(missing))


TEXTS = {
    "prose": ["One day the sun rose late.", "Nobody could say why."],
    "code/python": ["def rise(sun):\n    return sun + 1\n", "rise(0)\n"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with text/, a model with a tokenizer of that text, and tokens with named domains."""
    folder = tmp_path_factory.mktemp("text")
    lines = []
    for name, texts in TEXTS.items():
        path = folder / "text" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        lines += [json.dumps({"text": text, "meta": {"pile_set_name": name}}) for text in texts]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    size = train_tokenizer(folder / "all.jsonl", folder / "hf", vocab_size=270).vocab_size
    write_model(folder / "model", seed=1, vocab_size=size)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "model" / name, folder / "hf")
    preprocess([folder / "all.jsonl"], folder / "hf", folder / "tokens")
    return folder


def evaluate_text(trained: Path, output: Path, *words: str) -> str:
    counts = trained / "tokens" / "token_counts.npy"
    words = ("evaluate", trained / "hf", "--token-counts", counts, "--output", output, *words)
    done = CliRunner().invoke(app, [*map(str, words), "--device", "cpu"])
    return done.output if done.exit_code == 0 else str(done.exception)


def test_a_folder_of_jsonl_files_is_scored_a_domain_a_file(trained, tmp_path):
    evaluate_text(trained, tmp_path / "named", "--data", str(trained / "tokens"))
    evaluate_text(trained, tmp_path / "files", "--text", str(trained / "text"))
    named, files = (
        json.loads((tmp_path / name / SUMMARY_FILE).read_text()) for name in ("named", "files")
    )
    assert set(files["domains"]) == set(TEXTS)
    assert files["domains"] == named["domains"], "to the bit"
    for name, texts in TEXTS.items():
        scores = files["domains"][name]
        bits = scores["nats_per_token"] * scores["tokens"] / math.log(2)
        assert scores["bits_per_byte"] == pytest.approx(bits / sum(map(len, texts)))
    assert files["total"]["nats_per_token"] == pytest.approx(named["total"]["nats_per_token"])


def test_what_is_no_text_to_score_is_refused(trained, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    said = evaluate_text(trained, tmp_path, "--text", str(tmp_path / "text"))
    assert "expected .jsonl, .jsonl.gz or .jsonl.zst files below" in said
    assert "expected --data DATASET, or --text" in evaluate_text(trained, tmp_path)
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / "text" / name).write_text('{"text": "a"}\n')
    (tmp_path / "text" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    said = evaluate_text(trained, tmp_path, "--text", str(tmp_path / "text"))
    assert "holds a.jsonl twice" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--text is for one process" in evaluate_text(
        trained, tmp_path, "--text", str(trained / "text")
    )
