"""After finalize_model_grads, every parameter's main_grad equals a dense float64 computation.

The real trainer runs in every layout that a CPU allows, with unequal loss masks and a padded
vocabulary; the oracle is one process, one model, float64, the published formulas in full, and the
cut into ranks and micro-batches replayed.
"""

import dataclasses

import pytest
import torch
from dense_gpt import DenseModel, shifted
from launch import TINY_TRAINING, run_trainer
from megatron.core import mpu
from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
from megatron.training import get_args, get_tokenizer
from oracle import dense_statistics, dense_weight

from megatron_infoentropy import pretrain
from megatron_infoentropy.integration import step

GAMMAS = (1.0, 2.0)  # every run has one step of each
FUSED = ("--infoentropy-fused-linear", "--infoentropy-chunk-tokens=12")  # three chunks of 32 tokens
HEADS_BEFORE_THE_LAST = "--pipeline-model-parallel-layout=Et|t|m|L"
VOCAB = 200  # padded to 256: both vocabulary shards hold tokens, one holds padding too
MICRO_BATCH, SEQUENCE = 2, 16
PLAIN = {"tp": 1, "pp": 1, "dp": 1, "micro_batches": 2, "flags": ()}
LAYOUTS = {
    "tp2-pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2, "micro_batches": 3},
    "tp4": {"tp": 4, "flags": ("--num-query-groups=4",)},
    "pp2-interleaved": {
        "pp": 2,
        "flags": ("--num-layers=4", "--num-layers-per-virtual-pipeline-stage=1"),
    },
    "tp2-pp2-tied": {"tp": 2, "pp": 2, "tied": True},
    "recompute": {
        "flags": (
            *("--recompute-granularity=full", "--recompute-method=uniform"),
            "--recompute-num-layers=1",
        )
    },
    "dp2-per-token": {"dp": 2, "flags": ("--calculate-per-token-loss",)},
    "dp2-empty": {"dp": 2, "micro_batches": 3, "kind": "empty"},
    "dp4": {"dp": 4, "micro_batches": 1},
    "packed": {
        "kind": "packed",
        "flags": ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss"),
    },
    "tp2-dp2-overlap": {"tp": 2, "dp": 2, "flags": ("--overlap-grad-reduce",)},
    "dp2-focal": {"dp": 2, "objective": "focal"},
    "tp2-pp2-fused": {"tp": 2, "pp": 2, "flags": FUSED},
    "tp2-pp2-tied-fused": {"tp": 2, "pp": 2, "tied": True, "flags": FUSED},
    "tp2-pp2-hybrid": {"tp": 2, "pp": 2, "pattern": "*-|--*"},
    "pp2-hybrid-interleaved": {"pp": 2, "pattern": "*|-|*-|-"},
    "dp2-hybrid-tied": {"dp": 2, "micro_batches": 3, "tied": True, "pattern": "-*"},
    "tp2-hybrid-tied-fused": {"tp": 2, "tied": True, "pattern": "*-", "flags": FUSED},
    "tp2-pp2-heads": {"tp": 2, "pp": 2, "heads": 2},
    "pp2-tied-heads": {"pp": 2, "tied": True, "heads": 1, "flags": FUSED},
    "dp2-heads-per-token": {
        **{"dp": 2, "micro_batches": 3, "heads": 2, "kind": "empty"},
        "flags": ("--calculate-per-token-loss",),
    },
    "dp2-heads-of-megatron": {"dp": 2, "micro_batches": 3, "heads": 2, "head_loss": "megatron"},
    "tp2-pp2-hybrid-heads": {"tp": 2, "pp": 2, "pattern": "*-|--*/*-/*-", "heads": 2},
    "dp2-hybrid-heads-fused": {
        **{"dp": 2, "micro_batches": 3, "pattern": "*-/-", "heads": 1, "tied": True},
        **{"head_loss": "megatron", "flags": FUSED},
    },
    "pp4-heads-before-the-last": {"pp": 4, "heads": 1, "flags": (HEADS_BEFORE_THE_LAST,)},
    "pp4-tied-heads-before-the-last": {
        **{"pp": 4, "heads": 1, "tied": True},
        "flags": (HEADS_BEFORE_THE_LAST,),
    },
    "dp2-fused-into-main-grad": {
        **{"dp": 2, "micro_batches": 3, "kind": "into main_grad"},
        "flags": (*FUSED, "--overlap-grad-reduce"),
    },
}
CASES = [
    (layout, norm)
    for layout in LAYOUTS
    for norm in ("paper", "global")
    if norm == "paper" or "heads" not in LAYOUTS[layout]
]
HEADS_SHARE = 0.3  # of the heads' losses, together, in the objective
MASKED_SHARE = (0.1, 0.5, 0.8)  # by (data rank + micro-batch): masks are far from equal


