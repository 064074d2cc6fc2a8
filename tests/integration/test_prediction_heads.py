"""Multi-token-prediction heads on whichever pipeline stage: the same gradients everywhere."""

import probe_heads
import pytest
import torch
from launch import TINY_MODEL, run_trainer
from probe_heads import EMBEDDING

FLAGS = [
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256", "--lr=0"),
    *("--micro-batch-size=2", "--global-batch-size=4", "--train-iters=1", "--weight-decay=0"),
    *("--mtp-num-layers=1", "--mtp-loss-scaling-factor=0.3", "--clip-grad=0"),
]
OUTPUT = "output_layer.weight"
LAST, EARLIER = ("E|t|t|mL", 4), ("Et|t|m|L", 4)


def run(folder, layout, ranks, tied):
    """What every pipeline rank wrote down."""
    folder.mkdir()
    model = [f for f in TINY_MODEL if not (tied and f.startswith("--untie"))]
    place = [
        f"--pipeline-model-parallel-size={ranks}",
        f"--pipeline-model-parallel-layout={layout}",
    ]
    run_trainer(ranks, probe_heads.main, (folder,), [*model, *FLAGS, *place], folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_heads_on_an_earlier_stage_have_the_gradients_they_have_on_the_last(tmp_path, tied):
    expected = run(tmp_path / "last", *LAST, tied)
    found = run(tmp_path / "earlier", *EARLIER, tied)
    truth = {name: g for rank in expected for name, g in rank["gradients"].items()}
    names = set()
    for rank in found:
        for name, gradient in rank["gradients"].items():
            size = truth[name].abs().max()
            assert size > 0, name
            assert (gradient - truth[name]).abs().max() <= 1e-5 * size, name
            names.add(name)
    # Tied, the last stage's output layer has a weight that it does not use beside the embedding.
    assert names == truth.keys() - ({OUTPUT} if tied else set())
    built = [rank["built"] for rank in found]
    assert [EMBEDDING in stage for stage in built] == [True, False, True, tied]
    assert all(torch.equal(s[EMBEDDING], built[0][EMBEDDING]) for s in built if EMBEDDING in s)
    assert tied or not torch.equal(built[3][OUTPUT], built[0][EMBEDDING])


def test_heads_on_the_first_rank_are_refused_before_anything_is_built(tmp_path):
    with pytest.raises(AssertionError, match="on the first pipeline rank"):
        run(tmp_path / "first", "Et|t|m|L", 2, tied=False)
