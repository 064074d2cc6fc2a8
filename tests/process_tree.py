"""What a process has started, and whether that has ended."""

import os
import signal
import time
from collections.abc import Callable
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


def has_ended(pid: int) -> bool:
    """Wait for it; also one whose parent has not noticed."""
    return wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], object]) -> bool:
    """Whether it comes true within two minutes."""
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())
