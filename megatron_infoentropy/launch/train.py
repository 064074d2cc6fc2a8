"""Runs one training on this machine: builds the torchrun command, follows its log."""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infoentropy.evaluate.runlog import TrainingLine, parse_line
from megatron_infoentropy.launch.failures import explain, refusal, tail
from megatron_infoentropy.launch.flags import read_facts, useful_ranks
from megatron_infoentropy.launch.job import TrainingJob, require_layout
from megatron_infoentropy.launch.machine import machine_environment
from megatron_infoentropy.launch.run_folder import (
    LOG,
    STOPPED,
    device_name,
    recorded,
    require_same,
    said_parameters,
)
from megatron_infoentropy.progress import progress
from megatron_infoentropy.runtime.device import Device, find_device

# Of integration.lineage, for a checkpoint of which no run.json told before.
OTHER_OBJECTIVE = "WARNING: the checkpoint was trained with"


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
    require_same(job.run, flags, switch=job.switch)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    entry = ("--nproc-per-node", str(ranks), "-m", "megatron_infoentropy.pretrain")
    environment = machine_environment(device, ranks)
    return Command([*torchrun, *entry, *flags], environment, device, ranks)


def train(
    job: TrainingJob, command: Command, on_line: Callable[[str], object] = lambda line: None
) -> "Said":
    """Run the command to its end; `on_line` is called with every line of the log.

    Raises:
        TrainingFailed: with the ranks' first traceback and where the whole log is.
    """
    name = device_name(command.device)
    with recorded(job.run, job.recipe, command.words, command.ranks, name):
        return follow(job.run, command.words, command.environment, on_line)


@dataclass
class Said:
    """What a training that ended well said of itself."""

    parameters: int | None = None
    was_stopped: bool = False  # by a signal, after a checkpoint


def follow(
    run: Path,
    words: list[str],
    environment: dict[str, str],
    on_line: Callable[[str], object],
    forward: tuple[signal.Signals, ...] = (signal.SIGTERM,),
) -> Said:
    """Run a command to its end, with its output in RUN/train.log and progress on the screen.

    The signals in `forward` are handed to the command.

    Raises:
        TrainingFailed: with what it means, the first traceback and where the whole log is.
    """
    run.mkdir(parents=True, exist_ok=True)
    log_path, said = run / LOG, Said()
    with log_path.open("a", encoding="utf-8") as log:
        start = log.tell()
        process = subprocess.Popen(
            words,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            with _forwarded(forward, process):
                _show_progress(run.name, _tee(process.stdout, log, on_line, said))
                code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code != 0:
        raise TrainingFailed(_failure(code, log_path, start))
    return said


def _failure(code: int, log: Path, start: int) -> str:
    """What it means, and the first traceback; flags that are refused need none."""
    text, whole = tail(log, start), f"the whole log is {log}"
    refused, reason = refusal(text), explain(text)
    if refused and not reason:
        return f"{refused}; {whole}"
    means = f": {reason}" if reason else ""
    return f"training ended with exit code {code}{means}; {whole}\n{_first_failure(text)}"


@contextmanager
def _forwarded(
    signals: tuple[signal.Signals, ...], process: subprocess.Popen[str]
) -> Iterator[None]:
    """Hand these signals to the process meanwhile; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminal = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def hand_on(number: int, frame: object) -> None:
        if number == signal.SIGHUP:  # the terminal is gone: what is still said must not fail
            for descriptor in terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tee(
    stream: Iterator[str], log: Any, on_line: Callable[[str], object], said: Said
) -> Iterator[str]:
    for line in stream:
        log.write(line)
        log.flush()
        on_line(line)
        parameters = said_parameters(line)
        said.parameters = said.parameters if parameters is None else parameters
        said.was_stopped |= STOPPED in line
        if line.startswith(OTHER_OBJECTIVE):
            with suppress(OSError):  # the terminal may be gone
                sys.stderr.write(line)
        yield line


def _training_line(line: str) -> TrainingLine | None:
    """None also for what two ranks made of their lines."""
    try:
        said = parse_line(line)
    except ValueError:
        return None
    return said if isinstance(said, TrainingLine) else None


def _show_progress(name: str, lines: Iterator[str]) -> None:
    """Show progress from the first training line on, until the log ends."""
    training = (said for line in lines if (said := _training_line(line)) is not None)
    first = next(training, None)
    if first is None:
        return
    with progress(f"train {name}", first.train_iters, "iterations") as advance:
        done = first.iteration
        advance(done)
        for line in training:
            advance(line.iteration - done)
            done = line.iteration


TORCHRUNS_OWN = re.compile(
    r"torch.distributed.elastic.multiprocessing|Traceback[^\0]{0,400}torch/distributed/run.py"
)

# Where ranks have met, torch puts their number before every line.
TRACEBACK = re.compile(r"^(\[rank\d+\]: )?Traceback \(most recent call last\):$", re.MULTILINE)


def _first_failure(text: str) -> str:
    """A rank's first traceback, without torchrun's own account of its dead children.

    Of a deep one the frames in the middle are left out: what was raised stands at its end.
    """
    own = TORCHRUNS_OWN.search(text)
    text = text[: own.start()].rpartition("\n")[0] if own else text
    found = TRACEBACK.search(text)
    if found is None:
        return text[-3000:].rstrip()
    rank = found[1] or ""
    lines = [line for line in text[found.start() :].splitlines() if line.startswith(rank)]
    title, *rest = [line.removeprefix(rank) for line in lines]
    frames = "\n".join([title, *itertools.takewhile(lambda line: line[:1] in " \t", rest)])
    after = rest[frames.count("\n") :]
    raised = itertools.takewhile(lambda line: not line.startswith("Traceback"), after)
    if len(frames) > 2500:
        frames = f"{frames[:500]}\n  ...\n{frames[-2000:]}"
    return f"{frames}\n{'\n'.join(raised)[:1500]}".rstrip()
