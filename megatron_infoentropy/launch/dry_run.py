"""What a training would be and take, at any number of ranks, without starting one.

Megatron parses and checks the flags in a process of its own (`launch.parsed`), as rank 0 of a world
that is not there. The arithmetic reads its arguments, by the names that Megatron gives them: for a
dense GPT, its layers spread evenly over pipeline stages, or a hybrid of attention (*) and MLP (-)
layers, of which a GPT's layer is one of each. Memory is in bytes of one rank, traffic in bytes that
one rank sends in one step, collectives as rings: an all-reduce of n bytes over k ranks sends
2 n (k-1)/k, a reduce-scatter or an all-gather half of that.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from math import ceil
from pathlib import Path
from typing import Any

from megatron_infoentropy.launch.failures import refusal
from megatron_infoentropy.launch.job import command_line, require_layout
from megatron_infoentropy.launch.recipe import (
    load_plan,
    machine_environment,
    read_facts,
    useful_ranks,
)
from megatron_infoentropy.runtime.device import Device, find_device

MEMORY_UNITS = {"GiB": 2**30, "MiB": 2**20}
TRAFFIC_UNITS = {"GB": 10**9, "MB": 10**6}
STATISTICS_BYTES = 16  # a token's part of the loss's one all-gather


def dry_run(
    recipe: Path,
    settings: dict[str, Any],
    extra_flags: tuple[str, ...] = (),
    *,
    tokenizer: Path | None = None,
    ranks: int | None = None,
) -> Namespace:
    """Check a training; return `launch.parsed.plain_arguments`, of which the others here count.

    Arguments are as in `TrainingJob`, of which no data are needed.

    Without `ranks` it is for as many as the recipe says, else as this machine has use for; without
    a tokenizer its size is the recipe's `vocab-size`.

    Raises:
        ValueError: flags that a training would refuse, or a model that the arithmetic does not
            cover.
    """
    device = find_device()
    words = command_line(device, recipe, settings, extra_flags, tokenizer=tokenizer)
    facts = read_facts(words)
    on_machine = useful_ranks(facts, device.count)
    ranks = ranks or load_plan(recipe).ranks or on_machine
    require_layout(ranks, facts)
    return parse(words, ranks, device)


def report(args: Namespace) -> list[str]:
    """Return one fact a line, for a reader."""
    return [*_training_lines(args), *_memory_lines(args), *_traffic_lines(args)]


def parse(words: list[str], ranks: int, device: Device) -> Namespace:
    """Return what Megatron's own parser makes of a command line: `launch.parsed.plain_arguments`.

    Raises:
        ValueError: with the reason why Megatron, or a check of ours, refuses it.
    """
    world = {"WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_infoentropy.launch.parsed", *words],
        env={**os.environ, **machine_environment(device, 1), **world},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        said = f"Megatron refuses the flags: {_last_words(done.stderr)}"
        raise ValueError(refusal(done.stderr) or said)
    return Namespace(**json.loads(done.stdout))


def _last_words(errors: str) -> str:
    """Return what a process said last: argparse's line, an exception's, or its assert."""
    lines = [line.strip() for line in errors.splitlines() if line.strip(" ^~")]
    if not lines:
        return "without a word"
    return f"{lines[-2]} (AssertionError)" if lines[-1] == "AssertionError" else lines[-1]


def parameters(args: Namespace) -> int:
    """Return the whole model's parameters; an embedding table that is tied counts once."""
    tied_twice = (
        not args.untie_embeddings_and_output_weights and args.pipeline_model_parallel_size > 1
    )
    total = sum(map(sum, stages(args)))
    return total - (args.padded_vocab_size * args.hidden_size if tied_twice else 0)


def stages(args: Namespace) -> list[tuple[int, int]]:
    """Return every pipeline stage's parameters: cut by tensor parallelism, and whole ones."""
    return [_stage(args, index) for index in range(args.pipeline_model_parallel_size)]


def _stage(args: Namespace, index: int) -> tuple[int, int]:
    count, blocks = args.pipeline_model_parallel_size, _blocks_of_stages(args)[index]
    is_first, is_last = index == 0, index == count - 1
    two = args.untie_embeddings_and_output_weights or count > 1
    tables = is_first + is_last if two else 1
    whole = _norm_vectors(args) * args.hidden_size if is_last else 0
    if is_first and args.position_embedding_type == "learned_absolute":
        whole += args.max_position_embeddings * args.hidden_size
    sizes = [_block(args, kind) for kind in blocks]
    cut = sum(linear + biases for linear, biases, _ in sizes)
    cut += tables * args.padded_vocab_size * args.hidden_size
    return cut, whole + sum(alone for *_, alone in sizes)


