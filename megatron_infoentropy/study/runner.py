"""Does a whole study: the data, the runs one after the other or side by side, the report.

Every run is a process of its own, so that one that fails, or is killed for its memory, takes no
other with it. Its words are kept in OUTPUT/logs/NAME.log and passed on, with its place in the study
and the time left.

Such a process is `infoentropy study --only PART`; as a Slurm job array a study is one task for the
data, one for every run, one for the report.
"""

import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megatron_infoentropy.runtime.device import find_device
from megatron_infoentropy.study.ledger import Progress, read_progress, run_steps
from megatron_infoentropy.study.plan import Member, Study
from megatron_infoentropy.study.steps import find_digest, member_steps, prepare

DATA, REPORT = "data", "report"
LOGS, SCRIPT = "logs", "study.slurm"
Worker = subprocess.Popen[str]
Say = Callable[[str], object]


class StudyFailed(RuntimeError):
    """Something of a study failed; says what, where to read on, and what was done all the same."""


@dataclass(frozen=True)
class State:
    """A run, its place in the study from 1, and what is finished of it."""

    number: int
    member: Member
    progress: Progress

    @property
    def is_done(self) -> bool:
        return not self.progress.left

    def __str__(self) -> str:
        done, left = (", ".join(steps) for steps in (self.progress.done, self.progress.left))
        if self.is_done:
            return f"done in {duration(self.progress.seconds)}"
        return f"to do: {left}" + (f" (done: {done})" if done else "")


def find_states(study: Study, output: Path) -> list[State]:
    """Return what is finished of every run; reads what is not as recorded, starts nothing."""
    digest = find_digest(study, output)
    every = [(member, member_steps(study, member, output)) for member in study.members]
    return [
        State(number, member, read_progress(output / member.name, steps, digest))
        for number, (member, steps) in enumerate(every, start=1)
    ]


def do_part(study: Study, output: Path, part: str) -> Path | None:
    """Do one part of a study in this process: "data", the name of a run, or "report".

    Returns:
        The page, if it was the report.

    Raises:
        ValueError, RuntimeError: what stopped it, in words.
    """
    if part == REPORT:
        return report(study, output)
    member = None if part == DATA else study.member(part)
    digest = prepare(study, output)
    if member is not None:
        run_steps(output / member.name, member_steps(study, member, output), digest)
    return None


def report(study: Study, output: Path) -> Path:
    """Write the report of all runs that are finished; it names those that are not.

    Raises:
        StudyFailed: no run is finished.
    """
    states = find_states(study, output)
    done = [output / state.member.name for state in states if state.is_done]
    missing = [state.member.name for state in states if not state.is_done]
    if not done:
        raise StudyFailed(f"no run of {study.path} is finished, so there is nothing to report")
    notes = [f"{len(missing)} of {len(states)} planned runs are missing: {', '.join(missing)}."]
    return _write(done, output, notes if missing else [])


def _write(runs: list[Path], output: Path, notes: list[str]) -> Path:
    from megatron_infoentropy.evaluate.report import write_report

    return write_report(runs, output, notes=notes)


def duration(seconds: float) -> str:
    """Return a time as `45 s`, `12 min` or `3 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def write_script(study: Study, output: Path, jobs: int) -> Path:
    """Write OUTPUT/study.slurm, an array of which `jobs` tasks may run at a time."""
    script = output / SCRIPT
    (output / LOGS).mkdir(parents=True, exist_ok=True)  # Slurm does not make it
    count, last = len(study.members), len(study.members) + 1
    # Slurm takes quotes as a shell does, and %% for a percent sign.
    log = shlex.quote(f"{str(output).replace('%', '%%')}/{LOGS}/slurm-%A-%a.log")
    runs = "\n".join(f"  {shlex.quote(member.name)}" for member in study.members)
    file, name, word, path = (
        shlex.quote(str(each)) for each in (script, study.name, study.path, output)
    )
    script.write_text(
        f"""\
#!/usr/bin/env bash
# The study {study.name}: {count} runs, each a task of this array; task 0 makes the data,
# task {last} the report. Adapt partition, account, time and GPUs, then submit:
#
#   data=$(sbatch --parsable --array=0 {file})
#   runs=$(sbatch --parsable --dependency=afterok:$data {file})
#   sbatch --dependency=afterany:$runs --array={last} {file}
#
# The last line again, later, renews the report. A task that was ended goes on where it was.
#SBATCH --job-name={name}
#SBATCH --array=1-{count}%{jobs}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output={log}
set -euo pipefail

