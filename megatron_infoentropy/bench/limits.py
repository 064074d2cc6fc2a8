"""What bounds each kernel on this machine, measured in the same run.

On a GPU that is a copy of the same logits (PyTorch's), median against median. On a CPU it is the
roofline of `bench.roofline`, best turn against best turn: the slower of memory traffic and
exponentials.
"""

from typing import NamedTuple

import torch

from megatron_infoentropy.bench.experiment import Experiment
from megatron_infoentropy.bench.passes import spread
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.bench.roofline import Roofline, measure_roofline
from megatron_infoentropy.kernels import native

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