def _blocks_of_stages(args: Namespace) -> list[str]:
    """Return every pipeline stage's blocks in order, * for attention and - for an MLP."""
    stages, pattern = args.pipeline_model_parallel_size, args.hybrid_layer_pattern
    if pattern is None:
        pattern = "*-" * args.num_layers
    chunks = pattern.split("|")
    if len(chunks) > 1:  # they go round the stages
        return ["".join(chunks[stage::stages]) for stage in range(stages)]
    size = len(pattern) // stages
    return [pattern[stage * size : (stage + 1) * size] for stage in range(stages)]


def _block(args: Namespace, kind: str) -> tuple[int, int, int]:
    """Return a block's matrices, biases that are cut, and what every tensor-parallel rank has."""
    hidden, ffn = args.hidden_size, args.ffn_hidden_size * (2 if args.swiglu else 1)
    whole = _norm_vectors(args) * hidden + hidden * args.add_bias_linear
    if kind == "-":
        return hidden * (ffn + args.ffn_hidden_size), ffn * args.add_bias_linear, whole
    query = args.num_attention_heads * args.kv_channels
    qkv = query + 2 * args.num_query_groups * args.kv_channels
    head_norms = 2 * args.kv_channels * _norm_vectors(args) if args.qk_layernorm else 0
    has_bias = args.add_bias_linear or args.add_qkv_bias
    return hidden * (qkv + query), qkv * has_bias, whole + head_norms


def _norm_vectors(args: Namespace) -> int:
    return 1 if args.normalization == "RMSNorm" else 2


def _fullest(args: Namespace) -> int:
    """Return the parameters of the rank that has most."""
    tensor = int(args.tensor_model_parallel_size)
    return max(cut // tensor + whole for cut, whole in stages(args))


def micro_batches(args: Namespace) -> int:
    """Return how many every rank accumulates in a step."""
    return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))


def hidden_bytes(args: Namespace) -> int:
    """Return the size of one micro-batch's hidden states, whole."""
    return int(args.micro_batch_size * args.seq_length * args.hidden_size * args.weight_bytes)


