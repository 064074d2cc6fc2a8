"""A part of a study in a process of its own: `infoentropy study --only PART`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_infoentropy.runtime.device import find_device
from megatron_infoentropy.study.plan import Study

Worker = subprocess.Popen[str]


def start_worker(study: Study, output: Path, part: str, *, slot: int, jobs: int) -> Worker:
    """Start a part; `slot` of `jobs` says which cores and GPUs are its own."""
    words = [sys.executable, "-m", "megatron_infoentropy", "study", str(study.path)]
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
    """Environment for one of several jobs; what the user has set of threads stays."""
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
