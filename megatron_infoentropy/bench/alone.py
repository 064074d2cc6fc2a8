"""Rows of what is measured beside whole losses: the kernels alone, and the output layer with the
loss, fused and unfused.

Kernels are held against a copy of the same logits by PyTorch, measured in the same turns.

Memory of the output layer is beside the hidden states and the weight. Expected, with L the logits
of all tokens, C those of a chunk, dX and dW gradients in the inputs' dtype, S the weight's as it is
summed in fp32:

    unfused, gradient over the logits    L + dX + dW
    fused                                C + dX + S, or where that is more dX + S + dW (16-bit dW)

and 2 C where ranks gather the statistics of one chunk under the logits of the next.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.bench import timing
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.providers import backends, failure
from megatron_infoentropy.bench.results import Row, row_of_case
from megatron_infoentropy.bench.timing import Experiment, Pass
from megatron_infoentropy.kernels import dispatch
from megatron_infoentropy.kernels.contract import MAX, PLAIN, SCALE, SHIFT, Kernels, Shard
from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)
from megatron_infoentropy.progress import progress
from megatron_infoentropy.runtime.device import find_device

COPY = ("torch", "copy")
MOVES = {"copy": 2, "statistics": 1, "gradient": 2, "gradient in place": 2}  # logits, in and out
MOVES_ARE = {1: "1 read", 2: "1 read, 1 write"}


def measure_kernels(experiment: Experiment) -> list[Row]:
    """Time a copy of the logits, and every step of every backend that runs here."""
    logits, target = experiment.logits, experiment.target
    passes: dict[tuple[str, str], Pass] = {COPY: partial(_copy, logits)}
    for name, reason in backends(experiment.setting).items():
        for step in MOVES if reason is None else ():
            if step != "copy":
                kernels = dispatch.by_name(name)
                passes[name, step] = partial(_kernel_pass, step, kernels, logits, target)
    rows = []
    for key in list(passes):
        try:
            list(passes[key]())  # compiles and warms up
        except Exception as error:  # whatever a kernel that cannot run says
            names = {"provider": f"{key[0]} kernel", "by": "ours", "computes": "", "step": key[1]}
            rows.append(experiment.row(kind="unavailable", reason=failure(error), **names))
            del passes[key]
    times = timing.time_in_turn(passes, experiment.clock, experiment.repeats)
    copy_gb_per_s = MOVES["copy"] * logits.nbytes / timing.spread(_firsts(times[COPY])).median / 1e6
    timed = [_row(*key, _firsts(times[key]), copy_gb_per_s, experiment) for key in passes]
    return timed + rows


def _firsts(repeats: list[list[float]]) -> list[float]:
    return [steps[0] for steps in repeats]


def _kernel_pass(
    step: str, kernels: Kernels, logits: torch.Tensor, target: torch.Tensor
) -> Iterator[None]:
    """One launch of one kernel."""
    shard = Shard(0, logits.shape[-1], -100)
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


def _row(
    provider: str, step: str, values: list[float], copy_gb_per_s: float, experiment: Experiment
) -> Row:
    taken = timing.spread(values)
    size = MOVES[step] * experiment.logits.nbytes
    gb_per_s = size / taken.median / 1e6
    is_copy = (provider, step) == COPY
    limit = {
        "limit": "copy",
        "limit_gb_per_s": copy_gb_per_s,
        "percent_of_limit": 100 * gb_per_s / copy_gb_per_s,
    }
    return experiment.row(
        kind="limit" if is_copy else "kernel",
        provider=provider,
        by="peer" if is_copy else "ours",
        computes="",
        step=step,
        repeats=len(values),
        **taken.columns(),
        bytes=size,
        bytes_are=MOVES_ARE[MOVES[step]],
        gb_per_s=gb_per_s,
        **({} if is_copy else limit),
    )


OutputLayerLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def measure_output_layer(
    case: Case, *, hidden: int, chunk_tokens: int, repeats: int = 3
) -> list[Row]:
    """Time forward and backward of the output layer and the loss on one rank, a row a way."""
    device = torch.device(find_device().type)
    inputs = _inputs(case, hidden, device)
    passes = {
        name: partial(_output_layer_pass, loss, inputs)
        for name, loss in _output_layer_losses(chunk_tokens).items()
    }
    clock = timing.clock_for(device)
    with progress("output layer", (repeats + 1) * len(passes), "passes") as advance:
        peaks = {}
        for name, one_pass in passes.items():  # also warms up
            peaks[name] = timing.peak_mib(lambda run=one_pass: list(run()), device)  # type: ignore[misc]
            advance(1)
        times = timing.time_in_turn(passes, clock, repeats, advance=advance)
    return [
        row_of_case(
            case,
            kind="linear",
            threads=torch.get_num_threads(),
            clock=clock.name,
            provider=name,
            by="ours",
            computes=f"output layer, hidden size {hidden}, and loss",
            step="both",
            repeats=repeats,
            peak_mib=peaks[name],
            **timing.spread(_firsts(times[name])).columns(),
        )
        for name in passes
    ]


def _output_layer_losses(chunk_tokens: int) -> dict[str, OutputLayerLoss]:
    config = InfoEntropyConfig(chunk_tokens=chunk_tokens)

    def unfused(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return infoentropy_loss(hidden @ weight.t(), target, config, inplace_backward=True)

    def fused_statistics(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        got = linear_vocab_parallel_statistics(hidden, weight, target, chunk_tokens=chunk_tokens)
        weights = 1 + got.entropy.detach()
        return (weights * got.cross_entropy).sum() / weights.sum()

    def fused_loss(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return linear_infoentropy_loss(hidden, weight, target, config)

    def partly_masked(
        percent: int, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        place = torch.arange(len(target), device=target.device)
        kept = place % 10 < percent // 10
        return fused_loss(hidden, weight, target.masked_fill(~kept, -100))

    return {
        "unfused, gradient over the logits": unfused,
        f"fused statistics, chunks of {chunk_tokens}": fused_statistics,
        f"fused loss, chunks of {chunk_tokens}": fused_loss,
        "the same, 50 % of the tokens valid": partial(partly_masked, 50),
        "the same, 10 % of the tokens valid": partial(partly_masked, 10),
    }


def _inputs(case: Case, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(hidden states, weight, target); logits have a standard deviation of 3."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    states = torch.randn(case.tokens, hidden, device=device, generator=generator).to(dtype)
    weight = torch.randn(case.vocabulary, hidden, device=device, generator=generator)
    weight = weight.mul_(3 / hidden**0.5).to(dtype)
    target = torch.randint(case.vocabulary, (case.tokens,), device=device, generator=generator)
    return states, weight, target


def _output_layer_pass(loss: OutputLayerLoss, inputs: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Forward and backward; gradients are dropped with the leaves."""
    states, weight, target = inputs
    leaves = states.detach().requires_grad_(), weight.detach().requires_grad_()
    yield
    loss(*leaves, target).backward()  # type: ignore[no-untyped-call]
    yield
