"""The GPU kernels walked thread by thread on the CPU (emulate_cuda.cpp), as a backend.

What it shows: slicing, alignment, tails, the order of folds, -inf, NaN and accuracy, with the
2-ulp error of the GPU's exponential put in. What it cannot show: races, missing barriers, launch
geometry, and the few instructions that only a GPU has.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from megatron_infoentropy.kernels.contract import Kernels, Options, Shard
from megatron_infoentropy.kernels.native import address_of

SOURCE = Path(__file__).with_name("emulate_cuda.cpp")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of its numbers


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "the tests need a C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "emulate_cuda.so"
        command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(SOURCE), "-o"]
        subprocess.run([*command, str(library)], check=True)
        return ctypes.CDLL(str(library))


def _logits(logits: torch.Tensor, target: torch.Tensor, shard: Shard) -> list[object]:
    return [
        ctypes.c_void_p(logits.data_ptr()),
        DTYPES.index(logits.dtype),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_int64(logits.shape[0]),
        shard.columns,
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_int64(shard.start),
        ctypes.c_int64(shard.ignore_index),
    ]


def _options(options: Options, inverse_temperature_N: torch.Tensor | None) -> list[object]:
    return [
        ctypes.c_float(options.softcap),
        ctypes.c_float(options.temperature),
        ctypes.c_void_p(address_of(inverse_temperature_N) or None),
        4 if options.distance else 0,
        options.rows - 1 if options.squares else 0,
    ]


def shard_statistics(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    shard: Shard,
    options: Options,
    inverse_temperature_N: torch.Tensor | None = None,
    splits: int = 1,
) -> torch.Tensor:
    """See `kernels.contract`; `splits` is how many blocks share a row."""
    statistics_RN = torch.full((options.rows, logits_NV.shape[0]), 7.0)
    _library().emulate_statistics(
        *_logits(logits_NV, target_N, shard),
        *_options(options, inverse_temperature_N),
        splits,
        ctypes.c_void_p(statistics_RN.data_ptr()),
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
    assert coefficients_RN.is_contiguous()
    _library().emulate_gradient(
        *_logits(logits_NV, target_N, shard),
        *_options(options, inverse_temperature_N),
        ctypes.c_void_p(coefficients_RN.data_ptr()),
        ctypes.c_void_p(out_NV.data_ptr()),
        ctypes.c_int64(out_NV.stride(0)),
        out_NV.shape[1],
    )


KERNELS = Kernels("cuda", shard_statistics, shard_gradient)
