"""A provider's untimed passes: they compile and warm it up, check its numbers, weigh its memory and
count its collectives. A provider that fails here is listed with the reason instead of timed."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_infoentropy.bench.collectives import CountCollectives, Traffic
from megatron_infoentropy.bench.experiment import Experiment
from megatron_infoentropy.bench.memory import peak_mib
from megatron_infoentropy.bench.providers import Loss, Provider, Unavailable, failure
from megatron_infoentropy.bench.truth import Errors, Truth


@dataclass(frozen=True)
class Rehearsed:
    """A provider that can be timed, and what its untimed passes showed."""

    provider: Provider
    loss: Loss
    errors: Errors
    peak_mib: float
    traffic: tuple[Traffic, Traffic] | None  # forward, backward; None on one rank


def rehearse(provider: Provider, experiment: Experiment, truth: Truth) -> Rehearsed:
    """Run a provider untimed.

    Raises:
        Unavailable: it cannot run here, or not on every rank, or computes another number.
    """
    reason, rehearsed, setting = "", None, experiment.setting
    try:
        rehearsed = _rehearse(provider, provider.make(setting), experiment, truth)
    except Unavailable as error:
        reason = str(error)
    except Exception as error:  # peers fail in ways of their own; the table says how
        reason = failure(error)
    failed = torch.tensor(rehearsed is None, device=setting.device, dtype=torch.int32)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=setting.group)
    if rehearsed is None or failed:
        raise Unavailable(reason or "it failed on another rank")
    return rehearsed


def _rehearse(provider: Provider, loss: Loss, experiment: Experiment, truth: Truth) -> Rehearsed:
    target = experiment.target
    leaf = _leaf(experiment)
    value = loss(leaf, target)
    _backward(value)
    assert leaf.grad is not None
    errors = truth.errors(provider.computes, value.detach(), leaf.grad)
    if errors.are_too_large:
        raise Unavailable(
            f"it computes another number: the loss is {errors.loss:.2g} nats off, the gradient "
            f"{errors.gradient:.2g} of its largest entry"
        )
    del value
    leaf = _leaf(experiment)
    peak = peak_mib(lambda: _backward(loss(leaf, target)), leaf.device)
    traffic = _count(loss, experiment) if experiment.setting.case.tensor_parallel > 1 else None
    return Rehearsed(provider, loss, errors, peak, traffic)


def _count(loss: Loss, experiment: Experiment) -> tuple[Traffic, Traffic]:
    leaf = _leaf(experiment)
    with CountCollectives() as forward:
        value = loss(leaf, experiment.target)
    with CountCollectives() as backward:
        _backward(value)
    return forward.traffic, backward.traffic


def _leaf(experiment: Experiment) -> torch.Tensor:
    return experiment.logits.clone().requires_grad_()  # some providers overwrite what they get


def _backward(value: torch.Tensor) -> None:
    value.backward()  # type: ignore[no-untyped-call]
