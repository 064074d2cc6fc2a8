"""Rows of the kernels alone, against what bounds them on this machine in the same run.

On a GPU that is a copy of the same logits (PyTorch's), median against median. On a CPU it is the
roofline of `bench.roofline`, best turn against best turn: the slower of memory traffic and
exponentials.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.bench.passes import Experiment, Pass, spread, time_in_turn
from megatron_infoentropy.bench.providers import backends, failure
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.bench.roofline import Roofline, measure_roofline
from megatron_infoentropy.kernels import dispatch, native
from megatron_infoentropy.kernels.contract import MAX, PLAIN, SCALE, SHIFT, Kernels, Shard

COPY = ("torch", "copy")
# step -> (logits read or written, in words)
MOVES = {
    "copy": (2, "1 read, 1 write"),
    "statistics": (1, "1 read"),
    "gradient": (2, "1 read, 1 write"),
    "gradient in place": (2, "1 read, 1 write"),
}
ROOFLINE_BYTES = 1 << 28  # at most; smaller logits are held against memory passes of their own size


class Limit(NamedTuple):
    """The least time of one step, and of what."""

    name: str
    ms: float
    of_best: bool  # compare a kernel's best repeat with it, rather than its median


def limits_of(experiment: Experiment, copy_ms: list[float]) -> tuple[dict[str, Limit], list[Row]]:
    """{step: what bounds it}, and rows of what was measured for it beside the copy."""
    if native.why_unavailable(experiment.logits.device, torch.float32) is not None:
        per_move = spread(copy_ms).median / MOVES["copy"][0]
        return {
            step: Limit("copy", moves * per_move, of_best=False)
            for step, (moves, _) in MOVES.items()
        }, []
    size = min(ROOFLINE_BYTES, max(1 << 16, experiment.logits_bytes))
    roofline = measure_roofline(torch.get_num_threads(), size, repeats=experiment.repeats)
    return _on_cpu(roofline, experiment), _rows(roofline, experiment)


def _on_cpu(roofline: Roofline, experiment: Experiment) -> dict[str, Limit]:
    count, dtype = experiment.logits.numel(), experiment.logits.dtype
    exponentials_ms = count / roofline.exponentials_per_s[dtype] * 1e3
    least = {
        "statistics": ("read", roofline.statistics_ms(dtype, count)),
        "gradient": ("copy", roofline.gradient_ms(dtype, count, in_place=False)),
        "gradient in place": ("change", roofline.gradient_ms(dtype, count, in_place=True)),
    }
    return {
        step: Limit(name if ms > exponentials_ms else "exponentials", ms, of_best=True)
        for step, (name, ms) in least.items()
    }


def _rows(roofline: Roofline, experiment: Experiment) -> list[Row]:
    """Exponentials as bytes of logits, so that all compare."""
    dtype = experiment.logits.dtype
    rates = {
        "read": roofline.read_gb_per_s,
        "copy": roofline.copy_gb_per_s,
        "change": roofline.change_gb_per_s,
        "exponentials": roofline.exponentials_per_s[dtype] * dtype.itemsize / 1e9,
    }
    names = {"kind": "limit", "provider": "this CPU", "by": "peer", "computes": ""}
    return [experiment.row(step=step, gb_per_s=rate, **names) for step, rate in rates.items()]


KERNEL_STEPS = ("statistics", "gradient", "gradient in place")


def measure_kernels(experiment: Experiment) -> list[Row]:
    """What bounds them, then every step of every backend that runs here."""
    shard = Shard(0, experiment.logits.shape[-1], -100)
    arguments = (experiment.logits, experiment.target, shard)
    passes: dict[tuple[str, str], Pass] = {COPY: partial(_copy, experiment.logits)}
    for name in (name for name, reason in backends(experiment.setting).items() if reason is None):
        for step in KERNEL_STEPS:
            passes[name, step] = partial(kernel_pass, step, dispatch.by_name(name), *arguments)
    failed = _rehearse(passes)
    running = {key: one_pass for key, one_pass in passes.items() if key not in failed}
    measured = time_in_turn(running, experiment, lambda work: None)
    times = {key: [steps[0] for steps in values] for key, values in measured.items()}
    limits, rows = limits_of(experiment, times[COPY])
    for key, values in times.items():
        rows.append(_row(*key, values, None if key == COPY else limits[key[1]], experiment))
    for (provider, step), reason in failed.items():
        names = {"provider": f"{provider} kernel", "by": "ours", "computes": "", "step": step}
        rows.append(experiment.row(kind="unavailable", reason=reason, **names))
    return rows


def kernel_pass(
    step: str, kernels: Kernels, logits: torch.Tensor, target: torch.Tensor, shard: Shard
) -> Iterator[None]:
    """A pass of one launch of one of `KERNEL_STEPS`."""
    if step == "statistics":
        yield
        kernels.shard_statistics(logits, target, shard, PLAIN)
        yield
        return
    statistics = kernels.shard_statistics(logits, target, shard, PLAIN)
    coefficients = torch.zeros_like(statistics)
    coefficients[SHIFT] = statistics[MAX]
    coefficients[SCALE] = 1.0
    # Touched memory: the system's clearing of fresh pages is not the kernel's time.
    logits = logits.clone() if step == "gradient in place" else logits
    out = logits if step == "gradient in place" else torch.zeros_like(logits)
    yield
    kernels.shard_gradient(logits, target, shard, PLAIN, coefficients, out)
    yield


def _copy(logits: torch.Tensor) -> Iterator[None]:
    out = torch.zeros_like(logits)
    yield
    out.copy_(logits)
    yield


def _rehearse(passes: dict[tuple[str, str], Pass]) -> dict[tuple[str, str], str]:
    """Compile and warm up; {pass: reason} of those that cannot run."""
    failed = {}
    for key, one_pass in passes.items():
        try:
            list(one_pass())
        except Exception as error:  # whatever a kernel that cannot run says
            failed[key] = failure(error)
    return failed


def _row(
    provider: str, step: str, values: list[float], limit: Limit | None, experiment: Experiment
) -> Row:
    taken, (moved, words) = spread(values), MOVES[step]
    size = moved * experiment.logits_bytes
    bound: dict[str, Any] = {"kind": "limit", "by": "peer"}
    if limit is not None:
        bound = {"kind": "kernel", "by": "ours", "limit": limit.name}
        bound["limit_gb_per_s"] = size / limit.ms / 1e6
        bound["percent_of_limit"] = (
            100 * limit.ms / (min(values) if limit.of_best else taken.median)
        )
    return experiment.row(
        provider=provider,
        computes="",
        step=step,
        repeats=len(values),
        median_ms=taken.median,
        p20_ms=taken.p20,
        p80_ms=taken.p80,
        bytes=size,
        bytes_are=words,
        gb_per_s=size / taken.median / 1e6,
        **bound,
    )
