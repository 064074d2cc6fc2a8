"""The 6.7B recipe with Transformer Engine's layers in FP8, narrow and shallow, on one GPU; a
training in FP8 that is exported; and what `bench-recipe` measures there."""

import json
from pathlib import Path

import pytest
from gpu.runs import SENTENCE, infoentropy, train, write_tokens

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
    recipe = load_recipe(RECIPE)
    flags = [*to_command_line(recipe), *NARROW, *FP8_RECIPES[choice]]
    flags += ["--fp8-recipe", choice.partition(",")[0]]
    curve = train(tmp_path, 1, flags, recipe)
    assert sorted(curve) == [1, 2, 3, 4]
    assert curve[1]["cross entropy"] == pytest.approx(6.931, abs=0.1)  # ln 1024


FP8 = ["--transformer-impl", "transformer_engine", "--fp8-format", "hybrid", "--fp8-recipe"]
# The tiny recipe, in multiples of 128.
WIDE = ["--hidden-size", "256", "--ffn-hidden-size", "512", "--bf16"]


def test_an_fp8_run_is_exported_proved_and_scores_what_it_did_in_training(tmp_path):
    pytest.importorskip("transformer_engine", reason="FP8 needs Transformer Engine")
    write_tokens(tmp_path)
    (tmp_path / "proof.txt").write_text(SENTENCE * 40)
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
    words = ("--data", "tokens/validation", "--output", "run", "--dtype", "bfloat16")
    infoentropy("evaluate", "hf", *words, cwd=tmp_path)
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
