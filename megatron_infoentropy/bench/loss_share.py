"""The loss's share of a training step, by PyTorch's profiler.

In forward and backward the loss lies between two moments: the output layer has given the logits;
their gradient is complete. Its share is the time of the operations that started between the two,
over that of all operations of the step: of kernels on a GPU, of their own on a CPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_infoentropy.runtime.device import find_device

LOGITS, GRADIENT = "logits are there", "gradient of logits is there"


def share_of_loss(step: Callable[[], None], output_layer: Any, *, steps: int) -> float:
    """Between 0 and 1, over `steps` calls of `step`, each with one call of `output_layer`.

    Raises:
        ValueError: a step did not pass the output layer and its gradient once each.
    """
    on_gpu = find_device().type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs its own start and stop otherwise
    with _moments_recorded(output_layer), profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
    events = recorded.events()
    starts = [_moments(events, name) for name in (LOGITS, GRADIENT)]
    if [len(found) for found in starts] != [steps, steps]:
        raise ValueError(
            f"expected {steps} steps to pass the output layer and the gradient of its logits once "
            f"each, got {len(starts[0])} and {len(starts[1])} passages"
        )
    spans = list(zip(*starts, strict=True))
    of_loss = of_all = 0.0
    for event in events:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        of_all += spent
        if any(begin <= event.time_range.start < end for begin, end in spans):
            of_loss += spent
    return of_loss / of_all


def _moments(events: Any, name: str) -> list[float]:
    return sorted(event.time_range.start for event in events if event.name == name)


@contextmanager
def _moments_recorded(output_layer: Any) -> Iterator[None]:
    def gradient_is_there(gradient: torch.Tensor) -> None:
        with record_function(GRADIENT):
            pass

    def logits_are_there(layer: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        output[0].register_hook(gradient_is_there)  # type: ignore[no-untyped-call]
        with record_function(LOGITS):
            pass

    handle = output_layer.register_forward_hook(logits_are_there)
    try:
        yield
    finally:
        handle.remove()
