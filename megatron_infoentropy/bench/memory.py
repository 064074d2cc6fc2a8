"""Largest sum of live allocations while something runs, beside what lived before it."""

import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile


class PeakMeter(Protocol):
    def start(self) -> None:
        """Begin; what lives now is not counted."""

    def stop(self) -> float:
        """MiB at the worst moment since `start`."""


class _AllocatorCount:
    """By the allocator's own count, on a GPU."""

    def start(self) -> None:
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> float:
        return (torch.cuda.max_memory_allocated() - self._before) / 2**20


class _AllocationRecord:
    """By the profiler's record of every allocation, on a CPU; what runs takes longer by it."""

    def start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs its own start and stop otherwise
        self._recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._recorded.start()

    def stop(self) -> float:
        self._recorded.stop()
        assert self._recorded.profiler is not None
        results = self._recorded.profiler.kineto_results
        assert results is not None
        changes: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
        live = peak = 0
        for event in sorted(changes, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak / 2**20


def meter_for(device: torch.device) -> PeakMeter:
    return _AllocatorCount() if device.type == "cuda" else _AllocationRecord()


def peak_mib(run: Callable[[], None], device: torch.device) -> float:
    """MiB that `run` needs at its worst moment."""
    meter = meter_for(device)
    meter.start()
    run()
    return meter.stop()
