"""How far a study is, run by run; its parts, done in this process; its report.

As a Slurm job array a study is one task for the data, one for every run, one for the report.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_infoentropy.study.ledger import Progress, read_progress, run_steps
from megatron_infoentropy.study.plan import Member, Study
from megatron_infoentropy.study.steps import find_digest, member_steps, prepare

DATA, REPORT = "data", "report"


class StudyFailed(RuntimeError):
    """Something of a study failed; says what, where to read on, and what was done all the same."""


@dataclass(frozen=True)
class State:
    """A run, its place in the study from 1, and what is finished of it."""

    number: int
    member: Member
    steps: tuple[str, ...]
    done: tuple[str, ...]
    seconds: float

    @property
    def is_done(self) -> bool:
        return self.done == self.steps

    def __str__(self) -> str:
        if self.is_done:
            return f"done in {duration(self.seconds)}"
        left = ", ".join(step for step in self.steps if step not in self.done)
        return f"to do: {left}" + (f" (done: {', '.join(self.done)})" if self.done else "")


def find_states(study: Study, output: Path) -> list[State]:
    """Return what is finished of every run; reads what is not as recorded, starts nothing."""
    digest = find_digest(study, output)
    states = []
    for number, member in enumerate(study.members, start=1):
        steps = member_steps(study, member, output)
        progress = Progress((), 0.0, "")
        if digest is not None:
            progress = read_progress(output / member.name, steps, digest)
        names = tuple(step.name for step in steps)
        states.append(State(number, member, names, progress.done, progress.seconds))
    return states


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


SCRIPT = "study.slurm"
_TEXT = """\
#!/usr/bin/env bash
# The study {name}: {count} runs, each a task of this array; task 0 makes the data, task {last} the
# report. Adapt partition, account, time and GPUs, then submit:
#
#   data=$(sbatch --parsable --array=0 {script})
#   runs=$(sbatch --parsable --dependency=afterok:$data {script})
#   sbatch --dependency=afterany:$runs --array={last} {script}
#
# The last line again, later, renews the report. A task that was ended goes on where it was.
#SBATCH --job-name={job_name}
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
  data
{runs}
  report
)
exec infoentropy study {study} --output {output_word} --only "${{parts[$SLURM_ARRAY_TASK_ID]}}"
"""


def write_script(study: Study, output: Path, jobs: int) -> Path:
    """Write OUTPUT/study.slurm, an array of which `jobs` tasks may run at a time."""
    script = output / SCRIPT
    (output / "logs").mkdir(parents=True, exist_ok=True)  # Slurm does not make it
    count = len(study.members)
    parts = [DATA, *(member.name for member in study.members), REPORT]
    script.write_text(
        _TEXT.format(
            name=study.name,
            count=count,
            last=len(parts) - 1,
            script=shlex.quote(str(script)),
            jobs=jobs,
            job_name=shlex.quote(study.name),
            # Slurm takes quotes as a shell does, and %% for a percent sign.
            log=shlex.quote(f"{str(output).replace('%', '%%')}/logs/slurm-%A-%a.log"),
            runs="\n".join(f"  {shlex.quote(part)}" for part in parts[1:-1]),
            study=shlex.quote(str(study.path)),
            output_word=shlex.quote(str(output)),
        ),
        encoding="utf-8",
    )
    return script
