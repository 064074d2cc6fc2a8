"""A Slurm that pretends: sbatch, srun and scontrol as programs of a few lines, to be put on PATH.

What they are told is left in NAME.words beside them; `scontrol show job` says what the file "job"
says.
"""

from pathlib import Path

# sbatch runs the job as Slurm would: output to the file that the script names, in the background.
# Its number decides the port of the rendezvous: not the same for all who test on this machine.
SBATCH = """#!/bin/bash
output=$(sed -n 's/^#SBATCH --output=//p' "$1")
export SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=localhost
setsid bash "$1" >> "$output" 2>&1 < /dev/null &
echo $! > "$(dirname "$0")/pid"
echo $SLURM_JOB_ID >> "$(dirname "$0")/jobs"
echo "Submitted batch job $SLURM_JOB_ID"
"""
# srun hands signals to every process of its step, as Slurm does; it ends as its task does.
SRUN = """#!/bin/bash
echo "$@" > "$(dirname "$0")/srun.words"
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 $task $(pgrep -P $task)' USR1 # before the task can say that it has begun
trap : TERM
"$@" &
task=$!
echo $task > "$(dirname "$0")/task.new"
mv "$(dirname "$0")/task.new" "$(dirname "$0")/task"
wait $task
while kill -0 $task 2>/dev/null; do wait $task; done
wait $task
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo "$3" ;;
  "show job") cat "$(dirname "$0")/job" 2> /dev/null ;;
  *) echo "$@" >> "$(dirname "$0")/scontrol.words" ;;
esac
"""
# The scripts look once a second; a tenth of that is enough where their tasks are no trainings.
SLEEP = """#!/bin/sh
exec /bin/sleep 0.1
"""


def install(folder: Path, *, quick: bool = False) -> None:
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}
    for name, text in (programs | ({"sleep": SLEEP} if quick else {})).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