def memory(args: Namespace) -> dict[str, int]:
    """Count the rank that holds most; fragmentation, workspaces and NCCL's buffers come on top."""
    tensor, count = args.tensor_model_parallel_size, _fullest(args)
    matrices = max(sum(_block(args, b)[0] for b in blocks) for blocks in _blocks_of_stages(args))
    sharers = args.data_parallel_size if args.use_distributed_optimizer else 1
    tokens = args.micro_batch_size * args.seq_length
    if args.infoentropy_fused_linear:
        # Two chunks while their statistics are gathered, and never more than there are tokens.
        tokens = min(2 * args.infoentropy_chunk_tokens, tokens)
    return {
        "weights": count * args.weight_bytes,
        # Transformer Engine keeps each matrix in FP8 twice: as it is, and transposed.
        "FP8 copies": 0 if args.fp8 is None else 2 * matrices // tensor,
        "gradients": count * args.gradient_bytes,
        "optimizer": ceil(count * args.optimizer_bytes / sharers),
        "activations": _activations(args),
        # Of one micro-batch, the gradient in place.
        "logits": tokens * (args.padded_vocab_size // tensor) * args.weight_bytes,
    }


def _recomputed(args: Namespace, blocks: str) -> list[str]:
    """Return the first of a stage's blocks, as they are recomputed together; [] where none is.

    Megatron counts layers: a GPT's is attention and MLP, a hybrid's is one of the two.
    """
    layer = 2 if args.hybrid_layer_pattern is None else 1
    redone, size = "", layer
    if args.recompute_granularity == "full":
        size = layer * (args.recompute_num_layers or 1)
        redone = blocks
        if args.recompute_method == "block":  # the first so many, one by one
            redone, size = blocks[:size], layer
    return [redone[at : at + size] for at in range(0, len(redone), size)]


def _handed_on(args: Namespace) -> int:
    """Return the bytes of a micro-batch's hidden states that one rank keeps, or hands on."""
    ranks = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return hidden_bytes(args) // int(ranks)


def _activations(args: Namespace) -> int:
    """Count those of the stage that keeps most."""
    return max(
        _stage_activations(args, stage, blocks)
        for stage, blocks in enumerate(_blocks_of_stages(args))
    )


def _stage_activations(args: Namespace, stage: int, blocks: str) -> int:
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    behind = stages - 1 - stage
    if virtual:  # chunks of a virtual'th of the stage
        in_flight = ((virtual - 1) * stages + 2 * behind + 1) / virtual
    else:
        in_flight = min(micro_batches(args), behind + 1)
    recomputed = _recomputed(args, blocks)
    sizes = [sum(args.block_activations[kind] for kind in group) for group in recomputed]
    rest = blocks[sum(map(len, recomputed)) :]
    kept = len(sizes) * _handed_on(args) + sum(args.block_activations[kind] for kind in rest)
    return int(ceil(in_flight * kept) + max(sizes, default=0))


def traffic(args: Namespace) -> dict[str, int]:
    """Count what the busiest rank sends: gradients and parameters, hidden states, statistics."""
    data = args.data_parallel_size
    count = _fullest(args)
    gradients = count * args.gradient_bytes
    returned = count * args.weight_bytes if args.use_distributed_optimizer else gradients
    return {
        "tensor parallel": micro_batches(args) * _tensor_parallel(args),
        "pipeline parallel": micro_batches(args) * _pipeline_parallel(args),
        "data parallel": ceil((gradients + returned) * (data - 1) / data),
    }


def _tensor_parallel(args: Namespace) -> int:
    """Count one micro-batch, on a rank of the stage that has the output layer."""
    ranks, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    half = hidden_bytes(args) * (ranks - 1) / ranks  # a reduce-scatter or an all-gather
    blocks = _blocks_of_stages(args)[-1]
    redone = sum(map(len, _recomputed(args, blocks)))
    # A block has one all-reduce each way; if it is recomputed the forward one again. With sequence
    # parallelism its input is gathered once more for the weights' gradients.
    halves = len(blocks) * 4 + redone * 2 + len(blocks) * args.sequence_parallel
    embedding = 2 if stages == 1 else 0
    output_layer = 3 if args.sequence_parallel else 2
    statistics = args.micro_batch_size * args.seq_length * STATISTICS_BYTES * (ranks - 1)
    sent: int = ceil((halves + embedding + output_layer) * half + statistics)
    return sent


def _pipeline_parallel(args: Namespace) -> int:
    """Count one micro-batch on the busiest stage: hidden states onwards, their gradients back."""
    stages = args.pipeline_model_parallel_size
    virtual = int(args.virtual_pipeline_model_parallel_size or 1)
    # The first stage has nobody to send gradients to, unless its next chunk of layers follows on.
    both_ways = 2 if stages > 2 or virtual > 1 else 1
    return both_ways * virtual * _handed_on(args) if stages > 1 else 0


def _training_lines(args: Namespace) -> list[str]:
    tokens, tensor = args.global_batch_size * args.seq_length, args.tensor_model_parallel_size
    pipeline, data = args.pipeline_model_parallel_size, args.data_parallel_size
    layout = f"tensor {tensor} x pipeline {pipeline} x data {data}"
    return [
        f"model              {_model(args)}",
        f"parameters         {parameters(args):,}, at most {_fullest(args):,} on a rank",
        f"layout             {tensor * pipeline * data} ranks: {layout}",
        f"step               {tokens:,} tokens: {args.global_batch_size} sequences of "
        f"{args.seq_length}, {micro_batches(args)} micro-batches of {args.micro_batch_size} "
        "on every rank",
        f"training           {args.train_iters:,} steps, {tokens * args.train_iters:,} tokens",
    ]


def _model(args: Namespace) -> str:
    if args.hybrid_layer_pattern is None:
        return f"GPT of {args.num_layers} layers"
    blocks = "".join(_blocks_of_stages(args))
    return f"hybrid of {blocks.count('*')} attention (*) and {blocks.count('-')} MLP (-) layers"


def _memory_lines(args: Namespace) -> list[str]:
    held = memory(args)
    notes = {
        "FP8 copies": "at most",
        "activations": "Megatron's formula",
        "together": "workspaces and communication buffers come on top",
    }
    return ["memory of the fullest rank"] + [
        f"  {name:16} {_in(MEMORY_UNITS, size):>12}   {notes.get(name, '')}".rstrip()
        for name, size in [*held.items(), ("together", sum(held.values()))]
        if size
    ]


def _traffic_lines(args: Namespace) -> list[str]:
    return ["sent by the busiest rank in a step"] + [
        f"  {name:17} {_in(TRAFFIC_UNITS, size):>11}" for name, size in traffic(args).items()
    ]


def _in(units: dict[str, int], size: int) -> str:
    """Write a size in the largest unit of which there is one, or the smallest."""
    unit = next((unit for unit, of in units.items() if size >= of), list(units)[-1])
    return f"{size / units[unit]:.2f} {unit}"
