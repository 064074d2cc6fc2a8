"""Rows of the losses: forward, backward and both of every provider, and how often it takes ours.

A fast wrong number is worth nothing, so every provider's loss, and its gradient at a few rows, are
compared with float64 from the very same logits before it is timed. That is done in its untimed
passes, which also compile and warm it up, weigh its memory and count its collectives at PyTorch's
dispatcher. A provider that fails there is listed with the reason instead of timed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_infoentropy.bench.clock import peak_mib
from megatron_infoentropy.bench.passes import Experiment, ratio, spread, time_in_turn
from megatron_infoentropy.bench.providers import (
    LABEL_SMOOTHING,
    SOFTCAP,
    Computes,
    Loss,
    Provider,
    Unavailable,
    best_backend,
    failure,
    in_place,
    ours,
    peers,
)
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.progress import Advance, progress

CHUNK_BYTES = 1 << 27  # of one float64 temporary
PROBED_ROWS = 16
LOSS_TOLERANCE = 0.02  # of the loss: bf16 losses and the published clamp pass, mistakes do not
GRADIENT_TOLERANCE = 0.05  # of the largest entry


@dataclass(frozen=True)
class Errors:
    """Errors of a provider's loss (nats) and of its gradient, relative to the largest entry."""

    loss: float
    gradient: float
    are_too_large: bool


