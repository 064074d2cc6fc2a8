"""What this machine computes on, and what its ranks talk through."""

import os
import sys
from dataclasses import dataclass
from typing import Literal

# A step frees what the next one asks for again, and what the system took back meanwhile comes page
# by page, with zeroes. So malloc keeps memory, and asks for huge pages, which no call can tell it.
_KEPT_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)
CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # Megatron compiles small functions; not worth it on a CPU
    "GLIBC_TUNABLES": _KEPT_MEMORY,
}
"""Environment variables of ranks that train on a CPU; a process must be started with them."""


@dataclass(frozen=True)
class Device:
    """A torch device type, the process-group backend that belongs to it, and how many there are."""

    type: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]
    count: int  # GPUs of this machine; 1 for the CPU, whatever its number of cores


def find_device() -> Device:
    """Return cuda, nccl and the GPUs where PyTorch sees any; cpu, gloo and 1 elsewhere.

    The answer stays true after `runtime.cpu.install()`, which makes torch.cuda claim a GPU.
    """
    import torch

    from megatron_infoentropy.runtime import cpu

    if cpu.is_installed() or not torch.cuda.is_available():
        return Device("cpu", "gloo", 1)
    return Device("cuda", "nccl", torch.cuda.device_count())


def use_huge_pages() -> None:
    """Have PyTorch ask for huge pages for tensors in main memory; what the user set stays.

    With pages of 4 KiB, writing a large tensor for the first time costs more time in the kernel
    than in the computation. PyTorch reads the variable once, when the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_memory() -> None:
    """Start this process again with a malloc that keeps memory; not where the user has set it up.

    Call it first: what the process has done by then is done twice.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = _KEPT_MEMORY
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
