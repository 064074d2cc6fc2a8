"""In Megatron's trainer on GPUs, what a CPU refuses: Transformer Engine's layers, FP8, sequence and
context parallel. Every layout trains from one checkpoint and gives the curve of one rank.

Flags are parsed by tests/integration/test_refused_on_cpu.py where there is no GPU.
"""

import pytest
from gpu.runs import train

# Sizes in multiples of 128, which FP8 takes without padding.
MODEL = [
    *("--num-layers=2", "--hidden-size=256", "--ffn-hidden-size=512", "--num-attention-heads=4"),
    *("--seq-length=256", "--max-position-embeddings=256", "--vocab-size=1000", "--swiglu"),
    *("--position-embedding-type=rope", "--normalization=RMSNorm", "--disable-bias-linear"),
    *("--untie-embeddings-and-output-weights", "--attention-dropout=0", "--hidden-dropout=0"),
    *("--transformer-impl=transformer_engine", "--bf16"),
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--ckpt-format=torch_dist"),
    *("--micro-batch-size=2", "--global-batch-size=4", "--train-iters=6", "--lr=1e-3"),
    *("--log-interval=1", "--eval-iters=0", "--eval-interval=1000", "--lr-decay-style=constant"),
]
LAYERS = {"transformer-impl": "transformer_engine"}
SPLIT = ["--tensor-model-parallel-size=2", "--sequence-parallel"]
FP8 = ["--fp8-format=hybrid", "--fp8-recipe=tensorwise"]
LAYOUTS = {  # ranks, flags, how near to one rank's curve in bf16
    "fused linear": (1, ["--infoentropy-fused-linear"], 0.005),
    "FP8": (1, FP8, 0.03),
    "sequence parallel": (2, SPLIT, 0.005),
    "sequence parallel, fused linear": (2, [*SPLIT, "--infoentropy-fused-linear"], 0.005),
    "sequence parallel, FP8": (2, [*SPLIT, *FP8], 0.03),
    "context parallel": (2, ["--context-parallel-size=2"], 0.005),
    "context parallel, global": (
        2,
        ["--context-parallel-size=2", "--infoentropy-normalization=global"],
        0.005,
    ),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """(folder of the common checkpoint, curve of one rank that starts from it)."""
    pytest.importorskip("transformer_engine", reason="these layouts need Transformer Engine")
    folder = tmp_path_factory.mktemp("one_rank")
    checkpoint = folder / "checkpoint"
    once = ["--train-iters=1", "--lr=0", "--min-lr=0", f"--save={checkpoint}"]
    train(folder, 1, [*MODEL, *once], LAYERS)
    return checkpoint, train(folder, 1, [*MODEL, *start_from(checkpoint)], LAYERS)


def start_from(checkpoint):
    return [f"--load={checkpoint}", "--finetune", "--no-load-optim", "--no-load-rng"]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.multi_gpu if ranks > 1 else pytest.mark.gpu)
        for name, (ranks, *_) in LAYOUTS.items()
    ],
)
def test_a_layout_gives_the_curve_of_one_rank(layout, one_rank, tmp_path):
    ranks, flags, tolerance = LAYOUTS[layout]
    checkpoint, alone = one_rank
    curve = train(tmp_path, ranks, [*MODEL, *start_from(checkpoint), *flags], LAYERS)
    assert sorted(curve) == sorted(alone) == [1, 2, 3, 4, 5, 6]
    for iteration, numbers in alone.items():
        for name in ("cross entropy", "entropy"):
            assert curve[iteration][name] == pytest.approx(numbers[name], rel=tolerance), name
    assert curve[6]["cross entropy"] < 0.98 * curve[1]["cross entropy"]
