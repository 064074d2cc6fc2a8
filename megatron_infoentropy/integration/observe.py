"""Numbers that Megatron's sums cannot tell: percentiles and maxima of entropies and weights.

Every micro-batch adds its tokens to histograms of fixed bins on the device; at the log interval one
packed all-reduce joins those of all data-parallel ranks, and only then a host looks. The last rank,
which holds Megatron's writers, reports to the console, TensorBoard and W&B.

It also counts the model's parameters, whatever the layout they are spread over.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.training import (
    get_args,
    get_tensorboard_writer,
    get_timers,
    get_wandb_writer,
    print_rank_0,
    print_rank_last,
)
from megatron.training.training import num_floating_point_operations
from numpy.typing import NDArray

from megatron_infoentropy.loss import TokenStatistics
from megatron_infoentropy.runtime.device import find_device


def announce_size(model: list[Any]) -> list[Any]:
    """Print "model parameters: N" once; a `pre_wrap_hooks` entry of a Megatron model configuration.

    Copies that tensor-parallel ranks or tied pipeline stages hold of one parameter count once.
    """
    tensor_parallel = mpu.get_tensor_model_parallel_group(), mpu.get_expert_tensor_parallel_group()
    own = torch.zeros(2, dtype=torch.int64)  # of all ranks, of experts
    for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
        if param_is_not_tensor_parallel_duplicate(parameter, *tensor_parallel) and not getattr(
            parameter, "shared", False
        ):
            is_expert = not getattr(parameter, "allreduce", True)
            own[int(is_expert)] += parameter.numel()
    dense, experts = own.to(torch.cuda.current_device()).unbind()
    dist.all_reduce(dense, group=mpu.get_model_parallel_group())
    dist.all_reduce(experts, group=mpu.get_expert_tensor_model_pipeline_parallel_group())
    print_rank_0(f"model parameters: {int(dense + experts)}")
    return model


@dataclass(frozen=True)
class Histogram:
    """`bins` equal bins from `low` to `high`; values beyond are counted in the outermost."""

    low: float
    high: float
    bins: int

    def count(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[bins] float64: how much of `mask` falls into each bin; NaN counts nowhere.

        values, mask: [N] float64. Counts of 0 and 1 are exact up to 2^53, whatever the order.
        """
        position = (values - self.low) * (self.bins / (self.high - self.low))
        bin_of = position.nan_to_num(0.0).clamp(0, self.bins - 1).long()
        counted = torch.where(values.isnan(), 0.0, mask)
        return torch.zeros(self.bins, dtype=torch.float64, device=values.device).index_add_(
            0, bin_of, counted
        )

    def edges(self) -> NDArray[np.float64]:
        """[bins + 1]."""
        return np.linspace(self.low, self.high, self.bins + 1)

    def quantile(self, counts: torch.Tensor, share: float) -> float:
        """The value below which `share` of the mass lies, to within a bin; `low` without mass.

        Linear inside a bin. With share 1.0 it is the upper edge of the last bin in use.
        """
        mass, reached = share * float(counts.sum()), counts.cumsum(0)
        index = int((reached < mass).sum())
        before = float(reached[index] - counts[index])
        inside = (mass - before) / max(float(counts[index]), 1e-300)
        return self.low + (index + inside) * (self.high - self.low) / self.bins

    def share_above(self, counts: torch.Tensor, value: float) -> float:
        """The share of the mass above `value`, linear inside its bin; 0 without mass."""
        below = float(np.interp(value, self.edges(), [0.0, *counts.cumsum(0).tolist()]))
        total = float(counts.sum())
        return (total - below) / max(total, 1e-300)


ENTROPY_BINS = 128
# From 2^-30 to 2^34 in as many bins as W&B takes. Less half a bin: 1 is then a bin's middle, and of
# tokens that all have this weight a half is reported to lie above the mean.
WEIGHT_BINS, WEIGHT_OCTAVES = 512, (-30.0625, 33.9375)
SUMS = ("tokens", "cross entropy", "weight", "positions", "objective", "divisor")
# Dense bf16 TFLOP/s of a card as its maker states it; utilisation is given where the name is known,
# also of FP8 runs, so that the two can be compared.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


