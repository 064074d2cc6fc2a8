"""The contract in Triton, for NVIDIA GPUs: launches the kernels of `triton_device`.

Needs no host synchronisation and no shape that depends on data, so CUDA graphs capture both.
Nothing is tuned by timing, which costs at the start and makes results differ from run to run; nor
does the way through a row depend on how many rows there are, so neither does its result.

The launch parameters come from arithmetic and are not measured yet: docs/benchmarks.md has the
registers and instructions counted in the machine code, and what is predicted of them. Where rows do
not start at 16-byte boundaries the statistics read logit by logit, at about two thirds of the speed
(predicted); the gradient does not.

Importing this module imports no Triton; the first launch does.
"""

import ctypes
import importlib.util
import os

import torch

from megatron_infoentropy.kernels.contract import Kernels, Options, Shard
from megatron_infoentropy.kernels.cuda import why_not_on
from megatron_infoentropy.kernels.native import why_not_of

LOG2E = 1.4426950408889634
WARPS = 4
THREADS = 32 * WARPS
LOADS = 4  # of 16 bytes, by a thread at once
REGISTERS = 128  # of a thread, at most: four blocks on a multiprocessor


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these kernels can run, else the reason in a few words."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return why_not_of(dtype) or (None if _is_interpreted() else why_not_on(device))


def _is_interpreted() -> bool:
    """Return whether Triton runs kernels on the CPU, one program after another: for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}


def shard_statistics(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    inverse_temperature_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.contract`."""
    from megatron_infoentropy.kernels.triton_device import statistics_kernel

    n = logits_NV.shape[0]
    statistics_RN = logits_NV.new_empty((options.rows, n), dtype=torch.float32)
    if n == 0:
        return statistics_RN
    scale = _scale(options, inverse_temperature_N)
    with torch.cuda.device(logits_NV.get_device()):
        statistics_kernel[(n,)](
            logits_NV,
            logits_NV.stride(0),
            target_N,
            statistics_RN,
            n,
            shard.start,
            shard.columns,
            shard.ignore_index,
            scale,
            scale * LOG2E,
            statistics_RN if inverse_temperature_N is None else inverse_temperature_N,
            *_softcap_rate(options),
            ALIGNED=_is_aligned(logits_NV),
            SOFTCAP=options.softcap != 0,
            PER_TOKEN=inverse_temperature_N is not None,
            DISTANCE=options.distance,
            SQUARES=options.squares,
            THREADS=THREADS,
            LOADS=LOADS,
            num_warps=WARPS,
            enable_fp_fusion=True,
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
    from megatron_infoentropy.kernels.triton_device import gradient_kernel

    n, width = logits_NV.shape
    if n == 0:
        return
    vector = 16 // logits_NV.element_size()
    block = THREADS * LOADS * vector
    aligned = _is_aligned(logits_NV) and _is_aligned(out_NV)
    # Rows off the boundary begin with a part of a vector.
    blocks = -(-(width if aligned else width + vector - 1) // block)
    with torch.cuda.device(logits_NV.get_device()):
        gradient_kernel[(n * blocks,)](
            logits_NV,
            logits_NV.stride(0),
            out_NV,
            out_NV.stride(0),
            target_N,
            coefficients_RN,
            n,
            shard.start,
            shard.columns,
            width,
            shard.ignore_index,
            _scale(options, inverse_temperature_N),
            coefficients_RN if inverse_temperature_N is None else inverse_temperature_N,
            *_softcap_rate(options),
            blocks,
            ALIGNED=aligned,
            TOGETHER=_lie_alike(logits_NV, out_NV),
            SOFTCAP=options.softcap != 0,
            PER_TOKEN=inverse_temperature_N is not None,
            OFFSET=options.distance,
            QUADRATIC=options.squares,
            BLOCK=block,
            num_warps=WARPS,
            enable_fp_fusion=True,
            maxnreg=register_bound(aligned=aligned, softcap=options.softcap != 0),
        )


def register_bound(*, aligned: bool, softcap: bool) -> int | None:
    """Return the bound on the gradient kernel's registers; None leaves them to the assembler.

    By itself that takes 150 for a softcap and 142 for rows off the boundaries (Triton 3.6, sm_90),
    which leaves three blocks a multiprocessor; bound, it takes 128 and 99 and fewer instructions.
    The plain kernel has 56 anyway, and with both it would spill (Triton 3.9).
    """
    return REGISTERS if softcap == aligned else None


def _scale(options: Options, inverse_temperature_N: torch.Tensor | None) -> float:
    """Return the factor of a value between the softcap's -1 and 1, or of a plain logit.

    Where every token has its own temperature, that comes on top.
    """
    temperature = options.temperature if inverse_temperature_N is None else 1.0
    return (options.softcap or 1.0) / temperature


def _softcap_rate(options: Options) -> tuple[float, float]:
    """2 log2(e) / softcap as a sum of two fp32 numbers, both positive: an infinite logit times
    one of either sign would add up to NaN."""
    exact = 2 * LOG2E / (options.softcap or 1.0)
    high = ctypes.c_float(exact * (1 - 2.0**-23)).value
    return high, exact - high


def _is_aligned(rows_NV: torch.Tensor) -> bool:
    """Return whether every row starts at a 16-byte boundary."""
    stride = rows_NV.stride(0) * rows_NV.element_size() if rows_NV.shape[0] > 1 else 0
    return rows_NV.data_ptr() % 16 == 0 and stride % 16 == 0


def _lie_alike(a_NV: torch.Tensor, b_NV: torch.Tensor) -> bool:
    """Return whether each row of both starts equally far from a 16-byte boundary."""
    apart = (a_NV.stride(0) - b_NV.stride(0)) * a_NV.element_size() if a_NV.shape[0] > 1 else 0
    return (a_NV.data_ptr() - b_NV.data_ptr()) % 16 == 0 and apart % 16 == 0


KERNELS = Kernels("triton", shard_statistics, shard_gradient)
