"""The contract in CUDA C++ (csrc/shard_ops_cuda.cu), for logits on an NVIDIA GPU.

The extension gets addresses and the current stream as an integer, launches and returns: nothing
waits for the device, no shape depends on data, and CUDA graphs capture both functions.

A block works on one row. Where there are too few rows to fill the GPU, several blocks share one
(`splits`), which changes how sums are rounded: results are bitwise equal from run to run, and from
one number of tokens to another as long as both are above `2 * multiprocessors`.
"""

from contextlib import suppress
from typing import Any

import torch

from megatron_infoentropy.kernels.contract import Kernels, Options, Shard
from megatron_infoentropy.kernels.native import arguments, why_not_built, why_not_of

_C: Any = None
with suppress(ImportError):  # `why_not_built` says why
    from megatron_infoentropy import _C

OLDEST = (8, 0)  # compute capability: bf16, and what was compiled and looked at
COLUMNS_OF_A_SPLIT = 8192  # at least: what a block reads at once in 16-bit logits


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these kernels can run, else the reason in a few words."""
    if _C is not None and not hasattr(_C, "cuda_shard_statistics"):
        return "the C++ extension was built without CUDA, where there was no nvcc"
    reason = why_not_built() or why_not_on(device) or why_not_of(dtype)
    return reason if reason or torch.cuda.is_available() else "there is no GPU here"


def why_not_on(device: torch.device) -> str | None:
    """None where kernels for NVIDIA GPUs, Triton's too, run on logits there, else the reason."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs and the logits are on {device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST:
        return f"it needs compute capability {'.'.join(map(str, OLDEST))} and {device} has less"
    return None


def splits(tokens: int, columns: int, multiprocessors: int) -> int:
    """How many blocks share a row: enough for two on every multiprocessor, none too small."""
    wanted = -(-2 * multiprocessors // max(tokens, 1))
    return max(1, min(wanted, columns // COLUMNS_OF_A_SPLIT, int(_C.CUDA_MAX_SPLITS)))


def shard_statistics(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    inverse_temperature_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.contract`."""
    n, device = logits_NV.shape[0], logits_NV.device
    statistics_RN = logits_NV.new_empty((options.rows, n), dtype=torch.float32)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    share = splits(n, shard.columns, multiprocessors)
    size = share * n * _C.CUDA_WORKSPACE_FLOATS if share > 1 else 0
    workspace = statistics_RN.new_empty(size)
    with torch.cuda.device(device):
        _C.cuda_shard_statistics(
            **arguments(logits_NV, target_N, shard, options, inverse_temperature_N),
            statistics=statistics_RN.data_ptr(),
            splits=share,
            workspace=workspace.data_ptr(),
            device=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
    return statistics_RN


def shard_gradient(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    coefficients_RN: torch.Tensor,
    out_NV: torch.Tensor,
    inverse_temperature_N: torch.Tensor | None = None,
) -> None:
    """See `kernels.contract`."""
    device = logits_NV.device
    with torch.cuda.device(device):
        _C.cuda_shard_gradient(
            **arguments(logits_NV, target_N, shard, options, inverse_temperature_N),
            width=logits_NV.shape[1],
            coefficients=coefficients_RN.data_ptr(),
            out=out_NV.data_ptr(),
            out_row_stride=out_NV.stride(0),
            device=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


KERNELS = Kernels("cuda", shard_statistics, shard_gradient)
