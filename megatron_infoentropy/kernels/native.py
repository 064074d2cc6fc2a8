"""The contract in C++ (csrc/), for logits in CPU memory: vectorised, multi-threaded.

The extension sees pointers, strides and a thread count, never torch's C++ headers, so that one
build serves every torch.
"""

from typing import Any

import torch

from megatron_infoentropy.kernels.contract import Kernels, Options, Shard

_C: Any = None
try:
    from megatron_infoentropy import _C
except ImportError as error:  # installed without a compiler
    _BUILD_ERROR = str(error)

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these kernels can run, else the reason in a few words."""
    elsewhere = f"it runs on the CPU and the logits are on {device}" if device.type != "cpu" else ""
    return why_not_built() or elsewhere or why_not_of(dtype)


def why_not_built() -> str | None:
    """None where the C++ extension is there, else the reason."""
    return None if _C is not None else f"the C++ extension is not built ({_BUILD_ERROR})"


def why_not_of(dtype: torch.dtype) -> str | None:
    """None where compiled kernels take such logits, else the reason."""
    if dtype in DTYPES:
        return None
    return f"it takes {' or '.join(DTYPES.values())} logits, not {str(dtype)[6:]}"


def instruction_set() -> str:
    """The vector instructions in use: "avx512", "avx2" or "baseline" (SSE2, NEON)."""
    if _C is None:
        raise RuntimeError(f"{why_not_built()}; `make build` builds it")
    return str(_C.instruction_set())


def address_of(optional: torch.Tensor | None) -> int:
    """The address of an argument that may be None, which is 0."""
    return 0 if optional is None else optional.data_ptr()


def arguments(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    inverse_temperature_N: torch.Tensor | None,
) -> dict[str, Any]:
    """Return what every function of the extension takes, by name."""
    return {
        "logits": logits_NV.data_ptr(),
        "dtype": DTYPES[logits_NV.dtype],
        "row_stride": logits_NV.stride(0),
        "tokens": logits_NV.shape[0],
        "target": target_N.data_ptr(),
        "vocab_start": shard.start,
        "columns": shard.columns,
        "ignore_index": shard.ignore_index,
        "inverse_temperatures": address_of(inverse_temperature_N),
        **options._asdict(),
    }


def shard_statistics(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    inverse_temperature_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.contract`."""
    statistics_RN = logits_NV.new_empty((options.rows, logits_NV.shape[0]), dtype=torch.float32)
    _C.shard_statistics(
        **arguments(logits_NV, target_N, shard, options, inverse_temperature_N),
        statistics=statistics_RN.data_ptr(),
        threads=torch.get_num_threads(),
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
    _C.shard_gradient(
        **arguments(logits_NV, target_N, shard, options, inverse_temperature_N),
        width=logits_NV.shape[1],
        coefficients=coefficients_RN.data_ptr(),
        out=out_NV.data_ptr(),
        out_row_stride=out_NV.stride(0),
        threads=torch.get_num_threads(),
    )


KERNELS = Kernels("native", shard_statistics, shard_gradient)
