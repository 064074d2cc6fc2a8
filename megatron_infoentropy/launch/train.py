"""Runs one training on this machine: builds the torchrun command, follows its log.

`python -m megatron_infoentropy.launch.train RUN EXIT_CODE` ends a Slurm job: it completes run.json,
and says of a training that failed why, if it can.
"""

import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron_infoentropy.evaluate.runlog import LogLine, Values, parse_line
from megatron_infoentropy.files import take_lock
from megatron_infoentropy.launch.failures import describe, explain, refusal, tail
from megatron_infoentropy.launch.job import TrainingJob, require_layout
from megatron_infoentropy.launch.recipe import machine_environment, read_facts, useful_ranks
from megatron_infoentropy.launch.run_folder import (
    LOG,
    STOPPED,
    device_name,
    recorded,
    require_same,
    settle_facts,
)
from megatron_infoentropy.progress import progress
from megatron_infoentropy.runtime.device import Device, find_device
from megatron_infoentropy.runtime.orphans import end_with, telling_its_ranks

SHOWN = (  # lines of the log with these words
    "asked to stop; the ranks save a checkpoint first",  # node.sh says it
    "WARNING: the checkpoint was trained with",  # where no run.json told before
    " tokens: it is cut",  # a conversation
)
LOSS = "cross entropy"
SAVES = re.compile(r"saving checkpoint at iteration +(\d+) ")  # Megatron says it, at the end too
LOCK = "lock"  # in a run folder; of whoever trains there
JOB_BEGINS = "== start of job"  # job.slurm says it


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
    """Return the command that trains the job on this machine.

    Raises:
        ValueError: a recipe, dataset, objective or layout that cannot be used, before anything
            starts.
    """
    device = find_device()
    flags = job.flags(device)
    facts = read_facts(flags)
    ranks = job.ranks or useful_ranks(facts, device.count)
    require_layout(ranks, facts)
    require_same(job.run, flags, switch=job.switch)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    entry = ("--nproc-per-node", str(ranks), "-m", "megatron_infoentropy.pretrain")
    environment = machine_environment(device, ranks)
    return Command([*torchrun, *entry, *flags], environment, device, ranks)


def train(job: TrainingJob, command: Command) -> "Said":
    """Run the command to its end.

    Raises:
        TrainingFailed: with the ranks' first traceback and where the whole log is.
    """
    name = device_name(command.device)
    with (
        locked(job.run),
        recorded(job.run, job.recipe, command.words, command.ranks, name),
    ):
        return follow(job.run, command.words, command.environment)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of the run folder, as node.sh does; not on a file system without locks.

    Raises:
        RuntimeError: another training has it, which would overwrite this one's checkpoints.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+", encoding="utf-8") as lock:
        _take(lock)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        yield


def require_unlocked(run: Path) -> None:
    """Check that no training has the run folder.

    Raises:
        RuntimeError: as of `locked`.
    """
    # Nothing is written: on another host node.sh may be another user's.
    with suppress(OSError), (run / LOCK).open(encoding="utf-8") as lock:
        _take(lock)


def _take(lock: TextIO) -> None:
    if not take_lock(lock.fileno()):
        path = Path(lock.name)
        raise RuntimeError(
            f"another training has the run folder {path.parent}, "
            f"{path.read_text(encoding='utf-8').strip()}: "
            "wait until it ends or stop it, or name another --run"
        )


