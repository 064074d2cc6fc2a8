"""The paper's recipes: accepted by Megatron at their true size, the model that was published, and a
training that runs, narrow and shallow, on a CPU."""

import gc
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from launch import TINY_MODEL, run_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_infoentropy import pretrain
from megatron_infoentropy.evaluate.runlog import read_log
from megatron_infoentropy.launch import parsed
from megatron_infoentropy.launch.dry_run import (
    dry_run,
    memory,
    micro_batches,
    parameters,
    report,
    stages,
    traffic,
)
from megatron_infoentropy.launch.recipe import load_plan, load_recipe, to_command_line

ROOT = Path(__file__).parents[2]
PAPER, DOCS = ROOT / "examples" / "paper", ROOT / "docs"
PLAIN = ["--mock-data", "--tokenizer-type=NullTokenizer"]
HYBRID = "--infoentropy-hybrid"

# As published: parameters, ranks, tokens a step, steps, warm-up, micro-batch, accumulation.
PUBLISHED = {
    "468m": (468_239_360, 16, 2**20, 100_000, 1000, 32, 2),
    "1.2b": (1_204_881_408, 32, 2**20, 100_000, 1000, 16, 2),
    "6.7b": (6_738_415_616, 128, 2**22, 25_000, 2000, 16, 1),
}
SMALL = [
    *("--num-layers=2", "--hidden-size=64", "--ffn-hidden-size=96", "--num-attention-heads=4"),
    *("--seq-length=32", "--max-position-embeddings=32", "--vocab-size=256"),
    *("--micro-batch-size=2", "--global-batch-size=4", "--train-iters=2", "--lr-warmup-iters=1"),
    *("--log-interval=1", "--eval-iters=0"),
]


def parse(world, output, ranks):
    """Write {"shape", "arguments", "built": {rank: its parameters}} of a command line for a world
    that is not there; the model is built on the meta device, of local layers."""
    os.environ["WORLD_SIZE"] = str(world)
    from megatron.training import get_args

    from megatron_infoentropy.integration.hybrid import local_stack_spec

    container, _ = pretrain.prepare()
    args, transformer = get_args(), container.model.transformer
    transformer.transformer_impl = "local"
    transformer.fp8 = None
    transformer.sequence_parallel = False  # the local norms refuse it
    if args.hybrid_layer_pattern is not None:
        container.model.hybrid_stack_spec = local_stack_spec(transformer)
    found = {
        "shape": parsed.plain_arguments(args),
        "arguments": {name: repr(value) for name, value in vars(args).items()},
        "built": {rank: _parameters(container, rank, world) for rank in ranks},
    }
    output.write_text(json.dumps(found))


def _parameters(container, rank, world):
    """How many a rank of the fake world has; its tensors have shapes and no memory."""
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = container.model.transformer
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mpu.initialize_model_parallel(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    with torch.device("meta"):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = container.model.get_builder_cls()(container.model).build_model(groups)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert {parameter.device.type for parameter in matrices} == {"meta"}
    mpu.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return sum(parameter.numel() for parameter in model.parameters())


def train(output):
    """Train; write {parameter: standard deviation} of the model as it was built."""
    container, forward_step = pretrain.prepare()

    def write_down(chunks):
        named = {name: p for chunk in chunks for name, p in chunk.named_parameters() if p.dim() > 1}
        output.write_text(json.dumps({name: float(p.std()) for name, p in named.items()}))
        return chunks

    container.model.pre_wrap_hooks.append(write_down)
    pretrain.run(container, forward_step)


# What a ring sends of the larger side of a collective over k ranks, in units of (k - 1) / k.
RING = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
}


