"""Ends a Slurm job: `python -m megatron_infoentropy.launch.finish RUN EXIT_CODE`.

Of a training that ended well it completes run.json; of one that failed it says why, if it can.
"""

import json
import re
import sys
from pathlib import Path

from megatron_infoentropy.launch.failures import explain, tail
from megatron_infoentropy.launch.run_folder import LOG, complete_facts

START = "== start of job"


def finish(run: Path, code: int) -> str:
    """One line for the log."""
    if code == 0:
        said = parameters_in(run / LOG)
        if said is not None:
            complete_facts(run, said)
        return "== the training ended well"
    _, _, last_job = tail(run / LOG).rpartition(START)
    reason = explain(last_job) or "look for the first traceback above"
    return f"== the training ended with exit code {code}: {reason}"


def parameters_in(log: Path) -> int | None:
    """What Megatron said when it built the model."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = re.search(r"model parameters: (\d+)", line)
            if found:
                return int(found[1])
    return None


def main() -> None:
    run, code = Path(sys.argv[1]), int(sys.argv[2])
    try:
        sys.stdout.write(finish(run, code) + "\n")
    except (OSError, json.JSONDecodeError) as error:
        sys.exit(f"run.json could not be completed: {error}")


if __name__ == "__main__":
    main()
