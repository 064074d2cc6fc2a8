"""Time and memory of one pass, and passes that take turns, so that a busy moment of the machine
falls on all of them alike.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_infoentropy.bench.providers import Setting
from megatron_infoentropy.bench.results import Row, row_of_case

LOGITS_SCALE = 3.0  # their standard deviation
# What is written to empty the L2 cache, in sizes of it. Once would empty it; 480 MB on an H200 take
# 110 us, in which the host launches what is timed.
L2_FACTOR = 8
RESAMPLES, INTERVAL = 4000, (0.025, 0.975)


class Clock:
    """Times steps: on a CPU by wall time, since a call has finished when it returns; by CUDA events
    on a GPU, where a step ends once everything launched so far has run.
    """

    def __init__(self, device: torch.device, *, flush: bool = True) -> None:
        """flush: overwrite a GPU's L2 cache first, which also gives the host a head start, so that
        the first launches are not what is measured; for passes that are short beside the caches."""
        self.device = device
        self.name = "wall time"  # how times were taken, for the result file
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self.name = "CUDA events, L2 flushed" if flush else "CUDA events"
        if device.type == "cuda" and flush:
            size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self._flush = torch.empty(L2_FACTOR * size, dtype=torch.int8, device="cuda")

    def start(self) -> None:
        """Begin the first step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self._flush is not None:
            self._flush.zero_()
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """End a step."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Return the milliseconds of each step since `start`."""
        steps = pairwise(self._marks)
        if self.device.type == "cuda":
            self._marks[-1].synchronize()
            return [before.elapsed_time(after) for before, after in steps]
        return [(after - before) * 1e3 for before, after in steps]


class PeakMeter:
    """The largest sum of live allocations between `start` and `stop`, beside what lived before: by
    the allocator's own count on a GPU, by the profiler's record on a CPU (which slows what runs).
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def start(self) -> None:
        if self._is_cuda:
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs its own start and stop otherwise
        self._recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._recorded.start()

    def stop(self) -> float:
        """Return the MiB at the worst moment."""
        if self._is_cuda:
            return (torch.cuda.max_memory_allocated() - self._before) / 2**20
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


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Return the MiB that `run` needs at its worst moment."""
    meter = PeakMeter(device)
    meter.start()
    run()
    return meter.stop()


@dataclass(frozen=True)
class Experiment(Setting):
    """A setting, and the conditions that all who are measured in it share."""

    logits: torch.Tensor  # [tokens, columns], this rank's shard
    target: torch.Tensor  # [tokens], ids in the whole vocabulary
    clock: Clock
    repeats: int

    def row(self, **fields: Any) -> Row:
        """Return a row with the columns of the case filled in."""
        threads, clock = torch.get_num_threads(), self.clock.name
        return row_of_case(self.case, threads=threads, clock=clock, **fields)


def prepare(setting: Setting, *, repeats: int) -> Experiment:
    """Return the same numbers on every run: this rank's own shard, targets that all ranks share."""
    case, device = setting.case, setting.device
    generator = torch.Generator(device).manual_seed(1 + setting.group.rank())
    logits = torch.randn(case.tokens, case.columns, device=device, generator=generator)
    generator = torch.Generator(device).manual_seed(0)
    entries = case.columns * case.tensor_parallel
    target = torch.randint(entries, (case.tokens,), device=device, generator=generator)
    logits = logits.mul_(LOGITS_SCALE).to(setting.dtype)
    return Experiment(
        **vars(setting), logits=logits, target=target, clock=Clock(device), repeats=repeats
    )


Pass = Callable[[], Iterator[None]]
"""One pass: prepares, yields, then yields after each of its timed steps."""


def time_in_turn[Name](
    passes: Mapping[Name, Pass],
    clock: Clock,
    repeats: int,
    group: dist.ProcessGroup | None = None,
    advance: Callable[[int], object] = lambda work: None,
) -> dict[Name, list[list[float]]]:
    """Return {name: [step][repeat] ms}; where a group of ranks is given, those of its slowest."""
    times: dict[Name, list[list[float]]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, one_pass in passes.items():
            steps = one_pass()
            next(steps)
            if group is not None:
                dist.barrier(group=group)
            clock.start()
            for _ in steps:
                clock.mark()
            times[name].append(clock.read())
            advance(1)
    if group is not None:
        for name, values in times.items():
            slowest = torch.tensor(values, device=clock.device, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
            times[name] = slowest.tolist()
    return {
        name: [list(step) for step in zip(*values, strict=True)] for name, values in times.items()
    }


class Spread(NamedTuple):
    """Median and the middle 60 %."""

    median: float
    p20: float
    p80: float

    def columns(self, name: str = "") -> dict[str, Any]:
        """Return the columns of a row: of times in ms, or of the ratio of this name."""
        names = (name, f"{name}_p20", f"{name}_p80") if name else ("median_ms", "p20_ms", "p80_ms")
        return dict(zip(names, self, strict=True))


def spread(values: list[float]) -> Spread:
    ordered, last = sorted(values), len(values) - 1
    return Spread(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    )


def columns_of(values: list[float], size: int = 0) -> dict[str, Any]:
    """Return the columns of these times, in which so many bytes had to be moved."""
    taken = spread(values)
    moved = {"bytes": size, "gb_per_s": size / taken.median / 1e6} if size else {}
    return {"repeats": len(values), **taken.columns(), **moved}


def ratio(values: list[float], ours: list[float]) -> Spread:
    """How many times as long as ours: of the medians, and the spread of the repeats' own ratios."""
    each = spread([value / own for value, own in zip(values, ours, strict=True)])
    return each._replace(median=statistics.median(values) / statistics.median(ours))


def median_difference(times: list[float], ours: list[float]) -> tuple[float, float, float]:
    """(lower end, median, upper end) of times - ours, pair by pair; 95 %, by bootstrap."""
    each = torch.tensor(times, dtype=torch.float64) - torch.tensor(ours, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(each), (RESAMPLES, len(each)), generator=generator)
    medians = each[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, float(each.quantile(0.5)), high