class Sent(TorchDispatchMode):
    """[operation, ranks of its group, shape, bytes that this rank sends] of all communication."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and (name in RING or name == "send"):
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.nbytes)
            ranks = torch.distributed.ProcessGroup.unbox(group).size()
            share = 1 if name == "send" else RING[name] * (ranks - 1) / ranks
            self.calls.append((name, ranks, list(largest.shape), largest.nbytes * share))
        return func(*args, **kwargs or {})


def _is_group(value):
    return "ProcessGroup" in str(value._type())


def count_traffic(world, output):
    """Train as rank 0 of a world whose other ranks are not there; write what it would have sent."""
    os.environ["WORLD_SIZE"] = str(world)
    from megatron.training import get_args

    with Sent() as sent:
        pretrain.main()
    found = {"shape": parsed.plain_arguments(get_args()), "sent": sent.calls}
    output.write_text(json.dumps(found))


def words(name, *, without=()):
    flags = load_recipe(PAPER / f"{name}.yaml")
    return to_command_line({key: value for key, value in flags.items() if key not in without})


def probe(tmp_path, world, flags, ranks):
    output = tmp_path / "found.json"
    run_trainer(1, parse, (world, output, ranks), [*flags, *PLAIN], tmp_path)
    found = json.loads(output.read_text())
    return Namespace(**found["shape"]), found["arguments"], found["built"]


@pytest.mark.parametrize("kind", ["gpt", "hybrid"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_megatron_accepts_a_recipe_at_its_true_size_and_builds_the_published_model(
    name, kind, tmp_path
):
    count, ranks, tokens, steps, warmup, micro_batch, accumulation = PUBLISHED[name]
    assert load_plan(PAPER / f"{name}.yaml").ranks == ranks
    flags = [*words(name), "--fake-process-group", *[HYBRID] * (kind == "hybrid")]
    shape, arguments, built = probe(tmp_path, ranks, flags, ranks=[0])
    assert (shape.hybrid_layer_pattern is not None) == (kind == "hybrid")
    assert parameters(shape) == built["0"] == count
    assert shape.data_parallel_size == ranks
    assert shape.global_batch_size * shape.seq_length == tokens
    assert (shape.train_iters, shape.micro_batch_size) == (steps, micro_batch)
    assert micro_batches(shape) == accumulation
    assert int(arguments["lr_warmup_iters"]) == warmup
    assert arguments["fp8"] == ("'hybrid'" if name == "6.7b" else "None")
    assert arguments["params_dtype"] == "torch.bfloat16"
    assert documented_row(name, ranks, shape) in (DOCS / "recipes.md").read_text()


def documented_row(name, ranks, shape):
    """The line of the table in docs/recipes.md that tells of a model's memory and traffic."""
    held = memory(shape)
    columns = [size for name, size in held.items() if name != "FP8 copies"]
    in_gib = [f"{size / 2**30:.2f}" for size in (*columns, sum(held.values()))]
    sent = f"{traffic(shape)['data parallel'] / 1e9:.2f}"
    return f"| {' | '.join([name.upper(), str(ranks), *in_gib, sent])} |"