def make_batch(data_rank, micro_batch, vocab, kind):
    """The same tokens on every rank of a layout; position 0 is never masked.

    kind "empty": data rank 0 has no valid token in micro-batch 1.
    """
    generator = torch.Generator().manual_seed(1000 * data_rank + micro_batch)
    text = torch.randint(0, vocab, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
    share = MASKED_SHARE[(data_rank + micro_batch) % len(MASKED_SHARE)]
    mask = (torch.rand(MICRO_BATCH, SEQUENCE, generator=generator) >= share).float()
    mask[:, 0] = 1
    if kind == "empty" and (data_rank, micro_batch) == (0, 1):
        mask.zero_()
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(SEQUENCE).expand(MICRO_BATCH, -1).contiguous(),
        "attention_mask": torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None],
    }


def train(folder, kind):
    """On every rank: train at a rate of 0, a step with each gamma, and write down the gradients.

    kind "packed": batches are Megatron's own, of documents of a few tokens, and written down;
    "into main_grad": the output layer is told to add to it, for which Megatron's own code needs a
    CUDA extension and is refused on a CPU, and ours does not.
    """
    container, forward_step = pretrain.prepare()
    transformer = container.model.transformer
    finalize, read = transformer.finalize_model_grads_func, step.get_batch
    found = {"parameters": {}, "gradients": [], "batches": []}
    served = {}  # batches by model chunk: each asks for all of them, in order

    def get_batch(iterator, stage, config, *, training):
        if kind == "packed":
            found["batches"].append(read(iterator, stage, config, training=training))
            return found["batches"][-1]
        args = get_args()
        micro_batches = args.global_batch_size // args.micro_batch_size // args.data_parallel_size
        index = served.get(stage, 0) % micro_batches
        served[stage] = served.get(stage, 0) + 1
        vocab = get_tokenizer().vocab_size
        return make_batch(mpu.get_data_parallel_rank(), index, vocab, kind)

    def write_down(model, *arguments, **options):
        finalize(model, *arguments, **options)
        named = {
            f"{chunk}.{name}": p
            for chunk, part in enumerate(model)
            for name, p in part.module.named_parameters()
        }
        found["parameters"] = {name: p.detach().clone() for name, p in named.items()}
        found["gradients"].append({name: p.main_grad.clone() for name, p in named.items()})
        if len(found["gradients"]) < len(GAMMAS):
            use_gamma(len(found["gradients"]))

    def use_gamma(index):
        forward_step.config = dataclasses.replace(forward_step.config, gamma=GAMMAS[index])

    def fuse_accumulation(chunks):
        for chunk in chunks:
            if chunk.post_process:
                chunk.output_layer.gradient_accumulation_fusion = True
        return chunks

    if kind == "into main_grad":
        container.model.pre_wrap_hooks.append(fuse_accumulation)
    MockGPTLowLevelDataset.max_sequence_length = 9
    step.get_batch = get_batch
    transformer.finalize_model_grads_func = write_down
    use_gamma(0)
    pretrain.run(container, forward_step)
    found["vocab_size"] = get_tokenizer().vocab_size
    stage, shard = mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()
    torch.save(found, folder / f"{stage}-{shard}-{mpu.get_data_parallel_rank()}.pt")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def run(request, tmp_path_factory):
    """(layout, normalization, what each rank wrote down)."""
    name, normalization = request.param
    layout = PLAIN | LAYOUTS[name]
    model = [f for f in TINY_TRAINING if not (layout.get("tied") and f.startswith("--untie"))]
    folder = tmp_path_factory.mktemp(f"{name}-{normalization}")
    flags = [
        *(*model, f"--vocab-size={VOCAB}", f"--micro-batch-size={MICRO_BATCH}"),
        f"--global-batch-size={MICRO_BATCH * layout['dp'] * layout['micro_batches']}",
        f"--train-iters={len(GAMMAS)}",
        *("--lr=0", "--min-lr=0", "--weight-decay=0"),
        f"--tensor-model-parallel-size={layout['tp']}",
        f"--pipeline-model-parallel-size={layout['pp']}",
        f"--infoentropy-normalization={normalization}",
        f"--infoentropy-objective={layout.get('objective', 'infoentropy')}",
        *layout["flags"],
    ]
    if "pattern" in layout:
        flags.append(f"--hybrid-layer-pattern={layout['pattern']}")
    if "heads" in layout:
        flags += [
            *(f"--mtp-num-layers={layout['heads']}", f"--mtp-loss-scaling-factor={HEADS_SHARE}"),
            f"--infoentropy-mtp-loss={layout.get('head_loss', 'weighted')}",
        ]
    world = layout["tp"] * layout["pp"] * layout["dp"]
    run_trainer(world, train, (folder, layout.get("kind", "plain")), flags, folder)
    found = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    assert len(found) == world
    return layout, normalization, found


