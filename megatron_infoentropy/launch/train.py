"""Runs one training on this machine: builds the torchrun command, follows its log."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.evaluate.runlog import TrainingLine, parse_line
from megatron_infoentropy.launch.flags import read_facts, useful_ranks
from megatron_infoentropy.launch.job import TrainingJob, require_layout
from megatron_infoentropy.launch.machine import machine_environment
from megatron_infoentropy.launch.run_folder import LOG, device_name, write_facts
from megatron_infoentropy.progress import progress
from megatron_infoentropy.runtime.device import Device, find_device


class TrainingFailed(RuntimeError):
    """The ranks ended with an error; carries the first traceback they printed."""


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
    flags = job.flags(device)
    facts = read_facts(flags)
    ranks = job.ranks or useful_ranks(facts, device.count if device.type == "cuda" else 1)
    require_layout(ranks, facts)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    entry = ("--nproc-per-node", str(ranks), "-m", "megatron_infoentropy.pretrain")
    environment = machine_environment(device, ranks)
    return Command([*torchrun, *entry, *flags], environment, device, ranks)


def train(
    job: TrainingJob, command: Command, on_line: Callable[[str], object] = lambda line: None
) -> Path:
    """Run the command to its end; returns the run folder. `on_line` is called with every line.

    Raises:
        TrainingFailed: with the ranks' first traceback and where the whole log is.
    """
    job.run.mkdir(parents=True, exist_ok=True)
    log_path = job.run / LOG
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
    name = device_name(command.device)
    parameters = facts.get("model parameters")
    write_facts(job.run, job.recipe, command.words, command.ranks, name, parameters)
    return job.run


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


def _first_failure(log: Path, start: int) -> str:
    """From a rank's first traceback on, without torchrun's own account of its dead children."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "replace")
    text, _, _ = text.partition("torch.distributed.elastic.multiprocessing.errors")
    at = text.find("Traceback (most recent call last)")
    return text[at : at + 3000].rstrip() if at >= 0 else text[-3000:].rstrip()
