"""What this machine computes on, and what its ranks talk through."""

from dataclasses import dataclass
from typing import Literal


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
