"""Time and memory of one forward and backward pass, providers interleaved."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_infoentropy.bench.providers import Provider
from megatron_infoentropy.progress import progress


@dataclass(frozen=True)
class Measurement:
    """Of one provider; times over its repeats, memory beside the logits."""

    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mib: float  # largest sum of live allocations, the gradient included


def measure(
    providers: dict[str, Provider],
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    repeats: int,
) -> list[Measurement]:
    """Forward and backward of every provider, `repeats` times in turn, so that a busy moment of the
    machine falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    with progress("bench", (repeats + 1) * len(providers), "passes") as advance:
        for repeat in range(repeats + 1):
            for name, provider in providers.items():
                elapsed = _pass_ms(provider, logits, target)
                if repeat > 0:  # the first pass warms caches and allocators
                    times[name].append(elapsed)
                advance(1)
    return [
        Measurement(
            name,
            statistics.median(times[name]),
            _quantile(times[name], 0.2),
            _quantile(times[name], 0.8),
            _peak_mib(provider, logits, target),
        )
        for name, provider in providers.items()
    ]


def _pass_ms(provider: Provider, logits: torch.Tensor, target: torch.Tensor) -> float:
    leaf = logits.clone().requires_grad_()  # some providers overwrite what they are given
    _synchronize(leaf)
    start = time.perf_counter()
    loss = provider(leaf, target)
    loss.backward()  # type: ignore[no-untyped-call]
    _synchronize(leaf)
    return (time.perf_counter() - start) * 1e3


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _peak_mib(provider: Provider, logits: torch.Tensor, target: torch.Tensor) -> float:
    leaf = logits.clone().requires_grad_()
    if logits.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider(leaf, target).backward()  # type: ignore[no-untyped-call]
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        provider(leaf, target).backward()  # type: ignore[no-untyped-call]
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]
