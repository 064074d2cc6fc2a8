"""A study as a Slurm job array: one task for the data, one for every run, one for the report."""

import shlex
from pathlib import Path

from megatron_infoentropy.study.plan import Study
from megatron_infoentropy.study.states import DATA, REPORT

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
