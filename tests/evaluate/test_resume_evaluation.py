"""An evaluation that is interrupted goes on; several processes give the same bits as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import score

from megatron_infoentropy.evaluate import perplexity
from megatron_infoentropy.evaluate.evaluation import (
    DOCUMENTS_FILE,
    SUMMARY_FILE,
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

    def score_chunk(model, dataset, selection, rows, *rest):
        if len(begun) == chunks:
            raise KeyboardInterrupt
        begun.append(rows)
        return real(model, dataset, selection, rows, *rest)

    monkeypatch.setattr(perplexity, "score_chunk", score_chunk)
    return begun


@pytest.fixture
def interrupted(model, dataset, tmp_path, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, dataset, tmp_path / "run")
    return tmp_path / "run"


def numbers(folder: Path) -> dict:
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    return summary | {"files": None}  # archives carry the time


def test_it_goes_on_where_it_stopped_and_gives_the_same_bits(
    model, dataset, interrupted, tmp_path, monkeypatch
):
    begun = interrupt_after(monkeypatch, 100)
    evaluate(model, dataset, interrupted)
    resumed = len(begun)
    evaluate(model, dataset, tmp_path / "whole")
    assert len(begun) - resumed == resumed + 3
    assert numbers(interrupted) == numbers(tmp_path / "whole")
    assert not (interrupted / PARTS).exists()
    one, other = (load_evaluation(folder) for folder in (interrupted, tmp_path / "whole"))
    np.testing.assert_array_equal(one.documents.ce, other.documents.ce)
    np.testing.assert_array_equal(one.token_scores, other.token_scores)


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
    part = interrupted / PARTS / "000001.npz"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(UnfinishedEvaluationError, match=r"part 1 of .* repeat the command"):
        evaluate(model, dataset, interrupted)
    assert evaluate(model, dataset, interrupted).summary["data"]["complete"]


def test_two_processes_give_the_same_bits_as_one(model, dataset, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "megatron_infoentropy", "evaluate", str(model)),
            *("--data", str(dataset), "--token-counts", str(dataset / "token_counts.npy")),
            *("--output", str(tmp_path / "two"), "--batch-tokens", "2", "--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    evaluate(model, dataset, tmp_path / "one")
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    one, two = (load_evaluation(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_array_equal(one.documents.ce, two.documents.ce)
    np.testing.assert_array_equal(one.token_scores, two.token_scores)
    assert done.stdout.count("worst case") == 1, "only one of them speaks"
    assert "separate windows of 16 tokens" in done.stdout
