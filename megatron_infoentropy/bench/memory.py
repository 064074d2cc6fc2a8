"""Largest sum of live allocations while something runs, beside what lived before it."""

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_mib(run: Callable[[], None], device: torch.device) -> float:
    """MiB that `run` needs at its worst moment: by the allocator's own count on a GPU, by the
    profiler's record of every allocation on a CPU."""
    return (_on_gpu(run) if device.type == "cuda" else _on_cpu(run)) / 2**20


def _on_gpu(run: Callable[[], None]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _on_cpu(run: Callable[[], None]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs its own start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
