"""The device of this machine, with and without the redirections."""

import pytest
import torch

from megatron_infoentropy.runtime import cpu
from megatron_infoentropy.runtime.device import Device, find_device


@pytest.mark.parametrize(
    ("has_gpu", "is_redirected", "device"),
    [
        (True, False, Device("cuda", "nccl", 3)),
        (False, False, Device("cpu", "gloo", 1)),
        (True, True, Device("cpu", "gloo", 1)),  # as the redirections claim
    ],
)
def test_the_device_is_that_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, is_redirected: bool, device: Device
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(cpu, "is_installed", lambda: is_redirected)
    assert find_device() == device
