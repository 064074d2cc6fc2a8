"""Clocks for the steps of one pass: CUDA events on a GPU, wall time on a CPU."""

import time
from typing import Protocol

import torch

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
