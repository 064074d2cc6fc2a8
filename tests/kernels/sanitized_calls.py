"""Every GPU kernel in every way, on small shapes, against float64, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitized_calls.py

--setting N is one dtype with one of the options, so that several processes can share the compiling.
Every tensor is an allocation of its own, of its own size, and no GPU kernels but ours run. With
--plant one row of the gradient lies beyond its memory: memcheck must find that.
"""

import argparse
import os
import sys
from typing import NamedTuple

import on_gpu
import torch

from megatron_infoentropy.kernels import native, reference
from megatron_infoentropy.kernels.contract import MAX, SCALE, SHIFT, SLOPE, Kernels, Options, Shard
from megatron_infoentropy.loss.collective import merge_shards

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
PER_TOKEN = Options(temperature=0.7)  # where each token has a temperature of its own
OPTIONS = [
    Options(),
    PER_TOKEN,
    Options(distance=True),
    Options(squares=True),
    Options(softcap=8.0, temperature=1.3, distance=True, squares=True),
]


class Case(NamedTuple):
    tokens: int
    width: int
    offset: int  # of the first column in wider rows: another alignment for every row
    padding: int = 0


# Less than a vector; a multiple of everything; an odd size with padding; rows that blocks share.
CASES = [Case(5, 3, 1), Case(3, 16384, 0), Case(4, 10007, 3, 500), Case(1, 65537, 1)]


def make_logits(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with masked entries, and targets, one of them ignored, one on another shard."""
    generator = torch.Generator().manual_seed(case.width)
    wide = torch.full((case.tokens, case.width + 2 * case.offset), torch.nan)
    logits = wide.to(dtype)[:, case.offset : case.offset + case.width]
    logits.copy_(torch.randn(case.tokens, case.width, generator=generator) * 4)
    logits[0, 1::3] = -torch.inf
    target = torch.randint(0, case.width - case.padding, (case.tokens,), generator=generator)
    if case.tokens > 2:
        target[1], target[2], logits[1] = -100, case.width + 5, torch.nan
    return logits, target


def shards_of(case: Case) -> list[tuple[slice, Shard]]:
    """The whole, then two uneven shards of it; the padding is the last one's."""
    cut = case.width // 3
    whole, first = Shard(0, case.width - case.padding, -100), Shard(0, cut, -100)
    second = Shard(cut, case.width - case.padding - cut, -100)
    every = [(slice(0, case.width), whole), (slice(0, cut), first)]
    return [*every, (slice(cut, case.width), second)]


def coefficients_of(statistics: torch.Tensor) -> torch.Tensor:
    """Of order one, relative to the true maximum."""
    result = torch.linspace(-1, 1, statistics.numel()).reshape(statistics.shape).contiguous()
    result[SHIFT] = statistics[MAX]
    result[SCALE], result[SLOPE] = result[SCALE] + 2, 0.3
    return result


def check(kernels: Kernels, case: Case, dtype: torch.dtype, options: Options) -> None:
    """Statistics of every shard and folded, gradients elsewhere and in place.

    Raises:
        AssertionError: a number is not that of float64.
    """
    logits, target = make_logits(case, dtype)
    slack = 3e-6 * (1 + options.softcap)
    inverse = torch.linspace(0.5, 2, case.tokens) if options == PER_TOKEN else None
    exact_inverse = None if inverse is None else inverse.double()
    found = []
    for columns, shard in shards_of(case):
        x = logits[:, columns]
        exact = reference.shard_statistics(x.double(), target, shard, options, exact_inverse)
        got = kernels.shard_statistics(x, target, shard, options, inverse)
        found.append(got)
        close(got, exact, 1e-5, slack)
        coefficients = coefficients_of(exact.float())
        truth, wide = torch.empty(x.shape, dtype=torch.float64), coefficients.double()
        reference.shard_gradient(x.double(), target, shard, options, wide, truth, exact_inverse)
        for out in (torch.full((len(x), x.shape[1] + 1), 7.0, dtype=dtype)[:, 1:], x.clone()):
            source = out if out.shape == x.shape and out.stride(0) == x.shape[1] else x
            kernels.shard_gradient(source, target, shard, options, coefficients, out, inverse)
            close(out, truth, 2 * ROUNDING[dtype], 10 * slack)
    columns_of = [shard.columns for _, shard in shards_of(case)[1:]]
    folded = merge_shards(torch.stack(found[1:]), columns_of, options)
    alone = merge_shards(torch.stack(found[:1]), [sum(columns_of)], options)
    kept = target != -100  # the statistics of others are 0 on every shard, which folds to no 0
    for part, whole in zip(folded, alone, strict=True):
        if part is not None:
            close(part[kept], whole[kept].double(), 1e-5, slack)


def close(got: torch.Tensor, truth: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=atol, equal_nan=True)


# fp16 differs in how logits are unpacked only.
SETTINGS = [
    (torch.float16, Options()),
    *((dtype, options) for dtype in (torch.bfloat16, torch.float32) for options in OPTIONS),
]


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
    kernels.shard_gradient(logits, target, shard, Options(), coefficients, out)
    torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=[*on_gpu.MODULES, "native"], action="append")
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), action="append")
    parser.add_argument("--smallest", action="store_true", help="the shape of least columns alone")
    parser.add_argument("--plant", action="store_true")
    words = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
    for name in words.backend or on_gpu.MODULES:
        if words.plant:
            plant(on_gpu.MODULES[name].KERNELS)
            continue
        for number in words.setting or range(len(SETTINGS)):
            for case in CASES[:1] if words.smallest else CASES:
                check(kernels_named(name), case, *SETTINGS[number])
        sys.stdout.write(f"{name}: every call equals float64\n")
