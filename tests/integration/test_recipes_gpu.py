"""The 6.7B recipe with Transformer Engine's layers in FP8, narrow and shallow, on one GPU; a
training in FP8 that is exported; and what `bench-recipe` measures there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infoentropy.evaluate.runlog import read_log
from megatron_infoentropy.launch.recipe import load_recipe, machine_flags, to_command_line
from megatron_infoentropy.runtime.device import find_device

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
    recipe = load_recipe(RECIPE)
    flags = [*machine_flags(find_device(), recipe), *to_command_line(recipe)]
    flags += [*NARROW, *FP8_RECIPES[choice]]
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


SENTENCE = "the same few words again and again, so that there is something to learn"
FP8 = ["--transformer-impl", "transformer_engine", "--fp8-format", "hybrid", "--fp8-recipe"]
# The tiny recipe, in multiples of 128.
WIDE = ["--hidden-size", "256", "--ffn-hidden-size", "512", "--bf16"]


def infoentropy(*words, cwd):
    command = [sys.executable, "-m", "megatron_infoentropy", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_an_fp8_run_is_exported_proved_and_scores_what_it_did_in_training(tmp_path):
    pytest.importorskip("transformer_engine", reason="FP8 needs Transformer Engine")
    lines = [json.dumps({"text": SENTENCE, "meta": {"pile_set_name": "A"}})] * 400
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "proof.txt").write_text(SENTENCE * 40)
    infoentropy("tokenizer", "text.jsonl", "--output", "tok", "--vocab-size", 280, cwd=tmp_path)
    for split in ("train", "validation", "test"):
        infoentropy(
            *("preprocess", "--input", "text.jsonl", "--tokenizer", "tok"),
            *("--output", f"tokens/{split}"),
            cwd=tmp_path,
        )
    infoentropy(
        *("train", RECIPE.parents[1] / "tiny.yaml", "--data", "tokens", "--tokenizer", "tok"),
        *("--run", "run", "--", "--train-iters", "40", *WIDE, *FP8, "tensorwise"),
        cwd=tmp_path,
    )
    # The proof: Megatron's logits of these weights beside transformers', and their losses.
    infoentropy(
        *("convert", "run/checkpoints", "--tokenizer", "tok", "--output", "hf"),
        *("--text", "proof.txt"),
        cwd=tmp_path,
    )
    infoentropy(
        *(
            "evaluate",
            "hf",
            "--data",
            "tokens/validation",
            "--output",
            "run",
            "--dtype",
            "bfloat16",
        ),
        cwd=tmp_path,
    )
    log = read_log(tmp_path / "run/train.log")
    in_fp8 = log.validation[40]["cross entropy value"]
    scores = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert scores["total"]["nats_per_token"] == pytest.approx(in_fp8, abs=0.02)


def test_the_fp8_recipe_is_measured_beside_megatrons_losses(tmp_path):
    pytest.importorskip("transformer_engine", reason="FP8 needs Transformer Engine")
    said = infoentropy(
        *("bench-recipe", RECIPE, "--ranks", 1, "--rounds", 3, "--", *NARROW, "--fp8-recipe"),
        *("tensorwise", "--train-iters", "100"),
        cwd=tmp_path,
    )
    assert "FP8 hybrid tensorwise, else bf16" in said
    for loss in ("infoentropy, fused linear", "megatron unfused", "megatron fused"):
        assert loss in said
    assert "not measured" not in said
