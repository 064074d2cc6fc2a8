"""Runs one training: builds the torchrun command, follows its log, leaves a run folder.

RUN/run.json       what was run: objective, seed, sizes, command, versions
RUN/train.log      everything Megatron printed
RUN/checkpoints/   Megatron's torch_dist checkpoints
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_infoentropy.data.blend import blend
from megatron_infoentropy.data.manifest import load_manifest
from megatron_infoentropy.evaluate.runlog import TrainingLine, parse_line
from megatron_infoentropy.launch.flags import chosen_flags, read_facts, useful_ranks
from megatron_infoentropy.launch.machine import machine_environment
from megatron_infoentropy.launch.recipe import (
    RecipeError,
    load_plan,
    load_recipe,
    to_command_line,
)
from megatron_infoentropy.progress import progress
from megatron_infoentropy.runtime.device import Device, find_device

SPLITS = {"train": "train-data-path", "validation": "valid-data-path", "test": "test-data-path"}


class TrainingFailed(RuntimeError):
    """The ranks ended with an error; carries the first traceback they printed."""


@dataclass(frozen=True)
class TrainingJob:
    """What to train, on what, where.

    `settings` are flags given beside the recipe (names without dashes); what neither says has the
    published or usual value, see `DEFAULTS`. Of a flag said twice the last counts: default, recipe,
    settings, extra flags.
    """

    recipe: Path
    data: Path  # holds train/, validation/ and test/ token datasets
    tokenizer: Path
    run: Path
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: int | None = None  # on this machine; None is as many as it has use for
    extra_flags: tuple[str, ...] = ()


def require_places(
    *, data: Path | None, tokenizer: Path | None, run: Path | None
) -> tuple[Path, Path, Path]:
    """The three folders that a training needs and a dry run does not.

    Raises:
        ValueError: names those that are missing.
    """
    if data is None or tokenizer is None or run is None:
        given = {"--data": data, "--tokenizer": tokenizer, "--run": run}
        missing = ", ".join(name for name, path in given.items() if path is None)
        raise ValueError(f"training needs {missing}; without them there is only --dry-run")
    return data, tokenizer, run


@dataclass(frozen=True)
class Command:
    """A torchrun command line and the environment it needs."""

    words: list[str]
    environment: dict[str, str]
    device: Device
    ranks: int

    def __str__(self) -> str:
        variables = " ".join(f"{k}={shlex.quote(v)}" for k, v in self.environment.items())
        return f"{variables} {shlex.join(self.words)}"


def build_command(job: TrainingJob) -> Command:
    """The command that trains the job on this machine.

    Raises:
        ValueError: a recipe, dataset, objective or layout that cannot be used, before anything
            starts.
    """
    device = find_device()
    recipe = load_recipe(job.recipe)
    flags = chosen_flags(device, recipe, job.settings)
    facts = read_facts([*flags, *job.extra_flags])
    flags += [*to_command_line(_paths(job, recipe)), *job.extra_flags]
    ranks = job.ranks or useful_ranks(facts, device.count if device.type == "cuda" else 1)
    model_ranks = facts["tensor_parallel"] * facts["pipeline_parallel"]
    if ranks % model_ranks:
        raise ValueError(
            f"{ranks} ranks cannot be split into tensor-parallel {facts['tensor_parallel']} x "
            f"pipeline-parallel {facts['pipeline_parallel']}; use a multiple of {model_ranks}"
        )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    entry = ("--nproc-per-node", str(ranks), "-m", "megatron_infoentropy.pretrain")
    environment = machine_environment(device, ranks)
    return Command([*torchrun, *entry, *flags], environment, device, ranks)


def _paths(job: TrainingJob, recipe: dict[str, Any]) -> dict[str, Any]:
    """Where data, tokenizer and checkpoints are."""
    _require_vocabulary(job, recipe)
    weights = {"train": load_plan(job.recipe).data_weights}
    return {
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": job.tokenizer,
        **{
            flag: _blend(job.data / split, weights.get(split, "natural"))
            for split, flag in SPLITS.items()
        },
        "data-cache-path": job.data / "cache",  # else Megatron writes among the datasets
        "save": job.run / "checkpoints",
        "load": job.run / "checkpoints",
    }


def train(
    job: TrainingJob, command: Command, on_line: Callable[[str], object] = lambda line: None
) -> Path:
    """Run the command to its end; returns the run folder. `on_line` is called with every line.

    Raises:
        TrainingFailed: with the ranks' first traceback and where the whole log is.
    """
    job.run.mkdir(parents=True, exist_ok=True)
    log_path = job.run / "train.log"
    facts: dict[str, Any] = {}
    with log_path.open("a", encoding="utf-8") as log:
        start = log.tell()
        process = subprocess.Popen(
            command.words,
            env={**os.environ, **command.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            lines = _tee(process.stdout, log, on_line, facts)
            _follow(job, lines)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
            code = process.wait()
    if code != 0:
        raise TrainingFailed(
            f"training ended with exit code {code}; the whole log is {log_path}\n"
            + _first_failure(log_path, start)
        )
    _write_facts(job, command, facts)
    return job.run


def _require_vocabulary(job: TrainingJob, recipe: dict[str, Any]) -> None:
    """Megatron takes the tokenizer's size whatever --vocab-size says; a recipe means what it says.

    Raises:
        RecipeError: the training data were tokenized with a vocabulary of another size.
    """
    wanted, size = recipe.get("vocab-size"), load_manifest(job.data / "train").tokenizer.vocab_size
    if wanted not in (None, size):
        raise RecipeError(
            f"{job.recipe} is for a vocabulary of {wanted}, the training data have {size}; "
            "tokenize them anew, or change vocab-size in the recipe"
        )


def _blend(dataset: Path, weights: str) -> list[Any]:
    """[weight, prefix, weight, prefix, ...]"""
    return [word for share in blend(dataset, weights) for word in (share.weight, share.prefix)]


def _tee(
    stream: Iterator[str], log: Any, on_line: Callable[[str], object], facts: dict[str, Any]
) -> Iterator[str]:
    for line in stream:
        log.write(line)
        log.flush()
        on_line(line)
        _, found, value = line.partition("model parameters: ")
        if found:
            facts["model parameters"] = int(value)
        yield line


def _follow(job: TrainingJob, lines: Iterator[str]) -> None:
    """Show progress from the first training line on, until the log ends."""
    parsed = (parse_line(line) for line in lines)
    training = (line for line in parsed if isinstance(line, TrainingLine))
    first = next(training, None)
    if first is None:
        return
    with progress(f"train {job.run.name}", first.train_iters, "iterations") as advance:
        done = first.iteration
        advance(done)
        for line in training:
            advance(line.iteration - done)
            done = line.iteration


def _write_facts(job: TrainingJob, command: Command, said: dict[str, Any]) -> None:
    facts = read_facts(command.words)
    run = {
        "name": job.run.name,
        **facts,
        "data_parallel": command.ranks // (facts["tensor_parallel"] * facts["pipeline_parallel"]),
        "device": _device_name(command.device),
        "parameters": said.get("model parameters"),
        "recipe": job.recipe.name,
        "command": command.words,
        "versions": {
            name: version(name)
            for name in ("megatron-infoentropy", "megatron-core", "torch", "transformers")
        },
    }
    temporary = job.run / "run.json.tmp"
    temporary.write_text(json.dumps(run, indent=2) + "\n")
    temporary.rename(job.run / "run.json")


def _device_name(device: Device) -> str:
    if device.type == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    import torch

    return f"{device.count} x {torch.cuda.get_device_name()}"


def _first_failure(log: Path, start: int) -> str:
    """From a rank's first traceback on, without torchrun's own account of its dead children."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    text, _, _ = text.partition("torch.distributed.elastic.multiprocessing.errors")
    at = text.find("Traceback (most recent call last)")
    return text[at : at + 3000].rstrip() if at >= 0 else text[-3000:].rstrip()
