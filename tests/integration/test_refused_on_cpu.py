"""What a CPU cannot train: Megatron refuses, and docs/loss.md names the symbol that does.

GPUs train it in tests/gpu/test_layouts_on_gpus.py, whose flags are parsed here.
"""

import json
import os
from pathlib import Path

import gpu.test_layouts_on_gpus as gpu
import plain_run
import pytest
from launch import TINY_TRAINING, run_trainer

from megatron_infoentropy import pretrain

DOCS = Path(__file__).parents[2] / "docs"
REFUSED = {  # ranks, flags, the symbol, what it says
    "sequence parallel": (
        2,
        ["--tensor-model-parallel-size=2", "--sequence-parallel"],
        "torch_norm.WrappedTorchNorm",
        "sequence parallel not supported by torch LayerNorm",
    ),
    "context parallel": (
        2,
        ["--context-parallel-size=2"],
        "dot_product_attention.DotProductAttention",
        "Context parallelism is only supported by TEDotProductAttention!",
    ),
    "Transformer Engine": (
        1,
        ["--transformer-impl=transformer_engine"],
        "gpt_layer_specs.TESpecProvider",
        "TypeError: 'NoneType' object is not callable",
    ),
}


@pytest.mark.parametrize("cell", REFUSED)
def test_megatron_refuses_in_the_symbol_that_the_docs_name(cell, tmp_path):
    ranks, flags, symbol, words = REFUSED[cell]
    with pytest.raises(AssertionError) as failure:
        run_trainer(ranks, plain_run.main, (), [*TINY_TRAINING, *flags], tmp_path)
    file, _, _ = symbol.partition(".")
    assert words in str(failure.value)
    assert f"{file}.py" in str(failure.value)
    assert f"`{symbol}`" in (DOCS / "loss.md").read_text()


@pytest.mark.parametrize("layout", gpu.LAYOUTS)
def test_flags_of_the_gpu_tests_are_accepted(layout, tmp_path):
    ranks, flags, _ = gpu.LAYOUTS[layout]
    output = tmp_path / "found.json"
    words = [*gpu.MODEL, *gpu.start_from("nowhere"), *flags, "--fake-process-group"]
    run_trainer(1, accept, (ranks, output), words, tmp_path)
    fp8 = "hybrid" if "FP8" in layout else None
    assert json.loads(output.read_text()) == ["transformer_engine", 1, fp8]


def accept(world, output):
    """As rank 0 of a world that is not there: parse, check, and tell what came of it."""
    os.environ["WORLD_SIZE"] = str(world)
    from megatron.training import get_args

    pretrain.prepare()
    args = get_args()
    output.write_text(json.dumps([args.transformer_impl, args.data_parallel_size, args.fp8]))
