"""An evaluation that is interrupted goes on; several processes give the same bits as one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import open_store
from tiny_llama import score
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.evaluate import perplexity
from megatron_infoentropy.evaluate.evaluation import (
    DOCUMENTS_FILE,
    UnfinishedEvaluationError,
    load_evaluation,
)

SMALL = {"batch_tokens": 2}  # chunks of about 32 tokens: nine of them
PARTS = "evaluation.unfinished"


def evaluate(model: Path, dataset: Path, output: Path, **options):
    return score(model, dataset, output=output, **SMALL | options)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> list[slice]:
    """The process dies before its next chunk; returns which chunks were begun."""
    begun: list[slice] = []
    real = perplexity.score_chunk

    def score_chunk(job, rows, advance):
        if len(begun) == chunks:
            raise KeyboardInterrupt
        begun.append(rows)
        return real(job, rows, advance)

    monkeypatch.setattr(perplexity, "score_chunk", score_chunk)
    return begun


@pytest.fixture
def interrupted(model, dataset, tmp_path, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, dataset, tmp_path / "run")
    return tmp_path / "run"


def assert_equal(*folders: Path) -> None:
    one, other = map(load_evaluation, folders)
    assert one.summary | {"files": None} == other.summary | {"files": None}  # these carry the time
    np.testing.assert_array_equal(one.documents.ce, other.documents.ce)
    np.testing.assert_array_equal(one.token_scores, other.token_scores)


def test_it_goes_on_where_it_stopped_and_gives_the_same_bits(
    model, dataset, interrupted, tmp_path, monkeypatch
):
    begun = interrupt_after(monkeypatch, 100)
    evaluate(model, dataset, interrupted)
    resumed = len(begun)
    evaluate(model, dataset, tmp_path / "whole")
    assert len(begun) - resumed == resumed + 3
    assert not (interrupted / PARTS).exists()
    assert_equal(interrupted, tmp_path / "whole")


def test_a_part_is_never_read_as_a_result(interrupted):
    assert sorted(path.name for path in interrupted.iterdir()) == [PARTS]
    with pytest.raises(UnfinishedEvaluationError, match="a part is no result: repeat its"):
        load_evaluation(interrupted)


def test_an_earlier_result_stays_until_the_new_one_is_whole(model, dataset, tmp_path, monkeypatch):
    evaluate(model, dataset, tmp_path)
    before = (tmp_path / DOCUMENTS_FILE).read_bytes()
    interrupt_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, dataset, tmp_path, overwrite=True)
    assert (tmp_path / DOCUMENTS_FILE).read_bytes() == before
    load_evaluation(tmp_path)


def test_another_evaluation_is_not_mixed_in(model, other_model, dataset, interrupted):
    with pytest.raises(UnfinishedEvaluationError, match="another scoring"):
        evaluate(model, dataset, interrupted, stride=3)
    with pytest.raises(UnfinishedEvaluationError, match="another model"):
        evaluate(other_model, dataset, interrupted)
    first = dataset / "domain_0.bin"
    changed = first.stat()
    os.utime(first, ns=(changed.st_atime_ns, changed.st_mtime_ns + 1))
    try:
        with pytest.raises(UnfinishedEvaluationError, match="another data: name another --output"):
            evaluate(model, dataset, interrupted)
    finally:
        os.utime(first, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    restarted = evaluate(other_model, dataset, interrupted, restart=True)
    assert restarted.summary["data"]["complete"]


def test_a_damaged_part_is_scored_again(model, dataset, interrupted):
    part = interrupted / PARTS / "scores_000001.npz"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(UnfinishedEvaluationError, match=r"part 1 of .* repeat the command"):
        evaluate(model, dataset, interrupted)
    assert evaluate(model, dataset, interrupted).summary["data"]["complete"]


def test_two_processes_give_the_same_bits_as_one(model, dataset, tmp_path, monkeypatch):
    """As torchrun starts them, but that the first of them is this one."""
    store, rendezvous = open_store()
    ranks = {"WORLD_SIZE": "2", **rendezvous}
    words = ["evaluate", model, "--data", dataset, "--token-counts", dataset / "token_counts.npy"]
    words += ["--output", tmp_path / "two", "--batch-tokens", "2", "--device", "cpu"]
    other = subprocess.Popen(
        [sys.executable, "-m", "megatron_infoentropy", *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ranks | {"RANK": "1", "OMP_NUM_THREADS": "1"},
    )
    for name, value in (ranks | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    try:
        done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
        assert other.communicate(timeout=60)[0] == "", "only one of them speaks"
    finally:
        other.kill()
        del store
    assert (done.exit_code, other.returncode) == (0, 0)
    assert "separate windows of 16 tokens" in done.output
    monkeypatch.delenv("WORLD_SIZE")
    evaluate(model, dataset, tmp_path / "one")
    assert_equal(tmp_path / "one", tmp_path / "two")