parts=(
  {DATA}
{runs}
  {REPORT}
)
exec infoentropy study {word} --output {path} --only "${{parts[$SLURM_ARRAY_TASK_ID]}}"
""",
        encoding="utf-8",
    )
    return script


def start_worker(study: Study, output: Path, part: str, *, slot: int, jobs: int) -> Worker:
    """Start a part; `slot` of `jobs` says which cores and GPUs are its own."""
    # -P: this command imports nothing from the folder it is given in either.
    words = [sys.executable, "-P", "-m", "megatron_infoentropy", "study", str(study.path)]
    return subprocess.Popen(
        [*words, "--output", str(output), "--only", part],
        env={**os.environ, **_share(slot, jobs)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C is for the process that then ends this one
    )


def _share(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment for one of several jobs; what the user set of threads stays."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    share = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    share |= {name: os.environ[name] for name in share if name in os.environ}
    if jobs > 1 and (device := find_device()).type == "cuda" and jobs <= device.count:
        known = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = known.split(",") if known else [str(i) for i in range(device.count)]
        share["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot::jobs])
    return share


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, end the block as Ctrl-C does: with its clean-up.

    So does SIGINT, which shells have background processes ignore. For the main thread.
    """

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_study(study: Study, output: Path, *, jobs: int = 1, say: Say) -> Path:
    """Do what is not finished of a study, `jobs` runs at a time, and write its report.

    Returns:
        The page.

    Raises:
        StudyFailed: the data could not be made, or runs failed: after all others were done and
            reported.
    """
    output.mkdir(parents=True, exist_ok=True)
    if find_digest(study, output) is None:
        _make_data(study, output, say)
    runs = _Runs(study, output, jobs, say)
    runs.do()
    if len(runs.failed) == len(runs.states):
        raise StudyFailed(f"all runs failed; why is in {output / LOGS}")
    page = report(study, output)
    if runs.failed:
        raise StudyFailed(
            f"{len(runs.failed)} of {len(runs.states)} runs failed: {', '.join(runs.failed)}; why "
            f"is in {output / LOGS}. The others are in {page}; the same command tries again"
        )
    return page


def _make_data(study: Study, output: Path, say: Say) -> None:
    worker, last = start_worker(study, output, DATA, slot=0, jobs=1), ""
    assert worker.stdout is not None
    try:
        for text in worker.stdout:
            last = text.strip() or last
            say(f"data: {text.rstrip()}")
    finally:
        code = _stop(worker)
    if code != 0:
        raise StudyFailed(f"the data could not be made: {last}")


def _stop(worker: Worker) -> int:
    """End a worker if it still runs; it ends its own processes."""
    if worker.poll() is None:
        worker.terminate()
    return worker.wait()


@dataclass
class _Active:
    """A run on its way."""

    state: State
    worker: Worker
    slot: int
    start: float = field(default_factory=time.monotonic)
    last: str = ""  # that it said

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


class _Runs:
    """The runs of a study; `failed` are the names of those that ended with an error."""

    def __init__(self, study: Study, output: Path, jobs: int, say: Say) -> None:
        self.study, self.output, self.jobs, self.say = study, output, jobs, say
        self.states = find_states(study, output)
        self.failed: list[str] = []
        self._waiting = [state for state in self.states if not state.is_done]
        self._took = [state.progress.seconds for state in self.states if state.is_done]
        self._active: list[_Active] = []
        self._said: queue.Queue[tuple[_Active, str | None]] = queue.Queue()  # None: it ended

    def do(self) -> None:
        for state in self.states:
            if state.is_done:
                self._tell(state, str(state))
        try:
            while self._waiting or self._active:
                while self._waiting and len(self._active) < self.jobs:
                    self._start(self._waiting.pop(0))
                active, text = self._said.get()
                if text is None:
                    self._end(active)
                else:
                    active.last = text
                    self._tell(active.state, text + self._left())
        finally:
            for active in self._active:
                _stop(active.worker)

    def _start(self, state: State) -> None:
        slot = min(set(range(self.jobs)) - {active.slot for active in self._active})
        worker = start_worker(self.study, self.output, state.member.name, slot=slot, jobs=self.jobs)
        active = _Active(state, worker, slot)
        self._active.append(active)
        self._tell(state, f"begins, {state}" + self._left())
        threading.Thread(target=self._listen, args=(active,), daemon=True).start()

    def _listen(self, active: _Active) -> None:
        log = self.output / LOGS / f"{active.state.member.name}.log"
        log.parent.mkdir(exist_ok=True)
        assert active.worker.stdout is not None
        with log.open("w", encoding="utf-8") as file:
            for text in active.worker.stdout:
                file.write(text)
                file.flush()
                if text.strip():
                    self._said.put((active, text.rstrip()))
        self._said.put((active, None))

    def _end(self, active: _Active) -> None:
        code = active.worker.wait()
        self._active.remove(active)
        if code == 0:
            self._took.append(active.seconds)
            self._tell(active.state, f"done in {duration(active.seconds)}" + self._left())
        else:
            self.failed.append(active.state.member.name)
            self._tell(active.state, f"FAILED with exit code {code}: {active.last}")

    def _tell(self, state: State, text: str) -> None:
        self.say(f"run {state.number} of {len(self.states)}, {state.member.name}: {text}")

    def _left(self) -> str:
        """Return the time left for all runs, once one has ended."""
        if not self._took:
            return ""
        each = sum(self._took) / len(self._took)
        left = each * len(self._waiting)
        left += sum(max(each - active.seconds, 0.0) for active in self._active)
        return f" | {duration(left / self.jobs)} left in all"