class Truth:
    """Losses and probed gradient rows of every quantity, from this rank's shard of the logits."""

    def __init__(self, logits: torch.Tensor, target: torch.Tensor, group: dist.ProcessGroup):
        self._logits, self._target, self._group = logits, target, group
        probed = torch.linspace(0, len(target) - 1, PROBED_ROWS, dtype=torch.float64)
        self._rows = probed.long().to(target.device)
        self._known: dict[Computes, tuple[float, torch.Tensor]] = {}

    def errors(self, computes: Computes, loss: torch.Tensor, gradient: torch.Tensor) -> Errors:
        """Return the errors of a loss and of this rank's gradient [tokens, columns]."""
        if computes not in self._known:
            self._known[computes] = self._loss_and_rows(computes)
        true_loss, true_rows = self._known[computes]
        start = self._group.rank() * gradient.shape[-1]
        true_rows = true_rows[:, start : start + gradient.shape[-1]]
        difference = (gradient[self._rows].double() - true_rows).abs().max()
        loss_error = abs(float(loss) - true_loss)
        gradient_error = float(difference / true_rows.abs().max())
        right = loss_error <= LOSS_TOLERANCE * abs(true_loss)
        right = right and gradient_error <= GRADIENT_TOLERANCE  # also false where NaN
        return Errors(loss_error, gradient_error, not right)

    def _loss_and_rows(self, computes: Computes) -> tuple[float, torch.Tensor]:
        """(loss, gradient [PROBED_ROWS, vocabulary]); all tokens' weights normalise both."""
        total, weights = 0.0, 0.0
        for rows in self._chunks():
            ce, weight = _per_token(self._whole(rows), self._target[rows], computes)
            total, weights = total + float((weight * ce).sum()), weights + float(weight.sum())
        leaf = self._whole(self._rows).requires_grad_()
        ce, weight = _per_token(leaf, self._target[self._rows], computes)
        (gradient,) = torch.autograd.grad((weight.detach() * ce).sum() / weights, leaf)
        return total / weights, gradient

    def _chunks(self) -> list[torch.Tensor]:
        row_bytes = 8 * self._logits.shape[-1] * self._group.size()
        count = len(self._target)
        every = torch.arange(count, device=self._target.device)
        return list(torch.split(every, max(1, CHUNK_BYTES // row_bytes)))

    def _whole(self, rows: torch.Tensor) -> torch.Tensor:
        """Whole rows in float64, the shards of all ranks side by side."""
        mine = self._logits[rows]
        if self._group.size() == 1:
            return mine.double()
        shards = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather(shards, mine, group=self._group)
        return torch.cat(shards, -1).double()


def _per_token(
    z: torch.Tensor, target: torch.Tensor, computes: Computes
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropy, weight) of whole rows."""
    if computes == "softcap":
        z = SOFTCAP * (z / SOFTCAP).tanh()
    log_p = z.log_softmax(-1)
    ce = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if computes == "label smoothing":
        ce = (1 - LABEL_SMOOTHING) * ce - LABEL_SMOOTHING * log_p.mean(-1)
    if computes == "cross entropy":
        return ce, torch.ones_like(ce)
    return ce, 1 - (log_p.exp() * log_p).sum(-1)


# operator -> position of what this rank contributes; each counted once however it is spelled
_CONTRIBUTED = {
    "c10d::allreduce_": 0,
    "c10d::allreduce_coalesced_": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "c10d::reduce_scatter_": 1,
    "c10d::_reduce_scatter_base_": 1,
    "c10d::alltoall_base_": 1,
    "c10d::broadcast_": 0,
    "_c10d_functional::all_reduce": 0,
    "_c10d_functional::all_reduce_": 0,
    "_c10d_functional::all_gather_into_tensor": 0,
    "_c10d_functional::all_gather_into_tensor_out": 0,
    "_c10d_functional::reduce_scatter_tensor": 0,
}


class Traffic(NamedTuple):
    """Collectives, and the bytes that this rank contributed to them."""

    collectives: int
    bytes: int


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every collective called inside the block, also by backward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic(0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        position = _CONTRIBUTED.get(func._schema.name)
        if position is not None:
            count, size = self.traffic
            self.traffic = Traffic(count + 1, size + _bytes(args[position]))
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


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


# step -> (logits read or written, in words): what the problem needs, whoever solves it
MOVES = {
    "forward": (1, "1 read"),
    "backward": (2, "1 read, 1 write"),
    "both": (3, "2 reads, 1 write"),
}
GRADIENT_IN_FORWARD = {"forward": MOVES["both"], "backward": (0, ""), "both": MOVES["both"]}

Times = dict[str, dict[str, list[float]]]  # {provider: {step: [repeat] ms}}


def measure_losses(experiment: Experiment) -> list[Row]:
    """Rows of every provider: three of one that runs, one with a reason of one that does not."""
    every = ours(experiment.setting) + peers()
    turns = (experiment.repeats + 1) * len(every)
    with _progress_of_first_rank(experiment, turns) as advance:
        rehearsed, refused = _rehearse_all(every, experiment, advance)
        passes = {one.provider.name: partial(_one_pass, one.loss, experiment) for one in rehearsed}
        measured = time_in_turn(passes, experiment, advance)
    times = {name: _by_step(values) for name, values in measured.items()}
    rows = [row for one in rehearsed for row in _rows(one, times, experiment)]
    return rows + [_unavailable(provider, why, experiment) for provider, why in refused]


@contextmanager
def _progress_of_first_rank(experiment: Experiment, turns: int) -> Iterator[Advance]:
    if experiment.setting.group.rank() > 0:
        yield lambda work: None
        return
    with progress(str(experiment.setting.case), turns, "passes") as advance:
        yield advance


def _rehearse_all(
    every: list[Provider], experiment: Experiment, advance: Advance
) -> tuple[list[Rehearsed], list[tuple[Provider, str]]]:
    truth = Truth(experiment.logits, experiment.target, experiment.setting.group)
    rehearsed, refused = [], []
    for provider in every:
        try:
            rehearsed.append(rehearse(provider, experiment, truth))
        except Unavailable as error:
            refused.append((provider, str(error)))
            advance(experiment.repeats)  # the turns it will not take
        advance(1)
    return rehearsed, refused


def _one_pass(loss: Loss, experiment: Experiment) -> Iterator[None]:
    leaf = experiment.logits.clone().requires_grad_()  # some providers overwrite what they get
    yield
    value = loss(leaf, experiment.target)
    yield
    value.backward()  # type: ignore[no-untyped-call]
    yield


def _by_step(values: list[list[float]]) -> dict[str, list[float]]:
    forward, backward = ([repeat[step] for repeat in values] for step in (0, 1))
    return {"forward": forward, "backward": backward, "both": [sum(repeat) for repeat in values]}


def _rows(one: Rehearsed, times: Times, experiment: Experiment) -> Iterator[Row]:
    provider = one.provider
    moves = GRADIENT_IN_FORWARD if provider.gradient_in_forward else MOVES
    for step, values in times[provider.name].items():
        taken, (moved, words) = spread(values), moves[step]
        yield experiment.row(
            kind="loss",
            step=step,
            **_names(provider),
            repeats=len(values),
            median_ms=taken.median,
            p20_ms=taken.p20,
            p80_ms=taken.p80,
            **_ratios(values, step, times, experiment),
            bytes=moved * experiment.logits_bytes or None,
            bytes_are=words,
            gb_per_s=moved * experiment.logits_bytes / taken.median / 1e6 or None,
            **(_whole_pass(one) if step == "both" else {}),
            **_traffic(one, step),
        )


def _names(provider: Provider) -> dict[str, str]:
    by = "ours" if provider.is_ours else "peer"
    return {"provider": provider.name, "by": by, "computes": provider.computes}


def _ratios(
    values: list[float], step: str, times: Times, experiment: Experiment
) -> dict[str, float]:
    """How many times as long as the best of ours, into new memory and over the logits."""
    columns: dict[str, float] = {}
    ours_best = best_backend(experiment.setting)
    for column, name in (("times_ours", ours_best), ("times_in_place", in_place(ours_best))):
        if name in times:
            times_as_long = ratio(values, times[name][step])
            columns[column] = times_as_long.median
            columns[f"{column}_p20"] = times_as_long.p20
            columns[f"{column}_p80"] = times_as_long.p80
    return columns


def _whole_pass(one: Rehearsed) -> dict[str, float]:
    return {
        "peak_mib": one.peak_mib,
        "loss_error": one.errors.loss,
        "gradient_error": one.errors.gradient,
    }


def _traffic(one: Rehearsed, step: str) -> dict[str, int]:
    if one.traffic is None:
        return {}
    forward, backward = one.traffic
    both = Traffic(forward.collectives + backward.collectives, forward.bytes + backward.bytes)
    counted = {"forward": forward, "backward": backward, "both": both}[step]
    return {"collectives": counted.collectives, "collective_bytes": counted.bytes}


def _unavailable(provider: Provider, reason: str, experiment: Experiment) -> Row:
    return experiment.row(kind="unavailable", step="", reason=reason, **_names(provider))
