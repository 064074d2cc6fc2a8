"""What a CPU cannot train: Megatron refuses, and docs/loss.md names the symbol that does.

GPUs train it in tests/gpu/test_layouts_on_gpus.py, whose flags are parsed here.
"""

import importlib.util
import json
import os
from pathlib import Path

import plain_run
import pytest
from launch import TINY_MODEL, run_trainer

TESTS, DOCS = Path(__file__).parents[1], Path(__file__).parents[2] / "docs"
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
TRAINING = [
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256", "--lr=1e-3"),
    *("--micro-batch-size=1", "--global-batch-size=2", "--train-iters=1"),
]


@pytest.mark.parametrize("cell", REFUSED)
def test_megatron_refuses_in_the_symbol_that_the_docs_name(cell, tmp_path):
    ranks, flags, symbol, words = REFUSED[cell]
    with pytest.raises(AssertionError) as failure:
        run_trainer(ranks, plain_run.main, (), [*TINY_MODEL, *TRAINING, *flags], tmp_path)
    file, _, _ = symbol.partition(".")
    assert words in str(failure.value)
    assert f"{file}.py" in str(failure.value)
    assert f"`{symbol}`" in (DOCS / "loss.md").read_text()


def gpu_layouts():
    path = TESTS / "gpu" / "test_layouts_on_gpus.py"
    spec = importlib.util.spec_from_file_location("layouts_on_gpus", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GPU = gpu_layouts()


@pytest.mark.parametrize("layout", GPU.LAYOUTS)
def test_flags_of_the_gpu_tests_are_accepted(layout, tmp_path):
    ranks, flags, _ = GPU.LAYOUTS[layout]
    output = tmp_path / "found.json"
    words = [*GPU.MODEL, *GPU.start_from("nowhere"), *flags, "--fake-process-group"]
    run_trainer(1, accept, (ranks, output), words, tmp_path)
    assert json.loads(output.read_text()) == {
        "transformer_impl": "transformer_engine",
        "data_parallel_size": 1,
        "fp8": "hybrid" if "FP8" in layout else None,
    }


def accept(world, output):
    """As rank 0 of a world that is not there: parse, check, and tell what came of it."""
    os.environ["WORLD_SIZE"] = str(world)
    from megatron.training import get_args

    from megatron_infoentropy import pretrain

    pretrain.prepare()
    names = ("transformer_impl", "data_parallel_size", "fp8")
    output.write_text(json.dumps({name: getattr(get_args(), name) for name in names}))