VARIANTS = {
    "grouped queries, untied": [],
    "tied": ["no untie"],
    "biases, LayerNorm, learned positions": [
        *("no bias", "no norm", "no rope", "no swiglu", "--add-qkv-bias", "--qk-layernorm"),
    ],
    "wide heads, more layers": ["--kv-channels=24", "--num-layers=4"],
    "a hybrid of its layers": [HYBRID],
    "another hybrid, tied": ["no untie", "--qk-layernorm", "--hybrid-layer-pattern=*-|*--"],
}
LEFT_OUT = {
    "no untie": "--untie-embeddings-and-output-weights",
    "no bias": "--disable-bias-linear",
    "no norm": "--normalization=RMSNorm",
    "no rope": "--position-embedding-type=rope",
    "no swiglu": "--swiglu",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_parameters_are_those_of_the_built_stages(variant, tmp_path):
    """First and last stage of TP2 x PP2 x DP2, as Megatron builds them."""
    changes = VARIANTS[variant]
    dropped = [LEFT_OUT[change] for change in changes if change in LEFT_OUT]
    model = [flag for flag in TINY_MODEL if flag not in dropped]
    layout = ["--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2"]
    batch = ["--micro-batch-size=1", "--global-batch-size=4", "--train-iters=2", "--lr=1"]
    added = [change for change in changes if change not in LEFT_OUT]
    flags = [*model, *layout, *batch, *added, "--vocab-size=250", "--fake-process-group"]
    shape, _, built = probe(tmp_path, 8, flags, ranks=[0, 7])
    on_a_rank = [cut // 2 + whole for cut, whole in stages(shape)]
    assert on_a_rank == [built["0"], built["7"]]


@pytest.mark.parametrize(
    ("name", "objective"),
    [("468m", "focal"), ("1.2b", "cross_entropy"), ("6.7b", "infoentropy")],
)
def test_a_narrow_recipe_trains_on_local_layers_as_a_gpt_and_as_a_hybrid(name, objective, tmp_path):
    fp8 = ("transformer-impl", "fp8-format", "fp8-recipe")
    flags = [*words(name, without=fp8), *SMALL, *PLAIN, f"--infoentropy-objective={objective}"]
    curves = {}
    for kind, added in (("gpt", []), ("hybrid", [HYBRID])):
        deviations = tmp_path / f"{kind}.json"
        log = run_trainer(1, train, (deviations,), [*flags, *added], tmp_path)
        assert f"objective='{objective}'" in log
        curves[kind] = curve = read_log(tmp_path / "rank0.log").training
        assert sorted(curve) == [1, 2]
        assert curve[2]["cross entropy"] == pytest.approx(5.545, abs=0.1)  # ln 256, of N(0, 0.01)
        assert curve[1]["learning rate"] == pytest.approx(3e-4)
        found = json.loads(deviations.read_text())
        assert len(found) == 2 + 2 * 4  # embedding, head, four matrices a layer
        # As published, not 0.005 at this depth in the matrices that end a block.
        assert found == {name: pytest.approx(0.01, rel=0.05) for name in found}
    # The matrices are drawn in the same order.
    for step, values in curves["gpt"].items():
        for what in ("objective", "cross entropy", "grad norm"):
            assert curves["hybrid"][step][what] == pytest.approx(values[what], rel=1e-6), what


def sent_in_a_step(tmp_path, layout):
    """(shape, all that rank 0 sends) of one step of two micro-batches, recomputed in full."""
    output = tmp_path / "sent.json"
    recompute = ["--recompute-granularity=full", "--recompute-method=uniform"]
    batch = ["--micro-batch-size=1", "--global-batch-size=8", "--train-iters=1", "--lr=1e-3"]
    flags = [*TINY_MODEL, *PLAIN, *layout, *batch, *recompute, "--recompute-num-layers=1"]
    flags += ["--vocab-size=256", "--bf16", "--use-distributed-optimizer", "--fake-process-group"]
    run_trainer(1, count_traffic, (8, output), flags, tmp_path)
    found = json.loads(output.read_text())
    return Namespace(**found["shape"]), found["sent"]


def test_counted_traffic_is_what_megatron_sends_over_tensor_and_data_parallel_groups(tmp_path):
    shape, sent = sent_in_a_step(tmp_path, ["--tensor-model-parallel-size=2"])
    counted = traffic(shape)
    activations = [size for _, ranks, axes, size in sent if ranks == 2 and len(axes) > 1]
    assert counted["tensor parallel"] == sum(activations)
    buffers = [size for name, ranks, _, size in sent if ranks == 4 and "coalesced" in name]
    assert len(buffers) == 2  # gradients scattered, parameters gathered; padded by Megatron
    assert counted["data parallel"] == pytest.approx(sum(buffers), rel=0.02)


def test_counted_traffic_is_what_megatron_sends_along_a_pipeline(tmp_path):
    shape, sent = sent_in_a_step(tmp_path, ["--pipeline-model-parallel-size=2"])
    assert micro_batches(shape) == 2
    handed_on = [size for name, *_, size in sent if name == "send"]
    assert traffic(shape)["pipeline parallel"] == sum(handed_on)


def test_a_dry_run_counts_another_layout_at_another_size():
    extra = ("--tensor-model-parallel-size=2", "--sequence-parallel", "--micro-batch-size=4")
    extra += ("--use-precision-aware-optimizer", "--exp-avg-dtype=bf16", "--exp-avg-sq-dtype=bf16")
    args = dry_run(PAPER / "6.7b.yaml", {"infoentropy-objective": "focal"}, extra, ranks=64)
    assert parameters(args) == 6_738_415_616
    assert (args.data_parallel_size, micro_batches(args)) == (32, 16)
    assert args.sequence_parallel
    assert args.optimizer_bytes == 2 + 2 + 4  # also without Transformer Engine
    assert "64 ranks: tensor 2 x pipeline 1 x data 32" in "\n".join(report(args))


def test_a_dry_run_refuses_what_a_training_would_in_its_words(quick_ranks, monkeypatch):
    for name, value in quick_ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", quick_ranks["PYTHON_EXEC"])
    with pytest.raises(ValueError, match="unrecognized arguments: --num-layer 3"):
        dry_run(PAPER / "468m.yaml", {}, ("--num-layer", "3"))


def test_parsing_leaves_nothing_behind_even_as_the_only_rank(tmp_path):
    writers = [f"--tensorboard-dir={tmp_path / 'events'}", "--wandb-project=p", "--save=nowhere"]
    log = run_trainer(1, parsed.main, (), [*words("468m"), *PLAIN, *writers], tmp_path)
    assert parameters(Namespace(**json.loads(log.splitlines()[-1]))) == 468_239_360
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.log"]


def write_state_of_garbage(path):
    gc.unfreeze()
    pretrain.train = lambda: path.write_text(f"{gc.isenabled()} {gc.get_freeze_count()}")
    pretrain.main()


def test_a_rank_collects_garbage_and_passes_over_what_it_imported(tmp_path):
    run_trainer(1, write_state_of_garbage, (tmp_path / "state",), [], tmp_path)
    enabled, frozen = (tmp_path / "state").read_text().split()
    assert enabled == "True"
    assert int(frozen) > 100_000
