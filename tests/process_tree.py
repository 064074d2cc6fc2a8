"""What a process has started."""

import os
import signal
from contextlib import suppress
from pathlib import Path


def processes_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(each for child in children for each in processes_of(int(child)))]


def send_to_all(pid: int, number: signal.Signals) -> None:
    """Signal every process of a job, as Slurm does when the job is to end."""
    for each in processes_of(pid):
        with suppress(ProcessLookupError):
            os.kill(each, number)
