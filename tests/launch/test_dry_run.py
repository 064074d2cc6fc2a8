"""What a dry run says, its arithmetic against sums done by hand, without Megatron."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_infoentropy.launch import dry_run as dry
from megatron_infoentropy.launch.dry_run import memory, parameters, report, stages, traffic
from megatron_infoentropy.launch.parsed import optimizer_bytes, require_counted
from megatron_infoentropy.runtime.device import Device

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = Device("cpu", "gloo", 1)
# 4 layers of hidden 8, 2 heads of 4, SwiGLU of 16, vocabulary 32, untied: small enough for paper.
PLAIN = Namespace(
    **{"num_layers": 4, "hidden_size": 8, "ffn_hidden_size": 16, "padded_vocab_size": 32},
    **{"num_attention_heads": 2, "num_query_groups": 2, "kv_channels": 4, "swiglu": True},
    **{"add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": False},
    **{"normalization": "RMSNorm", "position_embedding_type": "rope"},
    **{"untie_embeddings_and_output_weights": True, "virtual_pipeline_model_parallel_size": None},
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
    **{"data_parallel_size": 2, "sequence_parallel": False, "train_iters": 7},
    **{"micro_batch_size": 3, "global_batch_size": 12, "seq_length": 10},
    **{"weight_bytes": 2, "gradient_bytes": 4, "optimizer_bytes": 12},
    **{"block_activations": {"*": 400, "-": 600}, "hybrid_layer_pattern": None},
    **{"use_distributed_optimizer": True, "fp8": None, "infoentropy_fused_linear": False},
    **{"infoentropy_chunk_tokens": 5, "recompute_granularity": None, "recompute_method": None},
    recompute_num_layers=None,
)
FULL = {"recompute_granularity": "full"}


def replace(args, **changes):
    return Namespace(**vars(args) | changes)


@pytest.fixture
def tok(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def parsed(monkeypatch):
    """Command lines that would have been parsed."""
    seen = []

    def parse(words, ranks, device):
        seen.append((words, ranks))
        return PLAIN

    monkeypatch.setattr(dry, "parse", parse)
    monkeypatch.setattr(dry, "find_device", lambda: CPU)
    return seen


def test_ranks_are_those_asked_for_else_the_recipes_else_the_machines(parsed, tok):
    recipe = EXAMPLES / "paper" / "468m.yaml"
    dry.dry_run(recipe, {}, ranks=32)
    dry.dry_run(recipe, {})
    dry.dry_run(EXAMPLES / "tiny.yaml", {}, tokenizer=tok)
    with pytest.raises(ValueError, match="1024 cannot be shared by 48 data-parallel"):
        dry.dry_run(recipe, {}, ranks=48)
    assert [ranks for _, ranks in parsed] == [32, 16, 1]


def test_data_and_a_missing_tokenizer_have_stand_ins(parsed, tok):
    dry.dry_run(EXAMPLES / "paper" / "468m.yaml", {"seed": 7}, ("--lr", "1"))
    words, _ = parsed[0]
    assert "--mock-data" in words
    assert words[words.index("--tokenizer-type") + 1] == "NullTokenizer"
    assert words[words.index("--seed") + 1 :].count("--seed") == 2  # default, recipe, option
    assert words[-2:] == ["--lr", "1"]
    dry.dry_run(EXAMPLES / "tiny.yaml", {}, tokenizer=tok)
    words, _ = parsed[1]
    assert words[words.index("--tokenizer-type") + 1] == "HuggingFaceTokenizer"
    with pytest.raises(ValueError, match=r"tiny\.yaml does not say vocab-size"):
        dry.dry_run(EXAMPLES / "tiny.yaml", {})


def test_every_number_has_a_line():
    lines = report(PLAIN)
    text = "\n".join(lines)
    assert lines[0] == "model              GPT of 4 layers"
    assert lines[1].startswith("parameters         3,144, at most 3,144 on a rank")
    assert "2 ranks: tensor 1 x pipeline 1 x data 2" in text
    assert "120 tokens: 12 sequences of 10, 2 micro-batches of 3 on every rank" in text
    assert "7 steps, 840 tokens" in text
    assert "FP8" not in text
    for kind in ("weights", "gradients", "activations", "tensor parallel", "pipeline parallel"):
        assert any(line.strip().startswith(kind) for line in lines)
    assert "  weights              0.01 MiB" in lines
    large = report(replace(PLAIN, block_activations={"*": 2**30, "-": 2**30}))
    assert any("8.00 GiB   Megatron's formula" in line for line in large)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('train.py: error: no such flag')", "no such flag"),
        ("raise ValueError('gamma is wrong')", "ValueError: gamma is wrong"),
        ("assert 3 % 2 == 0", r"assert 3 % 2 == 0 \(AssertionError\)"),
    ],
)
def test_a_refusal_gives_the_reason_alone(monkeypatch, tmp_path, code, reason):
    script = tmp_path / "refuses.py"
    script.write_text(code + "\n")
    run = subprocess.run

    def refuse(words, **options):
        return run([sys.executable, str(script)], **options)

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ValueError, match=f"refuses the flags: {reason}$"):
        dry.parse([], 2, CPU)


LINEAR = 4 * 8 * 8 + 3 * 8 * 16  # of one layer: q, k, v, out; gate, up, down
TOTAL = 4 * (LINEAR + 16) + 8 + 2 * 32 * 8
HIDDEN = 3 * 10 * 8 * 2  # bytes of one micro-batch's hidden states
TP2, PP2, PP4 = (
    {f"{axis}_model_parallel_size": ranks}
    for axis, ranks in (("tensor", 2), ("pipeline", 2), ("pipeline", 4))
)
UNIFORM, BLOCK = (FULL | {"recompute_method": method} for method in ("uniform", "block"))
ONE_CHUNK = PP2 | {"hybrid_layer_pattern": "**-***--"}  # half of it on each stage


def test_a_tied_table_counts_once_but_is_held_by_both_ends_of_a_pipeline():
    tied = replace(PLAIN, untie_embeddings_and_output_weights=False)
    cut = replace(tied, **PP4)
    assert parameters(tied) == parameters(cut) == TOTAL - 32 * 8
    assert sum(map(sum, stages(cut))) == TOTAL


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            {
                **{"weights": 2 * TOTAL, "FP8 copies": 0, "gradients": 4 * TOTAL},
                **{"optimizer": 6 * TOTAL, "activations": 4 * 1000, "logits": 30 * 32 * 2},
            },
        ),
        ({"use_distributed_optimizer": False}, {"optimizer": 12 * TOTAL}),
        # Ranks share matrices and logits, but not norms.
        (TP2, {"weights": 2 * (4 * (LINEAR // 2 + 16) + 8 + 32 * 8), "logits": 30 * 16 * 2}),
        ({"fp8": "hybrid"}, {"FP8 copies": 2 * 4 * LINEAR}),  # of layers only
        (ONE_CHUNK | {"fp8": "hybrid"}, {"FP8 copies": 2 * (2 * 4 * 8 * 8 + 2 * 3 * 8 * 16)}),
        ({"infoentropy_fused_linear": True}, {"logits": 2 * 5 * 32 * 2}),
        # A chunk is never more than there are tokens.
        (
            {"infoentropy_fused_linear": True, "infoentropy_chunk_tokens": 4096},
            {"logits": 30 * 32 * 2},
        ),
        (UNIFORM, {"activations": 4 * HIDDEN + 1000}),
        (UNIFORM | {"recompute_num_layers": 3}, {"activations": 2 * HIDDEN + 3 * 1000}),
        (BLOCK | {"recompute_num_layers": 3}, {"activations": 3 * HIDDEN + 1000 + 1000}),
        (BLOCK | {"recompute_num_layers": 9}, {"activations": 4 * HIDDEN + 1000}),
        (UNIFORM | TP2 | {"sequence_parallel": True}, {"activations": 4 * HIDDEN // 2 + 1000}),
        # Two micro-batches on their way through two stages of two layers, or one if there is one.
        (PP2, {"activations": 4 * 1000}),
        (PP2 | {"global_batch_size": 6}, {"activations": 2 * 1000}),
        (PP2 | {"virtual_pipeline_model_parallel_size": 2}, {"activations": 5 * 1000}),
        # Two micro-batches of the first stage's are on their way, one of the last stage's.
        (ONE_CHUNK, {"activations": 2 * (3 * 400 + 600)}),
        (PP2 | {"hybrid_layer_pattern": "*|-------"}, {"activations": 7 * 600}),
    ],
)
def test_memory_is_counted_by_kind(changes, expected):
    held = memory(replace(PLAIN, **changes))
    assert {name: held[name] for name in expected} == expected


@pytest.mark.parametrize(
    "recomputed",
    [
        {},
        {**FULL, "recompute_method": "uniform", "recompute_num_layers": 3},
        # A hybrid's blocks are each kept on their own: the four inputs of two layers, not two.
        {**FULL, "recompute_method": "block", "recompute_num_layers": 2},
    ],
)
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, None), (2, None), (2, 2)])
def test_a_hybrid_of_the_same_layers_takes_the_same(recomputed, pipeline, virtual):
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": pipeline}
    layout["virtual_pipeline_model_parallel_size"] = virtual
    gpt = replace(PLAIN, **layout, **recomputed)
    chunks = pipeline * (virtual or 1)
    twice = {"recompute_num_layers": 2 * recomputed.get("recompute_num_layers", 1)}
    pattern = "|".join(["*-" * (4 // chunks)] * chunks)
    hybrid = replace(gpt, **twice, num_layers=8, hybrid_layer_pattern=pattern)
    assert (parameters(hybrid), stages(hybrid)) == (TOTAL, stages(gpt))
    assert traffic(hybrid) == traffic(gpt)
    more = memory(hybrid)["activations"] - memory(gpt)["activations"]
    is_block = recomputed.get("recompute_method") == "block"
    in_flight = {(1, None): 1, (2, None): 2, (2, 2): 2.5}[pipeline, virtual]
    expected = in_flight * 2 * HIDDEN - (1000 - 600) if is_block else 0
    assert more == expected
    assert "hybrid of 4 attention (*) and 4 MLP (-) layers" in report(hybrid)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, "--num-experts: the dry run cannot count experts"),
        ({"hybrid_layer_pattern": "M*-E"}, r"attention \(\*\) and MLP \(-\) layers, got EM"),
        ({"hybrid_layer_pattern": "*-*"}, "3 layers cannot be spread evenly over 2 pipeline stag"),
        ({"context_parallel_size": 2}, "cannot count context parallelism"),
        ({"optimizer": "muon"}, "--optimizer muon: the dry run knows Adam's states only"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(changes, message):
    args = replace(PLAIN, optimizer="adam", context_parallel_size=1, pipeline_model_parallel_size=2)
    require_counted(args)
    require_counted(replace(args, hybrid_layer_pattern="*|-*"))
    with pytest.raises(ValueError, match=message):
        require_counted(replace(args, **changes))


SCATTERED, GATHERED = 4 * TOTAL // 2, 2 * TOTAL // 2  # over two ranks, as a ring sends them


@pytest.mark.parametrize(
    ("changes", "kind", "sent"),
    [
        ({}, "data parallel", SCATTERED + GATHERED),
        ({"use_distributed_optimizer": False}, "data parallel", 2 * SCATTERED),
        ({"data_parallel_size": 1}, "data parallel", 0),
        ({}, "pipeline parallel", 0),
        # With each of two micro-batches; from the second stage on also back.
        (PP2, "pipeline parallel", 2 * HIDDEN),
        (PP4, "pipeline parallel", 2 * 2 * HIDDEN),
        (PP4 | TP2, "pipeline parallel", 2 * 2 * HIDDEN),
        (PP4 | TP2 | {"sequence_parallel": True}, "pipeline parallel", 2 * HIDDEN),
        # An all-reduce of two ranks sends half a hidden state twice: two a block and micro-batch,
        # a third where it is recomputed, one of the output layer, and of the embedding where the
        # same rank has it; and the statistics, 16 bytes a token.
        (TP2, "tensor parallel", 2 * ((8 * 4 + 2 + 2) * HIDDEN // 2 + 30 * 16)),
        (PP2 | TP2, "tensor parallel", 2 * ((4 * 4 + 2) * HIDDEN // 2 + 30 * 16)),
        (PP2 | TP2 | FULL, "tensor parallel", 2 * ((4 * 6 + 2) * HIDDEN // 2 + 30 * 16)),
    ],
)
def test_traffic_is_counted_by_kind(changes, kind, sent):
    assert traffic(replace(PLAIN, **changes))[kind] == sent


TYPES = {
    "use_precision_aware_optimizer": False,
    "params_dtype": torch.bfloat16,
    "exp_avg_dtype": torch.float32,
    "exp_avg_sq_dtype": torch.float32,
    "main_params_dtype": torch.float32,
    "fp8_recipe": "delayed",  # Megatron's default, also without FP8
}
AWARE = {"use_precision_aware_optimizer": True}
HALVED = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, 4 + 4 + 4),
        ({"params_dtype": torch.float32}, 4 + 4),
        (AWARE, 4 + 4 + 2),  # the copy as the bits that bf16 lacks
        (AWARE | {"fp8_recipe": "tensorwise"}, 4 + 4 + 4),  # Megatron keeps the copy, whole
        (AWARE | HALVED | {"fp8_recipe": "tensorwise"}, 2 + 2 + 4),
        (AWARE | {"fp8_recipe": "tensorwise", "main_params_dtype": torch.float16}, 4 + 4 + 2),
        (AWARE | {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.float16}, 1 + 2 + 2),
        (AWARE | {"params_dtype": torch.float32}, 4 + 4),
    ],
)
def test_bytes_follow_the_types_of_moments_and_of_the_copy(chosen, expected):
    assert optimizer_bytes(Namespace(**TYPES | chosen)) == expected
