"""No process outlives the rank that started it, nor a rank the torchrun of `infoentropy train`.

A rank has children: Megatron's writers of checkpoints and their queue, loaders of data. Whoever
kills a rank (the kernel out of memory, torchrun when another rank failed) leaves them behind, with
the log's pipe still open, and who reads the log waits for ever. A torchrun that is killed, or hears
a signal while it starts or ends its ranks, leaves these behind.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
TORCHRUN = "INFOENTROPY_TORCHRUN"


def telling_its_ranks(torchrun: list[str]) -> list[str]:
    """Return a torchrun command line that says its process id to its ranks' `leave_none`."""
    return ["sh", "-c", f'{TORCHRUN}=$$ exec "$@"', "sh", *torchrun]


def leave_none() -> None:
    """Have all processes that this one will fork end with it, and this one with its torchrun.

    A spawned one calls `end_with(os.getppid())` itself, when it imports what its parent ran; a rank
    knows of no torchrun but one that was started by `telling_its_ranks`.
    """
    torchrun = int(os.environ.pop(TORCHRUN, 0))
    # Between the two may be a program that PYTHON_EXEC names: torchrun itself ends that one.
    if torchrun and (os.getppid() == torchrun or not _is_running(torchrun)):
        end_with(torchrun)
    forking = os.getpid()

    def remember() -> None:
        nonlocal forking
        forking = os.getpid()

    os.register_at_fork(before=remember, after_in_child=lambda: end_with(forking))


def _is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(") ")[2][0] not in "ZX"  # ended, and only its parent has not noticed


def end_with(parent: int) -> None:
    """Have this process killed when its parent, of this process id, ends; on Linux alone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before this
        os._exit(1)
