"""Runs one training on this machine: builds the torchrun command, follows its log."""

import fcntl
import os
import platform
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

from megatron_infoentropy.evaluate.runlog import TrainingLine, ValidationLine, parse_line
from megatron_infoentropy.launch.failures import describe
from megatron_infoentropy.launch.job import TrainingJob, require_layout
from megatron_infoentropy.launch.recipe import machine_environment, read_facts, useful_ranks
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

# Of integration.arguments, for a checkpoint of which no run.json told before.
OTHER_OBJECTIVE = "WARNING: the checkpoint was trained with"


LOSS = "cross entropy"
LOCK = "lock"  # in a run folder; of whoever trains there


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
    with (
        locked(job.run),
        recorded(job.run, job.recipe, command.words, command.ranks, name),
    ):
        return follow(job.run, command.words, command.environment, on_line)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of the run folder, as node.sh does; not on a file system without locks.

    Raises:
        RuntimeError: another training has it, which would overwrite this one's checkpoints.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / LOCK
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8").strip()
            raise RuntimeError(
                f"another training has the run folder {run}, {holder}: "
                "wait until it ends or stop it, or name another --run"
            ) from None
        except OSError:
            pass
        path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield


@dataclass
class Said:
    """What a training that ended well said of itself."""

    parameters: int | None = None
    was_stopped: bool = False  # by a signal, after a checkpoint
    last: TrainingLine | None = None
    validation: ValidationLine | None = None  # the last one

    def outcome(self) -> str:
        """One sentence on what was trained."""
        if self.last is None:
            return (
                "no step is in the log: the run has had its train-iters, or log-interval is longer"
            )
        step, losses = self.last.iteration, []
        if LOSS in self.last.values:
            losses.append(f"{LOSS} {self.last.values[LOSS]:.4f}")
        if self.validation and LOSS in self.validation.values:
            at = self.validation
            losses.append(f"of {at.split} data {at.values[LOSS]:.4f} at step {at.iteration:,}")
        end = "stopped after saving at" if self.was_stopped else "trained to"
        told = f": {', '.join(losses)}" if losses else ""
        return f"{end} step {step:,} of {self.last.train_iters:,}{told}"


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
        with _forwarded(forward) as receive:
            process = subprocess.Popen(
                words,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            assert process.stdout is not None
            receive(process)
            try:
                _show_progress(run.name, _tee(process.stdout, log, on_line, said), said)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
    if code != 0:
        raise TrainingFailed(describe(code, log_path, start))
    return said


@contextmanager
def _forwarded(
    signals: tuple[signal.Signals, ...],
) -> Iterator[Callable[["subprocess.Popen[str]"], None]]:
    """Hand these signals to a process meanwhile, to be named once it runs; only a main thread can.

    What comes before it runs is handed over then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda process: None
        return
    terminal = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    receivers: list[subprocess.Popen[str]] = []
    early: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        if number == signal.SIGHUP:  # the terminal is gone: what is still said must not fail
            for descriptor in terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if receivers:
            receivers[0].send_signal(number)
        else:
            early.append(number)

    def receive(process: "subprocess.Popen[str]") -> None:
        receivers.append(process)
        for number in early:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in signals}
    try:
        yield receive
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


def _training_line(line: str, said: Said) -> TrainingLine | None:
    """None also for what two ranks made of their lines; `said` keeps the last of every kind."""
    try:
        parsed = parse_line(line)
    except ValueError:
        return None
    if isinstance(parsed, ValidationLine):
        said.validation = parsed
    if not isinstance(parsed, TrainingLine):
        return None
    said.last = parsed
    return parsed


def _show_progress(name: str, lines: Iterator[str], said: Said) -> None:
    """Show progress from the first training line on, until the log ends."""
    training = (it for line in lines if (it := _training_line(line, said)) is not None)
    first = next(training, None)
    if first is None:
        return
    with progress(f"train {name}", first.train_iters, "iterations") as advance:
        done = first.iteration
        advance(done)
        for line in training:
            advance(line.iteration - done)
            done = line.iteration
