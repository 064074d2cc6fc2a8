"""The tiny recipe at tensor parallel 2 over NCCL. Skipped by name where there are not two GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infoentropy.evaluate.runlog import read_log

pytestmark = pytest.mark.multi_gpu
RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"


def infoentropy(*words, cwd):
    command = [sys.executable, "-m", "megatron_infoentropy", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_tiny_recipe_learns(tmp_path):
    text = ["the same few words again and again, so that there is something to learn"] * 400
    lines = [json.dumps({"text": t, "meta": {"pile_set_name": "A"}}) for t in text]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    infoentropy("tokenizer", "text.jsonl", "--output", "tok", "--vocab-size", 280, cwd=tmp_path)
    for split in ("train", "validation", "test"):
        infoentropy(
            *("preprocess", "--input", "text.jsonl", "--tokenizer", "tok"),
            *("--output", f"tokens/{split}"),
            cwd=tmp_path,
        )
    infoentropy(
        *("train", RECIPE, "--data", "tokens", "--tokenizer", "tok", "--run", "run"),
        *("--tensor-parallel", 2, "--ranks", 2, "--", "--train-iters", "30"),
        cwd=tmp_path,
    )
    curve = read_log(tmp_path / "run/train.log").training
    assert curve[30]["cross entropy"] < 0.5 * curve[1]["cross entropy"]
