"""Times anything that runs in steps, candidates taken in turn, so that a busy moment of the machine
falls on all of them alike.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_infoentropy.bench.clock import Clock, clock_for
from megatron_infoentropy.bench.providers import Setting
from megatron_infoentropy.bench.results import Row, row_of_case

SCALE = 3.0  # standard deviation of the logits


@dataclass(frozen=True)
class Experiment:
    """The conditions that every provider of a case shares."""

    setting: Setting
    logits: torch.Tensor  # [tokens, columns], this rank's shard
    target: torch.Tensor  # [tokens], ids in the whole vocabulary
    clock: Clock
    repeats: int

    @property
    def logits_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    def row(self, **fields: Any) -> Row:
        """A row with the columns of the case filled in."""
        threads, clock = torch.get_num_threads(), self.clock.name
        return row_of_case(self.setting.case, threads=threads, clock=clock, **fields)


def prepare(setting: Setting, *, repeats: int) -> Experiment:
    """The same numbers on every run: a shard of this rank's own, targets that all ranks share."""
    case, device = setting.case, setting.device
    generator = torch.Generator(device).manual_seed(1 + setting.group.rank())
    logits = torch.randn(case.tokens, case.columns, device=device, generator=generator)
    generator = torch.Generator(device).manual_seed(0)
    entries = case.columns * case.tensor_parallel
    target = torch.randint(entries, (case.tokens,), device=device, generator=generator)
    logits = logits.mul_(SCALE).to(setting.dtype)
    return Experiment(setting, logits, target, clock_for(device), repeats)


Pass = Callable[[], Iterator[None]]
"""One pass: prepares, yields, then yields after each of its timed steps."""


class Spread(NamedTuple):
    """Median and the middle 60 %."""

    median: float
    p20: float
    p80: float


def time_in_turn[Name](
    passes: Mapping[Name, Pass], experiment: Experiment, advance: Callable[[int], None]
) -> dict[Name, list[list[float]]]:
    """{name: [repeat][step] ms}. On several ranks each time is that of the slowest."""
    times: dict[Name, list[list[float]]] = {name: [] for name in passes}
    for _ in range(experiment.repeats):
        for name, one_pass in passes.items():
            times[name].append(_time_once(one_pass, experiment))
            advance(1)
    if experiment.setting.case.tensor_parallel == 1:
        return times
    return {name: _slowest_rank(values, experiment) for name, values in times.items()}


def _time_once(one_pass: Pass, experiment: Experiment) -> list[float]:
    steps = one_pass()
    next(steps)
    if experiment.setting.case.tensor_parallel > 1:
        dist.barrier(group=experiment.setting.group)
    experiment.clock.start()
    for _ in steps:
        experiment.clock.mark()
    return experiment.clock.read()


def _slowest_rank(times: list[list[float]], experiment: Experiment) -> list[list[float]]:
    tensor = torch.tensor(times, device=experiment.setting.device, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=experiment.setting.group)
    slowest: list[list[float]] = tensor.tolist()
    return slowest


def spread(values: list[float]) -> Spread:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Spread(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    )


def ratio(values: list[float], ours: list[float]) -> Spread:
    """How many times as long as ours: of the medians, and the spread of the repeats' own ratios."""
    each = spread([value / own for value, own in zip(values, ours, strict=True)])
    return each._replace(median=statistics.median(values) / statistics.median(ours))
