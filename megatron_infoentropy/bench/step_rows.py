"""Rows of whole training steps: time, difference from ours with an interval, share, memory.

Every rival takes one untimed step, which warms it up, and one that weighs its memory: the largest
sum of allocations beside what lives between steps. Then come timed rounds, in each of which every
rival takes a step, in an order that turns from round to round. What else the machine does falls on
the steps of a round alike, so a rival's difference from ours is taken round by round; its median
has an interval by resampling the rounds.
"""

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.clock import Clock, clock_for, peak_mib
from megatron_infoentropy.bench.parts import PartTimes
from megatron_infoentropy.bench.passes import ratio, spread
from megatron_infoentropy.bench.results import Row, row_of_case
from megatron_infoentropy.bench.training_step import Rival, Training, rivals, training
from megatron_infoentropy.progress import Advance, progress

RESAMPLES, INTERVAL = 4000, (0.025, 0.975)

Steps = dict[str, list[dict[str, float]]]  # {rival: [round] {part: ms}}


def compare_steps(case: Case, *, hidden: int, rounds: int) -> list[Row]:
    """Rows of `measure_steps`, from a process of its own: on a CPU Megatron needs redirections that
    other measurements must not see.

    Raises:
        ValueError: a hidden size or a number of ranks that cannot be.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        threads = torch.get_num_threads()
        return process.submit(measure_steps, case, hidden, rounds, threads).result()


def measure_steps(case: Case, hidden: int, rounds: int, threads: int) -> list[Row]:
    """A row a rival, in a process that has not imported Megatron yet."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module="megatron")
    with training(case, hidden) as run:
        every, refused = rivals(case)
        clock = clock_for(run.device)
        row = partial(row_of_case, case, step="training step", threads=threads, clock=clock.name)
        with progress("steps", (2 + rounds) * len(every), "steps") as advance:
            peaks = {rival.name: _peak(run, rival, advance) for rival in every}
            steps = _timed_rounds(run, every, clock, rounds, advance)
    times = {name: [sum(step.values()) for step in of_rival] for name, of_rival in steps.items()}
    rows = [
        row(
            kind="step",
            **_names(rival, run),
            repeats=rounds,
            **_compared(times[rival.name], times[every[0].name]),
            percent_of_step=_percent(rival, steps[rival.name]),
            peak_mib=peaks[rival.name],
        )
        for rival in every
    ]
    return rows + [
        row(kind="unavailable", **_names(rival, run), reason=f"in a training step: {why}")
        for rival, why in refused
    ]


def _peak(run: Training, rival: Rival, advance: Advance) -> float:
    run.step(rival)  # makes the optimizer's state, once
    peak = peak_mib(partial(run.step, rival), run.device)
    advance(2)
    return peak


def _timed_rounds(
    run: Training, every: list[Rival], clock: Clock, rounds: int, advance: Advance
) -> Steps:
    steps: Steps = {rival.name: [] for rival in every}
    parts = PartTimes(clock)
    parts.watch(run.output_layer)
    for turn in range(rounds):
        first = turn % len(every)
        for rival in every[first:] + every[:first]:
            parts.start()
            run.step(rival)
            steps[rival.name].append(parts.stop())
            advance(1)
    return steps


def _percent(rival: Rival, steps: list[dict[str, float]]) -> float | None:
    """The loss's, the median over the rounds; unknown where it and the output layer are one."""
    if not rival.calls_output_layer:
        return None
    return 100 * spread([step["loss"] / sum(step.values()) for step in steps]).median


def _names(rival: Rival, run: Training) -> dict[str, Any]:
    by = "ours" if rival.is_ours else "peer"
    return {"provider": rival.name, "by": by, "computes": f"{rival.computes}; {run.words}"}


def _compared(times: list[float], ours: list[float]) -> dict[str, float]:
    """Columns of one rival's times; ours is not compared with itself."""
    columns = dict(zip(("median_ms", "p20_ms", "p80_ms"), spread(times), strict=True))
    if times is not ours:
        names = ("times_ours", "times_ours_p20", "times_ours_p80")
        columns |= zip(names, ratio(times, ours), strict=True)
        names = ("minus_ours_low_ms", "minus_ours_ms", "minus_ours_high_ms")
        columns |= zip(names, median_difference(times, ours), strict=True)
    return columns


def median_difference(times: list[float], ours: list[float]) -> tuple[float, float, float]:
    """(lower end, median, upper end) of times - ours, pair by pair; 95 %, by bootstrap."""
    each = torch.tensor(times, dtype=torch.float64) - torch.tensor(ours, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(each), (RESAMPLES, len(each)), generator=generator)
    medians = each[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, float(each.quantile(0.5)), high