def test_packed_sequences_are_of_several_documents(run):
    """Else the layout "packed" would test nothing."""
    layout, _, found = run
    future = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    for batch in found["0-0-0"]["batches"]:
        assert (batch["attention_mask"] != future).any((1, 2, 3)).all()
        assert (batch["position_ids"] == 0).sum(1).min() > 1
        assert 0 < batch["loss_mask"].sum() < batch["loss_mask"].numel()
    assert bool(found["0-0-0"]["batches"]) == (layout.get("kind") == "packed")


@pytest.mark.parametrize("index", range(len(GAMMAS)), ids=lambda i: f"gamma{GAMMAS[i]}")
def test_main_grads_equal_the_oracle(run, index):
    layout, normalization, found = run
    expected = oracle_gradients(layout, normalization, found, GAMMAS[index])
    for rank, written in found.items():
        for name, gradient in written["gradients"][index].items():
            truth = expected[rank[:3]][name]
            # Of a shard that is all padding both are exactly 0.
            error, size = (gradient.double() - truth).abs().max(), truth.abs().max()
            assert error <= 1e-5 * size, f"rank {rank}, {name}: error {error:.2e} of {size:.2e}"


def test_the_oracle_notices_what_is_left_out(run):
    """A loss that forgot one of these would not pass the test above."""
    layout, normalization, found = run
    # Averaging over ranks is a factor of its own unless gradients are divided by a global count.
    averaged = layout["dp"] > 1 and normalization == "paper" and not per_token(layout)
    parts = ["alpha", "mask", "weight"] + ["data-parallel factor"] * averaged
    rank, written = next(iter(found.items()))
    for without in parts:
        expected = oracle_gradients(layout, normalization, found, 2.0, without)[rank[:3]]
        unweighted = ".mtp." if layout.get("head_loss") == "megatron" else None
        errors = [
            (gradient.double() - expected[name]).norm() / expected[name].norm()
            for name, gradient in written["gradients"][1].items()
            if expected[name].norm() > 0 and (unweighted is None or unweighted not in name)
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
    tied = layout.get("tied", False)
    model = DenseModel(shards, tied)
    vocab = next(iter(found.values()))["vocab_size"]
    batches = batches_of(layout, found, GAMMAS.index(gamma), vocab)
    objective(model, vocab, batches, layout, normalization, gamma, without).backward()
    gradients = {}
    for (pp, tp), shard in shards.items():
        # Replicated parameters are joined from tensor rank 0: its gradient is everyone's.
        whole = {
            name: shards[pp, 0][name].grad if p.grad is None else p.grad
            for name, p in shard.items()
        }
        # A later stage's copy, for heads or the tied output layer, gets the sum of all uses too;
        # beside one for heads Megatron gives the output layer another, which nothing reads.
        embedding = shards[0, tp]["0.embedding.word_embeddings.weight"].grad
        has_embedding = any("word_embeddings" in name for name in whole)
        for name in whole:
            if "word_embeddings" in name or (tied and "output_layer" in name):
                is_read = "word_embeddings" in name or not has_embedding
                whole[name] = embedding if is_read else torch.zeros_like(embedding)
        gradients[f"{pp}-{tp}"] = whole
    return gradients


def per_token(layout):
    return "--calculate-per-token-loss" in layout["flags"]


def objective(model, vocab, batches, layout, normalization, gamma, without):
    """The loss of one global batch, written out."""
    ranks, micro_batches = layout["dp"], layout["micro_batches"]
    total = weight_total = tokens = 0.0
    for k in range(micro_batches):
        sums, *heads = zip(
            *(
                micro_batch_sums(model, batches[d, k], vocab, layout, gamma, without)
                for d in range(ranks)
            ),
            strict=True,
        )
        for of_head in heads:
            alpha = mean_alpha(of_head, without)
            for (weighted, _, n), (_, _, main) in zip(of_head, sums, strict=True):
                # A head's mean counts as many tokens as the model's own, of which there are more.
                count = main if per_token(layout) else 1 / micro_batches / ranks
                share = HEADS_SHARE / len(heads) * count
                total = total + (share * alpha * weighted / n if n > 0 else 0)
        tokens += sum(n for *_, n in sums)
        weight_total += sum(weight if without != "alpha" else n for _, weight, n in sums)
        if normalization == "global":
            total = total + sum(weighted for weighted, _, _ in sums)
            continue
        alpha = mean_alpha(sums, without)
        if per_token(layout):
            total = total + sum(alpha * weighted for weighted, _, _ in sums)
        else:
            means = sum(alpha * weighted / n for weighted, _, n in sums if n > 0)
            total = total + means / micro_batches / ranks
    if normalization == "global":
        return total / weight_total
    factor = ranks if without == "data-parallel factor" else 1
    return factor * total / (tokens if per_token(layout) else 1)


def mean_alpha(sums, without):
    """Over ranks, of 1 / mean(w); one without a valid token is left out."""
    inverse = [n / weight for _, weight, n in sums if n > 0]
    return 1.0 if without == "alpha" else sum(inverse) / len(inverse)


def batches_of(layout, found, index, vocab):
    """{(data rank, micro-batch): batch} of one step."""
    kind, micro_batches = layout.get("kind", "plain"), layout["micro_batches"]
    if kind == "packed":
        written = found["0-0-0"]["batches"]
        return {(0, k): written[index * micro_batches + k] for k in range(micro_batches)}
    return {
        (d, k): make_batch(d, k, vocab, kind)
        for d in range(layout["dp"])
        for k in range(micro_batches)
    }


def micro_batch_sums(model, batch, vocab, layout, gamma, without):
    """(sum of w ce, sum of w, tokens) of the model, then of each of its heads."""
    heads, head_loss = layout.get("heads", 0), layout.get("head_loss", "weighted")
    every = model.logits(batch["tokens"], batch["attention_mask"], heads)
    labels, mask = batch["labels"], batch["loss_mask"].double()
    mask = torch.ones_like(mask) if without == "mask" else mask
    sums = []
    for number, logits in enumerate(every):
        is_megatrons = number > 0 and head_loss == "megatron"
        # Megatron's own cross entropy counts the padding of the vocabulary.
        ce, entropy, _ = dense_statistics(logits if is_megatrons else logits[..., :vocab], labels)
        kind = layout.get("objective", "infoentropy")
        weight = dense_weight(ce, entropy, kind, gamma, 1.0).detach()
        if is_megatrons or without == "weight":
            weight = torch.ones_like(weight)
        sums.append(((mask * weight * ce).sum(), (mask * weight).sum(), mask.sum()))
        labels, mask = shifted(labels), shifted(mask)
    return sums
