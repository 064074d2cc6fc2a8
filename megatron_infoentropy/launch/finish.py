"""Ends a Slurm job: `python -m megatron_infoentropy.launch.finish RUN EXIT_CODE`.

It completes run.json; of a training that failed it says why, if it can.
"""

import sys
from pathlib import Path

from megatron_infoentropy.launch.failures import explain, refusal, tail
from megatron_infoentropy.launch.run_folder import LOG, STOPPED, settle_facts

START = "== start of job"


def finish(run: Path, code: int) -> str:
    """One line for the log."""
    settle_facts(run)
    _, _, last_job = tail(run / LOG).rpartition(START)
    if STOPPED in last_job:  # whatever the signal made of srun's exit code
        return "== stopped after saving a checkpoint; the next job goes on from there"
    if code == 0:
        return "== the training ended well"
    reason = explain(last_job) or refusal(last_job) or "look for the first traceback above"
    return f"== the training ended with exit code {code}: {reason}"


def main() -> None:
    run, code = Path(sys.argv[1]), int(sys.argv[2])
    try:
        sys.stdout.write(finish(run, code) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"run.json could not be completed: {error}")


if __name__ == "__main__":
    main()
