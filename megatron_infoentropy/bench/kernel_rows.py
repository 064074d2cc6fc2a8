"""Rows of the kernels alone, against what bounds them: measured in the same run, in turn.

Statistics read the logits once; the gradient reads and writes them once. Both are held against a
copy (PyTorch's) of the same logits.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from megatron_infoentropy.bench.experiment import Experiment
from megatron_infoentropy.bench.passes import Pass, spread, time_in_turn
from megatron_infoentropy.bench.providers import failure
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.kernels import dispatch
from megatron_infoentropy.kernels.contract import MAX, PLAIN, SCALE, SHIFT, Kernels, Shard

# step -> (logits read or written, in words)
MOVES = {
    "copy": (2, "1 read, 1 write"),
    "statistics": (1, "1 read"),
    "gradient": (2, "1 read, 1 write"),
}
KERNEL_STEPS = ("statistics", "gradient")


def measure_kernels(experiment: Experiment) -> list[Row]:
    """The copy, then statistics and gradient of every backend that runs here."""
    shard = Shard(0, experiment.logits.shape[-1], -100)
    arguments = (experiment.logits, experiment.target, shard)
    passes: dict[tuple[str, str], Pass] = {("torch", "copy"): partial(_copy, experiment.logits)}
    for name in backends_here(experiment):
        for step in KERNEL_STEPS:
            passes[name, step] = partial(kernel_pass, step, dispatch.by_name(name), *arguments)
    failed = _rehearse(passes)
    for key in failed:
        del passes[key]
    measured = time_in_turn(passes, experiment, lambda work: None)
    times = {key: [steps[0] for steps in values] for key, values in measured.items()}
    copy_gb_per_s = 2 * experiment.logits_bytes / spread(times["torch", "copy"]).median / 1e6
    rows = [_row(*key, values, copy_gb_per_s, experiment) for key, values in times.items()]
    for (provider, step), reason in failed.items():
        names = {"provider": f"{provider} kernel", "by": "ours", "computes": "", "step": step}
        rows.append(experiment.row(kind="unavailable", reason=reason, **names))
    return rows


def _rehearse(passes: dict[tuple[str, str], Pass]) -> dict[tuple[str, str], str]:
    """Compile and warm up; {pass: reason} of those that cannot run."""
    failed = {}
    for key, one_pass in passes.items():
        try:
            list(one_pass())
        except Exception as error:  # whatever a kernel that cannot run says
            failed[key] = failure(error)
    return failed


def backends_here(experiment: Experiment) -> list[str]:
    reasons = dispatch.unavailable(experiment.setting.device, experiment.setting.dtype)
    return [name for name, reason in reasons.items() if reason is None]


def kernel_pass(
    step: str, kernels: Kernels, logits: torch.Tensor, target: torch.Tensor, shard: Shard
) -> Iterator[None]:
    """A pass of one launch of "statistics" or "gradient"."""
    if step == "statistics":
        yield
        kernels.shard_statistics(logits, target, shard, PLAIN)
        yield
        return
    statistics = kernels.shard_statistics(logits, target, shard, PLAIN)
    coefficients = torch.zeros_like(statistics)
    coefficients[SHIFT] = statistics[MAX]
    coefficients[SCALE] = 1.0
    out = torch.zeros_like(logits)  # touched: the system's clearing is not the kernel's
    yield
    kernels.shard_gradient(logits, target, shard, PLAIN, coefficients, out)
    yield


def _copy(logits: torch.Tensor) -> Iterator[None]:
    out = torch.zeros_like(logits)
    yield
    out.copy_(logits)
    yield


def _row(
    provider: str, step: str, values: list[float], copy_gb_per_s: float, experiment: Experiment
) -> Row:
    taken, (moved, words) = spread(values), MOVES[step]
    gb_per_s = moved * experiment.logits_bytes / taken.median / 1e6
    bound: dict[str, Any] = {"kind": "limit", "by": "peer"}
    if step in KERNEL_STEPS:
        percent = 100 * gb_per_s / copy_gb_per_s
        bound = {"kind": "kernel", "by": "ours", "limit": "copy", "percent_of_limit": percent}
        bound["limit_gb_per_s"] = copy_gb_per_s
    return experiment.row(
        provider=provider,
        computes="",
        step=step,
        repeats=len(values),
        median_ms=taken.median,
        p20_ms=taken.p20,
        p80_ms=taken.p80,
        bytes=moved * experiment.logits_bytes,
        bytes_are=words,
        gb_per_s=gb_per_s,
        **bound,
    )
