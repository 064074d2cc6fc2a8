"""A small training on two gloo ranks that can be killed, stopped and started again.

Ranks are forks of a server that has imported Megatron, so that a start costs two seconds.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from launch import TINY_MODEL, _rank, _server, _start_server
from plain_run import main
from ranks import open_store

from megatron_infoentropy.runtime.cpu import CPU_FLAGS

RANKS = 2
ITERATIONS, SAVE_INTERVAL = 16, 4
FLAGS = [
    *TINY_MODEL,
    *("--mock-data", "--tokenizer-type=NullTokenizer", "--vocab-size=256", "--lr=1e-3"),
    *("--micro-batch-size=2", "--global-batch-size=4", f"--train-iters={ITERATIONS}"),
    *("--ckpt-format=torch_dist", f"--save-interval={SAVE_INTERVAL}"),
]
# Not Megatron's own mean of the objective: its second line after a start is of two iterations.
_LOSS = re.compile(
    r" InfoEntropy at iteration +(\d+) \| (perplexity: \S+).*(weight p99: \S+)[^\n]*\n"
    r"[^\n]* iteration +\1/[^\n]*(grad norm: \S+)"
)
_LOADED = re.compile(r"loading distributed checkpoint from .* at iteration (\d+)")


class Training:
    """Two ranks that train from the newest complete checkpoint of `save`, in the background."""

    def __init__(
        self, folder: Path, save: Path, flags: list[str] | None = None, entry: Any = main
    ) -> None:
        _start_server()
        folder.mkdir(exist_ok=True)
        self.save = save
        self.logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        words = [*CPU_FLAGS, *FLAGS, f"--save={save}", f"--load={save}", *(flags or [])]
        self.store, rendezvous = open_store()
        self.ranks: list[multiprocessing.Process] = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}
            environment = {k: str(v) for k, v in place.items()}
            environment |= {"LOCAL_WORLD_SIZE": str(RANKS), **rendezvous}
            process = _server.Process(target=_rank, args=(entry, (), words, environment, log))
            process.start()
            self.ranks.append(process)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    def kill(self, rank: int) -> None:
        """kill -9 of one rank; then, as torchrun does, of all others."""
        with suppress(ProcessLookupError):
            os.kill(self.ranks[rank].pid, signal.SIGKILL)
        self.kill_all()

    def kill_all(self) -> None:
        for process in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def wait(self, seconds: float = 500) -> list[int | None]:
        """Exit codes, of the ranks that have ended by then; a failed one ends the others."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            codes = [process.exitcode for process in self.ranks]
            if all(code == 0 for code in codes):
                break
            if any(code not in (None, 0) for code in codes):
                for process in self.ranks:
                    process.join(120)  # their own last words, and what they save
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in self.ranks]
        self.kill_all()
        return codes

    def until(self, words: str, seconds: float = 300) -> bool:
        """Wait until rank 0 has logged these words; False if the training ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if words in self.log(0):
                return True
            if any(process.exitcode is not None for process in self.ranks):
                return False
            time.sleep(0.005)
        return False

    def log(self, rank: int) -> str:
        log = self.logs[rank]
        return log.read_text(errors="replace") if log.exists() else ""

    @property
    def losses(self) -> dict[int, tuple[str, ...]]:
        """What the last rank logged of each iteration, to the last digit printed."""
        return {int(m[1]): m.groups()[1:] for m in _LOSS.finditer(self.log(RANKS - 1))}

    @property
    def loaded(self) -> int:
        """The iteration it started from."""
        found = _LOADED.search(self.log(0))
        return int(found[1]) if found else 0


def run_to_end(folder: Path, save: Path, flags: list[str] | None = None) -> Training:
    with Training(folder, save, flags) as training:
        codes = training.wait()
    assert codes == [0] * RANKS, training.log(0)[-3000:] + training.log(1)[-3000:]
    return training
