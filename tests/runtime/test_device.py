"""The device of this machine, with and without the redirections."""

import pytest
import torch

from megatron_infoentropy.runtime import cpu
from megatron_infoentropy.runtime.device import Device, find_device


def test_a_machine_with_gpus_gives_cuda_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert find_device() == Device("cuda", "nccl", 3)


def test_a_machine_without_a_gpu_gives_the_cpu_and_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() == Device("cpu", "gloo", 1)


def test_the_redirections_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as the redirections claim
    monkeypatch.setattr(cpu, "is_installed", lambda: True)
    assert find_device() == Device("cpu", "gloo", 1)
