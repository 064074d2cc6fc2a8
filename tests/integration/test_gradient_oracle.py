"""After finalize_model_grads, every parameter's main_grad equals a dense float64 computation.

The real trainer runs at TP2 x PP2 and at DP2 x 3 micro-batches, with unequal loss masks and a
padded vocabulary; the oracle is one process, one model, float64, the published formulas in full.
"""

import probe_gradients
import pytest
import torch
from dense_gpt import DenseGPT
from launch import TINY_MODEL, run_trainer
from oracle import dense_statistics
from probe_gradients import make_batch

GAMMAS = (1.0, 2.0)
VOCAB = 200  # padded to 256: both vocabulary shards hold tokens, one holds padding too
MICRO_BATCH, SEQUENCE = 2, 16
LAYOUTS = {
    "tp2-pp2": {"tp": 2, "pp": 2, "dp": 1, "micro_batches": 2},
    "dp2": {"tp": 1, "pp": 1, "dp": 2, "micro_batches": 3},
}
CASES = [(layout, norm) for layout in LAYOUTS for norm in ("paper", "global")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def run(request, tmp_path_factory):
    """(layout, normalization, what each rank wrote down)."""
    name, normalization = request.param
    layout = LAYOUTS[name]
    folder = tmp_path_factory.mktemp(f"{name}-{normalization}")
    flags = [
        *TINY_MODEL,
        *("--mock-data", "--tokenizer-type=NullTokenizer", f"--vocab-size={VOCAB}"),
        f"--micro-batch-size={MICRO_BATCH}",
        f"--global-batch-size={MICRO_BATCH * layout['dp'] * layout['micro_batches']}",
        f"--train-iters={len(GAMMAS)}",
        *("--lr=0", "--min-lr=0", "--weight-decay=0"),
        f"--tensor-model-parallel-size={layout['tp']}",
        f"--pipeline-model-parallel-size={layout['pp']}",
        f"--infoentropy-normalization={normalization}",
    ]
    world = layout["tp"] * layout["pp"] * layout["dp"]
    run_trainer(world, probe_gradients.main, (folder, GAMMAS), flags, folder)
    found = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    assert len(found) == world
    return layout, normalization, found


@pytest.mark.parametrize("index", range(len(GAMMAS)), ids=lambda i: f"gamma{GAMMAS[i]}")
def test_main_grads_equal_the_oracle(run, index):
    layout, normalization, found = run
    expected = oracle_gradients(layout, normalization, found, GAMMAS[index])
    for rank, written in found.items():
        for name, gradient in written["gradients"][index].items():
            truth = expected[rank[:3]][name]
            error = (gradient.double() - truth).abs().max() / truth.abs().max()
            assert error <= 1e-5, f"rank {rank}, {name}: relative error {error:.2e}"


def test_the_oracle_notices_what_is_left_out(run):
    """A loss that forgot one of these would not pass the test above."""
    layout, normalization, found = run
    parts = ["alpha", "mask", "weight"] + ["data-parallel factor"] * (layout["dp"] > 1)
    rank, written = next(iter(found.items()))
    for without in parts:
        expected = oracle_gradients(layout, normalization, found, 2.0, without)[rank[:3]]
        errors = [
            (gradient.double() - expected[name]).norm() / expected[name].norm()
            for name, gradient in written["gradients"][1].items()
        ]
        assert min(errors) > 1e-3, without


def oracle_gradients(layout, normalization, found, gamma, without=None):
    """{"pp-tp": {parameter: float64 gradient}} from the shards that the ranks trained with."""
    shards = {
        (pp, tp): {
            name: p.double().requires_grad_()
            for name, p in found[f"{pp}-{tp}-0"]["parameters"].items()
        }
        for pp in range(layout["pp"])
        for tp in range(layout["tp"])
    }
    model = DenseGPT(shards, layers_per_stage=2 // layout["pp"])
    vocab = next(iter(found.values()))["vocab_size"]
    objective(model, vocab, layout, normalization, gamma, without).backward()
    gradients = {}
    for (pp, tp), shard in shards.items():
        # Replicated parameters are joined from tensor rank 0: its gradient is everyone's.
        whole = {
            name: shards[pp, 0][name].grad if p.grad is None else p.grad
            for name, p in shard.items()
        }
        gradients[f"{pp}-{tp}"] = whole
    return gradients


def objective(model, vocab, layout, normalization, gamma, without):
    """The loss of one global batch, written out."""
    ranks, micro_batches = layout["dp"], layout["micro_batches"]
    total = weight_total = 0.0
    for k in range(micro_batches):
        sums = [
            micro_batch_sums(
                model, make_batch(d, k, MICRO_BATCH, SEQUENCE, vocab), vocab, gamma, without
            )
            for d in range(ranks)
        ]
        if normalization == "global":
            total = total + sum(weighted for weighted, _, _ in sums)
            weight_total += sum(weight if without != "alpha" else n for _, weight, n in sums)
            continue
        alpha = sum(n / weight for _, weight, n in sums) / ranks
        alpha = 1.0 if without == "alpha" else alpha
        total = total + sum(alpha * weighted / n for weighted, _, n in sums) / micro_batches / ranks
        weight_total = 1.0
    factor = ranks if without == "data-parallel factor" else 1
    return factor * total / weight_total


def micro_batch_sums(model, batch, vocab, gamma, without):
    logits = model.logits(batch["tokens"])[..., :vocab]
    ce, entropy, _ = dense_statistics(logits, batch["labels"])
    weight = (1 + entropy.detach()) ** gamma
    weight = torch.ones_like(weight) if without == "weight" else weight
    mask = torch.ones_like(weight) if without == "mask" else batch["loss_mask"].double()
    return (mask * weight * ce).sum(), (mask * weight).sum(), mask.sum()
