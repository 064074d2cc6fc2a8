"""The GPU kernels as backends of CPU tensors, so that every test of kernels can run on a GPU.

Each call copies what it gets, laid out in memory as it was: whole storages, views with their
offsets and strides, and one storage where the gradient goes over the logits. Results come back.
"""

import functools

import torch

from megatron_infoentropy.kernels import cuda, dispatch, triton_kernels
from megatron_infoentropy.kernels.contract import Kernels, Options, Shard

MODULES = {"triton": triton_kernels, "cuda": cuda}
DEVICE = "cuda"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class _Copies:
    """Storages on the GPU by their address on the CPU."""

    def __init__(self) -> None:
        self._found: dict[int, torch.Tensor] = {}

    def of[Given: (torch.Tensor, None)](self, tensor: Given) -> Given:
        if tensor is None:
            return None
        address = tensor.untyped_storage().data_ptr()
        if address not in self._found:
            self._found[address] = bytes_of(tensor).to(DEVICE, copy=True)
        there = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        storage = self._found[address].untyped_storage()
        return there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def through_gpu(kernels: Kernels) -> Kernels:
    """The same two functions for CPU tensors."""

    def shard_statistics(
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        shard: Shard,
        options: Options,
        inverse_temperature_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        there = _Copies().of
        arguments = (there(logits_NV), there(target_N), shard, options)
        return kernels.shard_statistics(*arguments, there(inverse_temperature_N)).cpu()

    def shard_gradient(
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        shard: Shard,
        options: Options,
        coefficients_RN: torch.Tensor,
        out_NV: torch.Tensor,
        inverse_temperature_N: torch.Tensor | None = None,
    ) -> None:
        there = _Copies().of
        arguments = (there(logits_NV), there(target_N), shard, options, there(coefficients_RN))
        out = there(out_NV)
        kernels.shard_gradient(*arguments, out, there(inverse_temperature_N))
        bytes_of(out_NV).copy_(bytes_of(out))

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