class TokenObserver:
    """Histograms and sums since the last report; one a training process."""

    def __init__(self, vocab_size: int) -> None:
        self.entropy = Histogram(0.0, math.log(vocab_size), ENTROPY_BINS)
        self.log2_weight = Histogram(*WEIGHT_OCTAVES, WEIGHT_BINS)
        self._counts: torch.Tensor | None = None  # float64: entropy bins, weight bins, SUMS
        self._step: torch.Tensor | None = None  # the same of the step that is being computed
        self._last_step = 0
        self._reported_at = 0.0
        self._drawn = torch.zeros(0), torch.zeros(0)  # counts of the last report

    def add(
        self,
        statistics: TokenStatistics,
        weight: torch.Tensor,
        mask: torch.Tensor,
        objective: torch.Tensor,
    ) -> None:
        """Count the tokens of one micro-batch, all [batch, sequence]; no synchronisation.

        objective: [2], the optimised sum and what divides it.
        """
        mask, weight = mask.double().flatten(), weight.detach().double().flatten()
        ce, entropy = (part.detach().double().flatten() for part in statistics[:2])
        tokens = mask.sum()
        positions = torch.full_like(tokens, mask.numel())  # filled on the device: no wait
        sums = [tokens, (mask * ce).sum(), (mask * weight).sum(), positions]
        mine = torch.cat(
            [
                self.entropy.count(entropy, mask),
                self.log2_weight.count(weight.log2(), mask),
                torch.stack(sums),
                objective.double(),
            ]
        )
        self._step = mine if self._step is None else self._step + mine

    def end_step(self, step: int) -> bool:
        """Take over what the step has counted; False, and nothing is taken, where it was repeated.

        Megatron computes a step again where its rerun state machine looks for a cause.
        """
        counts, self._step = self._step, None
        if step == self._last_step:
            return False
        self._last_step = step
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts + counts
        return True

    def report(self, group: Any, trained: float) -> dict[str, float] | None:
        """Numbers by name, over all ranks of `group`, and a new start; None without tokens here.

        trained: seconds of training up to now. Waits for the device.
        """
        counts, self._counts = self._counts, None
        if counts is None:  # a pipeline stage without the loss
            return None
        dist.all_reduce(counts, group=group)
        seconds, self._reported_at = trained - self._reported_at, trained
        return self._read(counts.cpu(), seconds)

    def _read(self, counts: torch.Tensor, seconds: float) -> dict[str, float]:
        sizes = [self.entropy.bins, self.log2_weight.bins, len(SUMS)]
        entropy, weight, sums = torch.split(counts, sizes)
        self._drawn = entropy, weight
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        tokens = max(total["tokens"], 1.0)
        log2_mean = math.log2(max(total["weight"] / tokens, sys.float_info.min))
        numbers = {"perplexity": math.exp(min(total["cross entropy"] / tokens, 700.0))}
        objective = total["objective"] / (total["divisor"] or 1.0)
        if objective < 0:  # Megatron's own line leaves out what is negative
            numbers["objective"] = objective
        for percent in (10, 50, 90):
            numbers[f"entropy p{percent}"] = self.entropy.quantile(entropy, percent / 100)
        numbers["entropy max"] = self.entropy.quantile(entropy, 1.0)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            numbers[f"weight {name}"] = 2.0 ** self.log2_weight.quantile(weight, share)
        above = self.log2_weight.share_above(weight, log2_mean)
        numbers["share of tokens above mean weight"] = above
        numbers["tokens/s"] = total["positions"] / seconds
        return numbers

    def draw(self, tensorboard: Any, wandb: Any, iteration: int) -> None:
        """Histograms of the last report, for the writers that there are."""
        names, histograms = ("entropy", "log2 weight"), (self.entropy, self.log2_weight)
        for name, histogram, drawn in zip(names, histograms, self._drawn, strict=True):
            edges, counts = histogram.edges(), drawn.numpy()
            values = (edges[1:] + edges[:-1]) / 2
            if tensorboard:
                tensorboard.add_histogram_raw(
                    f"infoentropy/{name}",
                    min=edges[0],
                    max=edges[-1],
                    num=counts.sum(),
                    sum=(values * counts).sum(),
                    sum_squares=(values**2 * counts).sum(),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=iteration,
                )
            if wandb:
                picture = wandb.Histogram(np_histogram=(counts, edges))
                wandb.log({f"infoentropy/{name}": picture}, iteration)


def utilisation(tokens_per_second: float, args: Any) -> dict[str, float]:
    """Model TFLOP/s of a rank and, on a card whose peak is known, its share of that."""
    per_token = num_floating_point_operations(args, 1) / args.seq_length
    tflops = tokens_per_second * per_token / args.world_size / 1e12
    numbers = {"model TFLOP/s per rank": tflops}
    peak = peak_tflops()
    return numbers if peak is None else numbers | {"model FLOP utilisation": tflops / peak}


def peak_tflops() -> float | None:
    """Return the peak of this device, None where its name is not known."""
    name = torch.cuda.get_device_name() if find_device().type == "cuda" else ""
    return next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)


def observed(
    finalize: Callable[..., None], observer: TokenObserver, histogram_interval: int
) -> Callable[..., None]:
    """Megatron's `finalize_model_grads_func`, followed by a report where one is due.

    It is the one place that every rank passes once a step, after the last micro-batch.
    """

    def finalize_model_grads(model: Any, *arguments: Any, **options: Any) -> None:
        finalize(model, *arguments, **options)
        iteration = get_args().curr_iteration + 1
        if observer.end_step(iteration) and iteration % get_args().log_interval == 0:
            _report(observer, iteration, histogram_interval)

    return finalize_model_grads


def _report(observer: TokenObserver, iteration: int, histogram_interval: int) -> None:
    # Megatron's own timer of training steps, which leaves out validation and saving. All of its
    # time, not that since the last log line: before that, behind this, an optimizer takes its step.
    timer = get_timers()("interval-time")
    timer.elapsed(reset=False)  # brings the next up to date
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    numbers = observer.report(group, timer.active_time())
    if numbers is None:
        return
    numbers |= utilisation(numbers["tokens/s"], get_args())
    words = " | ".join(f"{name}: {value:.6G}" for name, value in numbers.items())
    print_rank_last(f" InfoEntropy at iteration {iteration:8d} | {words} |")
    named = {f"infoentropy/{name}": value for name, value in numbers.items()}
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard:
        for name, value in named.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(named, iteration)
    if histogram_interval and iteration % histogram_interval == 0:
        observer.draw(tensorboard, wandb, iteration)
