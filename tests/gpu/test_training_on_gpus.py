"""The tiny recipe at tensor parallel 2 over NCCL. Skipped by name where there are not two GPUs."""

from pathlib import Path

import pytest
from gpu.runs import infoentropy, write_tokens

from megatron_infoentropy.evaluate.runlog import read_log

pytestmark = pytest.mark.multi_gpu
RECIPE = Path(__file__).parents[2] / "examples" / "tiny.yaml"


def test_the_tiny_recipe_learns(tmp_path):
    write_tokens(tmp_path)
    infoentropy(
        *("train", RECIPE, "--data", "tokens", "--tokenizer", "tok", "--run", "run"),
        *("--tensor-parallel", 2, "--ranks", 2, "--", "--train-iters", "30"),
        cwd=tmp_path,
    )
    curve = read_log(tmp_path / "run/train.log").training
    assert curve[30]["cross entropy"] < 0.5 * curve[1]["cross entropy"]
