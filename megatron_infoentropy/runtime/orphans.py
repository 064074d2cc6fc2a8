"""No process outlives the rank that started it, nor a rank the torchrun of `infoentropy train`.

A rank has children: Megatron's writers of checkpoints and their queue, loaders of data. Whoever
kills a rank (the kernel out of memory, torchrun when another rank failed) leaves them behind, with
the log's pipe still open, and who reads the log waits for ever. A torchrun that is killed, or hears
a signal while it starts or ends its ranks, leaves these behind.
"""

import ctypes
import os
import signal

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
    torchrun = os.environ.pop(TORCHRUN, None)
    if torchrun is not None:
        end_with(int(torchrun))
    forking = os.getpid()

    def remember() -> None:
        nonlocal forking
        forking = os.getpid()

    os.register_at_fork(before=remember, after_in_child=lambda: end_with(forking))


def end_with(parent: int) -> None:
    """Have this process killed when its parent, of this process id, ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before this
        os._exit(1)
