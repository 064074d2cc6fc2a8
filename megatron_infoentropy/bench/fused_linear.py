"""The output layer and the loss, fused against unfused: time and memory of forward and backward.

Memory is beside the hidden states and the weight. Expected, with L the logits of all tokens, C
those of a chunk, dX and dW gradients in the inputs' dtype, S the weight's as it is summed in fp32:

    unfused, gradient over the logits    L + dX + dW
    fused                                C + dX + S, or where that is more dX + S + dW (16-bit dW)

and 2 C where ranks gather the statistics of one chunk under the logits of the next.
"""

from collections.abc import Callable
from functools import partial

import torch

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.clock import clock_for, peak_mib
from megatron_infoentropy.bench.passes import spread
from megatron_infoentropy.bench.results import Row, row_of_case
from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)
from megatron_infoentropy.progress import progress
from megatron_infoentropy.runtime.device import find_device

Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def compare_fused_linear(
    *,
    tokens: int = 4096,
    hidden: int = 1024,
    vocabulary: int = 128256,
    dtype: str = "float32",
    chunk_tokens: int = 1024,
    repeats: int = 3,
) -> list[Row]:
    """One row a provider: ms and peak MiB of forward and backward, one rank.

    Raises:
        ValueError: a dtype or a shape that cannot be.
    """
    case = Case(tokens, vocabulary, dtype)  # type: ignore[arg-type]  # refuses others
    device = torch.device(find_device().type)
    inputs = _inputs(case, hidden, device)
    providers = _providers(chunk_tokens)
    times: dict[str, list[float]] = {name: [] for name in providers}
    clock = clock_for(device)
    with progress("fused linear", (repeats + 1) * len(providers), "passes") as advance:
        peaks = {}
        for name, objective in providers.items():  # also warms up
            peaks[name] = peak_mib(partial(_pass, objective, inputs), device)
            advance(1)
        for _ in range(repeats):
            for name, objective in providers.items():
                clock.start()
                _pass(objective, inputs)
                clock.mark()
                times[name] += clock.read()
                advance(1)
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
            **dict(zip(("median_ms", "p20_ms", "p80_ms"), spread(times[name]), strict=True)),
        )
        for name in providers
    ]


def _providers(chunk_tokens: int) -> dict[str, Objective]:
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
        return linear_infoentropy_loss(hidden, weight, target, None, config)

    return {
        "unfused, gradient over the logits": unfused,
        f"fused statistics, chunks of {chunk_tokens}": fused_statistics,
        f"fused loss, chunks of {chunk_tokens}": fused_loss,
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


def _pass(objective: Objective, inputs: tuple[torch.Tensor, ...]) -> None:
    """Forward and backward; gradients are dropped with the leaves."""
    states, weight, target = inputs
    leaves = states.detach().requires_grad_(), weight.detach().requires_grad_()
    objective(*leaves, target).backward()  # type: ignore[no-untyped-call]
