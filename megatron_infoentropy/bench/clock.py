"""Clocks for the steps of one pass (CUDA events on a GPU, wall time on a CPU), and its memory.

Memory is the largest sum of live allocations while something runs, beside what lived before it.
"""

import os
import time
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


# What is written to empty the L2 cache, in sizes of it. Once would empty it; 480 MB on an H200 take
# 110 us, in which the host launches what is timed.
L2_FACTOR = 8


class Clock(Protocol):
    name: str  # how the times were taken, in words, for the result file

    def start(self) -> None:
        """Make ready and begin."""

    def mark(self) -> None:
        """A step has ended (on a GPU: once everything launched so far has run)."""

    def read(self) -> list[float]:
        """Milliseconds of each step since `start`."""


class WallClock:
    """For a CPU, where a call has finished when it returns."""

    name = "wall time"

    def start(self) -> None:
        self._times = [time.perf_counter()]

    def mark(self) -> None:
        self._times.append(time.perf_counter())

    def read(self) -> list[float]:
        pairs = zip(self._times, self._times[1:], strict=False)
        return [(after - before) * 1e3 for before, after in pairs]


class EventClock:
    """CUDA events, for passes that are long beside the caches."""

    name = "CUDA events"

    def start(self) -> None:
        torch.cuda.synchronize()
        self._prepare()
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def read(self) -> list[float]:
        self._events[-1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [before.elapsed_time(after) for before, after in pairs]

    def _prepare(self) -> None:
        """Launch what comes before the first event."""


class FlushedEventClock(EventClock):
    """The L2 cache is overwritten first; the writing gives the host a head start, so that the first
    launches are not what is measured."""

    name = "CUDA events, L2 flushed"

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(L2_FACTOR * size, dtype=torch.int8, device="cuda")

    def _prepare(self) -> None:
        self._flush.zero_()


def clock_for(device: torch.device) -> Clock:
    return FlushedEventClock() if device.type == "cuda" else WallClock()
