"""The 6.7B recipe with Transformer Engine's layers in FP8, narrow and shallow, on one GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infoentropy.evaluate.runlog import read_log
from megatron_infoentropy.launch.recipe import load_recipe, to_command_line

pytestmark = pytest.mark.gpu
RECIPE = Path(__file__).parents[2] / "examples" / "paper" / "6.7b.yaml"

# Multiples of 128 everywhere, which blockwise scaling takes without padding.
NARROW = [
    *("--num-layers=2", "--hidden-size=256", "--ffn-hidden-size=512", "--num-attention-heads=4"),
    *("--seq-length=128", "--max-position-embeddings=128", "--vocab-size=1024"),
    *("--micro-batch-size=2", "--global-batch-size=4", "--train-iters=4", "--lr-warmup-iters=1"),
    *("--log-interval=1", "--eval-iters=0", "--mock-data", "--tokenizer-type=NullTokenizer"),
]
FP8_RECIPES = {
    "tensorwise": [],
    "tensorwise, outer layers in bf16": ["--first-last-layers-bf16"],
    "delayed": ["--fp8-amax-history-len=16", "--fp8-amax-compute-algo=max"],
    "blockwise": [],
    "tensorwise, fused output layer": ["--infoentropy-fused-linear"],
}


@pytest.mark.parametrize("choice", FP8_RECIPES)
def test_transformer_engine_builds_and_trains_the_fp8_recipe(choice, tmp_path):
    pytest.importorskip("transformer_engine", reason="FP8 needs Transformer Engine")
    flags = [*to_command_line(load_recipe(RECIPE)), *NARROW, *FP8_RECIPES[choice]]
    flags += ["--fp8-recipe", choice.partition(",")[0]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=1", "-m", "megatron_infoentropy.pretrain", *flags]
    log = tmp_path / "train.log"
    with log.open("w") as file:
        done = subprocess.run(
            command,
            env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, log.read_text()[-5000:]
    curve = read_log(log).training
    assert sorted(curve) == [1, 2, 3, 4]
    assert curve[1]["cross entropy"] == pytest.approx(6.931, abs=0.1)  # ln 1024
