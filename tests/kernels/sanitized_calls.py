"""Every GPU kernel in every way, on small shapes, against float64, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitized_calls.py

--setting N is one dtype with one of the options, so that several processes can share the compiling.
Every tensor is an allocation of its own, of its own size, and no GPU kernels but ours run. With
--plant one row of the gradient lies beyond its memory: memcheck must find that.
"""

import argparse
import os
import sys
from pathlib import Path

import on_gpu
import torch

sys.path.append(str(Path(__file__).parents[1]))  # what pytest's configuration does
from test_contract import OPTIONS, assert_gradient, assert_statistics, make_case

from megatron_infoentropy.kernels import native
from megatron_infoentropy.kernels.contract import PLAIN, Kernels, Options, Shard

# (vocabulary, tokens, offset): less than a vector; a multiple of everything; an odd size; rows that
# blocks share.
CASES = [(3, 5, 1), (16384, 3, 0), (10007, 4, 3), (65537, 1, 1)]


def check(kernels: Kernels, dtype: torch.dtype, options: Options, per_token: bool) -> None:
    """Statistics and gradients, elsewhere and in place, of every case."""
    for v, tokens, offset in CASES:
        logits, target, shard = make_case(v, dtype, tokens, offset)
        if offset == 0:
            logits = logits.contiguous()  # every row at 16 bytes
        inverse = torch.linspace(0.5, 2, tokens) if per_token else None
        assert_statistics(kernels, logits, target, shard, options, inverse)
        elsewhere = torch.full((tokens, v + 1), 7.0, dtype=dtype)[:, 1:]
        for out in (elsewhere, logits):
            assert_gradient(kernels, (logits, target, shard), options, out, inverse)


# fp16 differs in how logits are unpacked only.
SETTINGS = [(torch.float16, PLAIN, False)]
for dtype in (torch.bfloat16, torch.float32):
    SETTINGS += [(dtype, OPTIONS[name], False) for name in ("plain", "distance", "squares", "all")]
    SETTINGS.append((dtype, PLAIN, True))


def kernels_named(name: str) -> Kernels:
    """A GPU backend for CPU tensors; or the native one, to try this script without a GPU."""
    if name == "native":
        return native.KERNELS
    return on_gpu.through_gpu(on_gpu.MODULES[name].KERNELS)


def plant(kernels: Kernels) -> None:
    """A gradient of 64 rows into memory of 63."""
    logits, target = torch.zeros(64, 16384, device="cuda"), torch.zeros(64, device="cuda").long()
    out = torch.zeros(63, 16384, device="cuda").as_strided((1, 16384), (16384, 1))
    coefficients = torch.zeros(4, 64, device="cuda")
    shard = Shard(0, 16384, -100)
    kernels.shard_gradient(logits, target, shard, PLAIN, coefficients, out)
    torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=[*on_gpu.MODULES, "native"], action="append")
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), action="append")
    parser.add_argument("--plant", action="store_true")
    words = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
    for name in words.backend or on_gpu.MODULES:
        if words.plant:
            plant(on_gpu.MODULES[name].KERNELS)
            continue
        for number in words.setting or range(len(SETTINGS)):
            check(kernels_named(name), *SETTINGS[number])
        sys.stdout.write(f"{name}: every call equals float64\n")
