"""The GPU kernels as backends of CPU tensors, so that every test of kernels can run on a GPU.

Each call copies what it gets, laid out in memory as it was: whole storages, views with their
offsets and strides, and one storage where the gradient goes over the logits. Results come back.
"""

import functools
from typing import Any

import torch

from megatron_infoentropy.kernels import cuda, dispatch, triton_kernels
from megatron_infoentropy.kernels.contract import Kernels

MODULES = {"triton": triton_kernels, "cuda": cuda}
DEVICE = "cuda"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class _Copies:
    """Storages on the GPU by their address on the CPU."""

    def __init__(self) -> None:
        self._found: dict[int, torch.Tensor] = {}

    def of(self, argument: Any) -> Any:
        """A tensor on the GPU; anything else as it is."""
        if not isinstance(argument, torch.Tensor):
            return argument
        address = argument.untyped_storage().data_ptr()
        if address not in self._found:
            self._found[address] = bytes_of(argument).to(DEVICE, copy=True)
        there = torch.empty(0, dtype=argument.dtype, device=DEVICE)
        storage = self._found[address].untyped_storage()
        place = (argument.storage_offset(), argument.shape, argument.stride())
        return there.set_(storage, *place)


def through_gpu(kernels: Kernels) -> Kernels:
    """The same two functions for CPU tensors."""

    def shard_statistics(*arguments: Any) -> torch.Tensor:
        return kernels.shard_statistics(*map(_Copies().of, arguments)).cpu()

    def shard_gradient(*arguments: Any) -> None:
        there = [*map(_Copies().of, arguments)]
        kernels.shard_gradient(*there)
        out, its_out = arguments[5], there[5]
        bytes_of(out).copy_(bytes_of(its_out))

    return Kernels(kernels.name, shard_statistics, shard_gradient)


def install() -> list[str]:
    """Makes them the backends of CPU tensors in this process; their names."""
    for name, module in MODULES.items():
        wrapped = through_gpu(module.KERNELS)
        dispatch.BACKENDS[name] = (wrapped, functools.partial(_on_a_gpu, module.why_unavailable))
        module.shard_statistics = wrapped.shard_statistics
        module.shard_gradient = wrapped.shard_gradient
    return list(MODULES)


def _on_a_gpu(reason: dispatch.Reason, device: torch.device, dtype: torch.dtype) -> str | None:
    return reason(torch.device("cuda"), dtype)
