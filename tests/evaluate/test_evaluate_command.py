"""`infoentropy evaluate`: what it says, and what it does not do without being asked."""

from pathlib import Path

import pytest
from tiny_llama import CONTEXT
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
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
