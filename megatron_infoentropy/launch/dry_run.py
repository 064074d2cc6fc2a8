"""What a training would be and take, at any number of ranks, without starting one.

Megatron parses and checks the flags in a process of its own, as rank 0 of a world that is not
there; `launch.estimate` does the arithmetic.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.launch.estimate import (
    Memory,
    Shape,
    Traffic,
    memory,
    parameters,
    stages,
    traffic,
)
from megatron_infoentropy.launch.failures import refusal
from megatron_infoentropy.launch.job import require_layout, require_tokenizer
from megatron_infoentropy.launch.recipe import (
    RecipeError,
    chosen_flags,
    last_value,
    load_plan,
    load_recipe,
    machine_environment,
    read_facts,
    to_command_line,
    useful_ranks,
)
from megatron_infoentropy.runtime.device import Device, find_device

MEMORY_UNITS = {"GiB": 2**30, "MiB": 2**20}
TRAFFIC_UNITS = {"GB": 10**9, "MB": 10**6}


class FlagsRefused(ValueError):
    """Megatron, or a check of ours, refused the flags; carries its words."""


@dataclass(frozen=True)
class DryRun:
    """A training that Megatron would accept, and what it takes."""

    ranks: int
    shape: Shape
    parameters: int
    memory: Memory
    traffic: Traffic

    def lines(self) -> list[str]:
        """For a reader, one fact a line."""
        return [*_training_lines(self), *_memory_lines(self), *_traffic_lines(self)]


def dry_run(
    recipe: Path,
    settings: dict[str, Any],
    extra_flags: tuple[str, ...] = (),
    *,
    tokenizer: Path | None = None,
    ranks: int | None = None,
) -> DryRun:
    """Check and count a training; arguments as in `TrainingJob`, of which no data are needed.

    Without `ranks` it is for as many as the recipe says, else as this machine has use for; without
    a tokenizer its size is the recipe's `vocab-size`.

    Raises:
        ValueError: flags that a training would refuse, or a model that the arithmetic does not
            cover.
    """
    device, flags = find_device(), load_recipe(recipe)
    words = chosen_flags(device, flags, settings)
    words += [*stand_ins(recipe, [*words, *extra_flags], tokenizer), *extra_flags]
    facts = read_facts(words)
    on_machine = useful_ranks(facts, device.count if device.type == "cuda" else 1)
    ranks = ranks or load_plan(recipe).ranks or on_machine
    require_layout(ranks, facts)
    shape = parse(words, ranks, device)
    return DryRun(ranks, shape, parameters(shape), memory(shape), traffic(shape))


def stand_ins(recipe: Path, words: list[str], tokenizer: Path | None) -> list[str]:
    """Flags for a tokenizer, if there is none yet, and for data, which nobody will read.

    Raises:
        ValueError: no such tokenizer, or without one `words` do not say how large the vocabulary
            is.
    """
    named: dict[str, Any] = {"tokenizer-type": "NullTokenizer", "mock-data": True}
    if tokenizer is not None:
        require_tokenizer(tokenizer)
        named |= {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": tokenizer}
    elif last_value(words, "vocab-size") is None:
        raise RecipeError(f"{recipe} does not say vocab-size: add it, or name a --tokenizer")
    return to_command_line(named)


def parse(words: list[str], ranks: int, device: Device) -> Shape:
    """The shape of the training that a command line describes, from Megatron's own parser.

    Raises:
        FlagsRefused: with the reason.
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
        raise FlagsRefused(refusal(done.stderr) or said)
    return Shape(**json.loads(done.stdout))


def _last_words(errors: str) -> str:
    """What a process said last before it failed: argparse's line, an exception's, or its assert."""
    lines = [line.strip() for line in errors.splitlines() if line.strip(" ^~")]
    if not lines:
        return "without a word"
    return f"{lines[-2]} (AssertionError)" if lines[-1] == "AssertionError" else lines[-1]


def _training_lines(run: DryRun) -> list[str]:
    shape, tokens = run.shape, run.shape.global_batch_size * run.shape.seq_length
    layout = f"tensor {shape.tensor_parallel} x pipeline {shape.pipeline_parallel}"
    fullest = max(stage.on_a_rank(shape.tensor_parallel) for stage in stages(shape))
    return [
        f"parameters         {run.parameters:,}, at most {fullest:,} on a rank",
        f"layout             {run.ranks} ranks: {layout} x data {shape.data_parallel}",
        f"step               {tokens:,} tokens: {shape.global_batch_size} sequences of "
        f"{shape.seq_length}, {shape.micro_batches} micro-batches of {shape.micro_batch_size} "
        "on every rank",
        f"training           {shape.train_iters:,} steps, {tokens * shape.train_iters:,} tokens",
    ]


def _memory_lines(run: DryRun) -> list[str]:
    shape, held = run.shape, run.memory
    optimizer = _chosen(
        shape.distributed_optimizer,
        (held.optimizer_sharded, held.optimizer_whole),
        "--use-distributed-optimizer",
    )
    logits = _chosen(
        shape.fused_linear, (held.logits_fused, held.logits_whole), "--infoentropy-fused-linear"
    )
    rows = [
        ("weights", held.weights, ""),
        ("FP8 copies", held.fp8_weights, "at most"),
        ("gradients", held.gradients, ""),
        ("optimizer", *optimizer),
        ("activations", held.activations, "Megatron's formula"),
        ("logits", *logits),
        ("together", held.total(shape), "workspaces and communication buffers come on top"),
    ]
    return ["memory of the fullest rank"] + [
        f"  {name:16} {_memory_size(size):>12}   {note}".rstrip()
        for name, size, note in rows
        if size
    ]


def _chosen(is_on: bool, sizes: tuple[int, int], flag: str) -> tuple[int, str]:
    """(what the training takes, what it would with the flag turned); sizes: with and without."""
    chosen, other = sizes if is_on else reversed(sizes)
    return chosen, f"{_memory_size(other)} {'without' if is_on else 'with'} {flag}"


def _traffic_lines(run: DryRun) -> list[str]:
    rows = [
        ("tensor parallel", run.traffic.tensor_parallel),
        ("pipeline parallel", run.traffic.pipeline_parallel),
        ("data parallel", run.traffic.data_parallel),
    ]
    return ["sent by the busiest rank in a step"] + [
        f"  {name:17} {_in(TRAFFIC_UNITS, size):>11}" for name, size in rows
    ]


def _memory_size(size: int) -> str:
    return _in(MEMORY_UNITS, size)


def _in(units: dict[str, int], size: int) -> str:
    """In the largest unit of which there is one, or the smallest."""
    unit = next((unit for unit, of in units.items() if size >= of), list(units)[-1])
    return f"{size / units[unit]:.2f} {unit}"