@dataclass
class Said:
    """What a training that ended well said of itself."""

    was_stopped: bool = False  # by a signal, after a checkpoint
    saved: int = 0  # the last step that was saved; not all are logged
    last: LogLine | None = None  # of training
    validation: LogLine | None = None  # the last one

    def hear(self, line: str) -> LogLine | None:
        """Take note of a line of the log; returns the step that it tells of, if it does."""
        self.was_stopped |= STOPPED in line
        if saves := SAVES.search(line):
            self.saved = int(saves[1])
        try:
            parsed = parse_line(line)
        except ValueError:  # what two ranks made of their lines
            return None
        if parsed and parsed.kind == "validation":
            self.validation = parsed
        if parsed is None or parsed.kind != "training":
            return None
        self.last = parsed
        return parsed

    def outcome(self) -> str:
        """Return one sentence on what was trained."""
        if self.last is None:
            return "no step is in the log: the run has had its train-iters"
        step, losses = max(self.last.iteration, self.saved), []
        if LOSS in self.last.values:
            where = f" at step {self.last.iteration:,}" if self.last.iteration < step else ""
            losses.append(f"{LOSS} {self.last.values[LOSS]:.4f}{where}")
        else:
            losses.append(_without_loss(self.last.values))
        if self.validation and LOSS in self.validation.values:
            at = self.validation
            losses.append(f"of {at.split} data {at.values[LOSS]:.4f} at step {at.iteration:,}")
        end = "stopped after saving at" if self.was_stopped else "trained to"
        told = f": {', '.join(losses)}" if losses else ""
        return f"{end} step {step:,} of {self.last.train_iters:,}{told}"


def _without_loss(values: Values) -> str:
    """Return why a line of the log, of means over an interval's steps, has no cross entropy."""
    if values.get("number of skipped iterations"):
        return "Megatron skipped all steps of the last log interval, as their gradients overflowed"
    if "accuracy" in values:  # which without a token that has a target is not a number either
        return "the loss became NaN in the last log interval: lower the lr, or look at its data"
    return "no token of a step in the last log interval had a target"


def follow(
    run: Path,
    words: list[str],
    environment: dict[str, str],
    forward: tuple[signal.Signals, ...] | None = None,
) -> Said:
    """Run a command to its end, with its output in RUN/train.log and progress on the screen.

    The signals in `forward` are handed to the command. None is for a torchrun, which ends with this
    process however that ends, and its ranks with it.

    Raises:
        TrainingFailed: with what it means, the first traceback and where the whole log is.
    """
    run.mkdir(parents=True, exist_ok=True)
    log_path, said, end = run / LOG, Said(), None
    if forward is None:
        words, forward = telling_its_ranks(words), (signal.SIGTERM,)
        end = partial(end_with, os.getpid())
    with log_path.open("a", encoding="utf-8") as log:
        start = log.tell()

        def keep(line: str) -> None:
            log.write(line)
            log.flush()
            if any(words in line for words in SHOWN):
                with suppress(OSError):  # the terminal may be gone
                    sys.stderr.write(line)

        with _forwarded(forward) as receive:
            process = subprocess.Popen(
                words,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                preexec_fn=end,
            )
            assert process.stdout is not None
            receive(process)
            try:
                _hear(run.name, process.stdout, keep, said)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.stdout.close()  # nobody reads: a rank must not wait for that
                    process.terminate()
                    process.wait()
    if code != 0:
        raise TrainingFailed(describe(code, log_path, start))
    return said


def _hear(name: str, lines: Iterable[str], keep: Callable[[str], object], said: Said) -> None:
    """Keep every line; show progress from the first step on, until the log ends."""
    advance, done = None, 0
    with ExitStack() as shown:
        for line in lines:
            keep(line)
            step = said.hear(line)
            if step is None:
                continue
            if advance is None:  # how long the steps up to here took is not known
                done = step.iteration
                bar = progress(f"train {name}", step.train_iters, "iterations", done)
                advance = shown.enter_context(bar)
            advance(step.iteration - done)
            done = step.iteration


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


def finish(run: Path, code: int) -> str:
    """Complete run.json of a Slurm job that ends with `code`; returns one line for the log."""
    settle_facts(run)
    _, _, last_job = tail(run / LOG).rpartition(JOB_BEGINS)
    if STOPPED in last_job:  # whatever the signal made of srun's exit code
        return "== stopped after saving a checkpoint; the next job goes on from there"
    if code == 0:
        return "== the training ended well"
    reason = explain(last_job) or refusal(last_job) or "look for the first traceback above"
    return f"== the training ended with exit code {code}: {reason}"


if __name__ == "__main__":
    try:
        sys.stdout.write(finish(Path(sys.argv[1]), int(sys.argv[2])) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"run.json could not be completed: {error}")
