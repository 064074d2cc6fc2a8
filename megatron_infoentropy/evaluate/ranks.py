"""One process of several that torchrun started, or the only one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# The others may have much more to do; one that died ends all of them, which is torchrun's work.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int
    size: int

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of torchrun, joined over gloo while the block runs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1)
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """A named device, or with "auto" this process's own GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
