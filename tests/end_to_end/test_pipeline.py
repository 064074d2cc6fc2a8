"""The demo in miniature, by the commands a user types: text to report, and resume elsewhere."""

import json
import math
import pydoc_data.topics
import shutil
from pathlib import Path

import pytest
from run_command import infoentropy

from megatron_infoentropy.evaluate.runlog import read_log

RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"
SMALL = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "4"),
    *("--global-batch-size", "8", "--log-interval", "1", "--eval-iters", "1"),
    *("--init-method-std", "0.1", "--train-iters", "12", "--lr-warmup-iters", "2"),
    *("--use-rope-scaling", "--rope-scaling-factor", "32"),
]


def train(folder, run, *words, extra=()):
    infoentropy(
        *("train", RECIPE, "--data", "tokens", "--tokenizer", "tokenizer", "--run", run),
        *(*words, "--", *SMALL, *extra),
        cwd=folder,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ranks_start_fast):
    """Text, tokenizer, datasets and two trainings: whole, and resumed elsewhere after step 8."""
    folder = tmp_path_factory.mktemp("pipeline")
    topics = sorted(pydoc_data.topics.topics.items())
    for split, documents in {
        "train": topics[8:],
        "validation": topics[:4],
        "test": topics[4:8],
    }.items():
        lines = [
            json.dumps({"text": text, "meta": {"pile_set_name": "AB"[i % 2]}})
            for i, (_, text) in enumerate(documents)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    infoentropy(
        *("tokenizer", "train.jsonl", "--output", "tokenizer", "--vocab-size", 500), cwd=folder
    )
    for split in ("train", "validation", "test"):
        infoentropy(
            *("preprocess", "--input", f"{split}.jsonl", "--tokenizer", "tokenizer"),
            *("--output", f"tokens/{split}"),
            cwd=folder,
        )
    train(folder, "whole", "--tensor-parallel", 2, extra=("--save-interval", "8"))
    stop_after(8, folder / "whole", folder / "resumed")
    train(folder, "resumed", "--pipeline-parallel", 2)
    return folder


def stop_after(iteration, whole, stopped):
    """What is left of a run that was killed soon after it saved this iteration."""
    shutil.copytree(whole, stopped)
    checkpoints = stopped / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    shutil.rmtree(checkpoints / "iter_0000012")
    log = stopped / "train.log"
    log.write_text(log.read_text().partition(f" iteration {iteration + 1:8d}/")[0])


def test_a_run_resumed_under_another_layout_continues_its_curve(folder):
    whole, resumed = (read_log(folder / run / "train.log").training for run in ("whole", "resumed"))
    assert list(whole) == list(resumed) == list(range(1, 13))
    for iteration in range(1, 13):
        for name in ("objective", "cross entropy", "entropy", "weight"):
            expected = whole[iteration][name]
            if iteration == 10:  # Megatron keeps the first line after a start in the next's mean
                expected = (whole[9][name] + expected) / 2
            got = resumed[iteration][name]
            assert got == pytest.approx(expected, rel=1e-5), f"{name} at iteration {iteration}"
    assert whole[12]["cross entropy"] < whole[1]["cross entropy"] - 0.1
    facts = json.loads((folder / "resumed/run.json").read_text())
    assert (facts["tensor_parallel"], facts["pipeline_parallel"]) == (1, 2)


def test_validation_reports_plain_cross_entropy(folder):
    last = read_log(folder / "whole/train.log").validation[12]
    assert set(last) == {"cross entropy", "cross entropy PPL"}
    assert last["cross entropy PPL"] == pytest.approx(math.exp(last["cross entropy"]), rel=1e-5)


@pytest.fixture(scope="module")
def evaluated(folder):
    for run in ("whole", "resumed"):
        infoentropy(
            *("convert", f"{run}/checkpoints", "--tokenizer", "tokenizer"),
            *("--output", f"{run}/hf", "--verify", "--text", "test.jsonl"),
            cwd=folder,
        )
        infoentropy(
            *("evaluate", f"{run}/hf", "--data", "tokens/test", "--output", run),
            *("--token-counts", "tokens/train/token_counts.npy"),
            cwd=folder,
        )
    return folder


def test_both_exports_are_the_same_model(evaluated):
    """Trained at TP2 throughout, and at TP2 then PP2: the same perplexities to rounding."""
    first, second = (
        json.loads((evaluated / run / "evaluation.json").read_text())
        for run in ("whole", "resumed")
    )
    assert first["domains"].keys() == {"A", "B"}
    for kind in ("domains", "buckets"):
        for name, values in first[kind].items():
            assert second[kind][name]["nats_per_token"] == pytest.approx(
                values["nats_per_token"], rel=1e-3
            )


def test_a_checkpoint_is_evaluated_as_its_export_is(evaluated, monkeypatch):
    """Straight from what Megatron saved at TP2, with the tokenizer that its arguments name."""
    monkeypatch.chdir(evaluated)
    infoentropy(
        *("evaluate", "whole/checkpoints", "--data", "tokens/test", "--output", "direct"),
        *("--token-counts", "tokens/train/token_counts.npy", "--device", "cpu"),
        cwd=evaluated,
    )
    direct, exported = (
        json.loads(Path(run, "evaluation.json").read_text()) for run in ("direct", "whole")
    )
    assert (direct["model"]["kind"], direct["model"]["iteration"]) == ("megatron", 12)
    assert direct["model"]["weights_sha256"] == exported["model"]["weights_sha256"]
    assert direct["data"] == exported["data"]
    nats = exported["total"]["nats_per_token"]
    assert direct["total"]["nats_per_token"] == pytest.approx(nats, rel=1e-6)
