"""One launch of one kernel, for a profiler to look at:

    python -m megatron_infoentropy.bench.launch_once BACKEND STEP TOKENS COLUMNS DTYPE

Only what runs between the profiler's start and stop is profiled; a launch before that compiles.
"""

import sys

import torch

from megatron_infoentropy.bench.kernel_rows import kernel_pass
from megatron_infoentropy.kernels import dispatch
from megatron_infoentropy.kernels.contract import Shard
from megatron_infoentropy.runtime.device import find_device


def launch_once(backend: str, step: str, tokens: int, columns: int, dtype: torch.dtype) -> None:
    """Launch a backend's "statistics" or "gradient" on random logits [tokens, columns]."""
    device = find_device().type
    logits = torch.randn(tokens, columns, device=device).to(dtype)
    target = torch.randint(columns, (tokens,), device=device)
    arguments = (step, dispatch.by_name(backend), logits, target, Shard(0, columns, -100))
    list(kernel_pass(*arguments))
    steps = kernel_pass(*arguments)
    next(steps)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    next(steps)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    backend, step, tokens, columns, dtype = sys.argv[1:]
    launch_once(backend, step, int(tokens), int(columns), getattr(torch, dtype))
