"""Rows of the losses: forward, backward and both of every provider, and how often it takes ours.

A fast wrong number is worth nothing, so every provider's loss, and its gradient at a few rows, are
compared with float64 from the very same logits before it is timed. That is done in its untimed
passes, which also compile and warm it up, weigh its memory and count its collectives at PyTorch's
dispatcher. A provider that fails there is listed with the reason instead of timed.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_infoentropy.bench import providers
from megatron_infoentropy.bench.providers import Computes, Loss, Provider, Unavailable
from megatron_infoentropy.bench.results import Row
from megatron_infoentropy.bench.timing import Experiment, peak_mib, ratio, spread, time_in_turn
from megatron_infoentropy.progress import progress

CHUNK_BYTES = 1 << 27  # of one float64 temporary
PROBED_ROWS = 16
LOSS_TOLERANCE = 0.02  # of the loss: bf16 losses and the published clamp pass, mistakes do not
GRADIENT_TOLERANCE = 0.05  # of the largest entry


class Errors(NamedTuple):
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
        z = providers.SOFTCAP * (z / providers.SOFTCAP).tanh()
    log_p = z.log_softmax(-1)
    ce = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if computes == "label smoothing":
        ce = (1 - providers.LABEL_SMOOTHING) * ce - providers.LABEL_SMOOTHING * log_p.mean(-1)
    if computes == "cross entropy":
        return ce, torch.ones_like(ce)
    return ce, 1 - (log_p.exp() * log_p).sum(-1)


# operator -> position of what this rank contributes; each counted once however it is spelled
_CONTRIBUTED = {
    **dict.fromkeys(("c10d::allreduce_", "c10d::allreduce_coalesced_", "c10d::broadcast_"), 0),
    **dict.fromkeys(("c10d::allgather_", "c10d::_allgather_base_", "c10d::alltoall_base_"), 1),
    **dict.fromkeys(("c10d::reduce_scatter_", "c10d::_reduce_scatter_base_"), 1),
    "_c10d_functional::all_reduce": 0,
    "_c10d_functional::all_reduce_": 0,
    "_c10d_functional::all_gather_into_tensor": 0,
    "_c10d_functional::all_gather_into_tensor_out": 0,
    "_c10d_functional::reduce_scatter_tensor": 0,
}


class Traffic(NamedTuple):
    """Collectives, and the bytes that this rank contributed to them."""

    collectives: int = 0
    bytes: int = 0

    def plus(self, other: "Traffic") -> "Traffic":
        return Traffic(self.collectives + other.collectives, self.bytes + other.bytes)


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every collective called inside the block, also by backward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        position = _CONTRIBUTED.get(func._schema.name)
        if position is not None:
            self.traffic = self.traffic.plus(Traffic(1, _bytes(args[position])))
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_bytes(tensor) for tensor in tensors)


class Rehearsed(NamedTuple):
    """A provider that can be timed, and what its untimed passes showed."""

    provider: Provider
    loss: Loss
    columns: dict[str, float]  # memory and errors of the whole pass
    traffic: dict[str, Traffic]  # by step; nothing on one rank


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
        reason = providers.failure(error)
    failed = torch.tensor(rehearsed is None, device=setting.device, dtype=torch.int32)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=setting.group)
    if rehearsed is None or failed:
        raise Unavailable(reason or "it failed on another rank")
    return rehearsed


def _rehearse(provider: Provider, loss: Loss, experiment: Experiment, truth: Truth) -> Rehearsed:
    leaf = _leaf(experiment)
    value = loss(leaf, experiment.target)
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
    peak = peak_mib(lambda: _backward(loss(leaf, experiment.target)), leaf.device)
    columns = {"peak_mib": peak, "loss_error": errors.loss, "gradient_error": errors.gradient}
    return Rehearsed(provider, loss, columns, _traffic(loss, experiment))


def _traffic(loss: Loss, experiment: Experiment) -> dict[str, Traffic]:
    if experiment.ranks is None:
        return {}
    leaf = _leaf(experiment)
    with CountCollectives() as forward:
        value = loss(leaf, experiment.target)
    with CountCollectives() as backward:
        _backward(value)
    both = forward.traffic.plus(backward.traffic)
    return {"forward": forward.traffic, "backward": backward.traffic, "both": both}


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
    setting, repeats = experiment.setting, experiment.repeats
    every = providers.ours(setting) + providers.peers()
    truth = Truth(experiment.logits, experiment.target, setting.group)
    rehearsed, refused = [], []
    shown = progress(str(setting.case), (repeats + 1) * len(every), "passes")
    with shown if setting.group.rank() == 0 else nullcontext(lambda work: None) as advance:
        for provider in every:
            try:
                rehearsed.append(rehearse(provider, experiment, truth))
            except Unavailable as error:
                refused.append(_unavailable(provider, str(error), experiment))
                advance(repeats)  # the turns it will not take
            advance(1)
        passes = {one.provider.name: partial(_one_pass, one.loss, experiment) for one in rehearsed}
        measured = time_in_turn(passes, experiment.clock, repeats, experiment.ranks, advance)
    times = {name: _by_step(values) for name, values in measured.items()}
    return [row for one in rehearsed for row in _rows(one, times, experiment)] + refused


def _one_pass(loss: Loss, experiment: Experiment) -> Iterator[None]:
    leaf = _leaf(experiment)
    yield
    value = loss(leaf, experiment.target)
    yield
    _backward(value)
    yield


def _by_step(values: list[list[float]]) -> dict[str, list[float]]:
    forward, backward = ([repeat[step] for repeat in values] for step in (0, 1))
    return {"forward": forward, "backward": backward, "both": [sum(repeat) for repeat in values]}


def _rows(one: Rehearsed, times: Times, experiment: Experiment) -> Iterator[Row]:
    provider = one.provider
    moves = GRADIENT_IN_FORWARD if provider.gradient_in_forward else MOVES
    for step, values in times[provider.name].items():
        taken, (moved, words) = spread(values), moves[step]
        size = moved * experiment.logits.nbytes
        traffic = one.traffic.get(step)
        yield experiment.row(
            kind="loss",
            step=step,
            **_names(provider),
            repeats=len(values),
            **taken.columns(),
            **_ratios(values, step, times, experiment),
            bytes=size or None,
            bytes_are=words,
            gb_per_s=size / taken.median / 1e6 or None,
            **(one.columns if step == "both" else {}),
            collectives=traffic.collectives if traffic else None,
            collective_bytes=traffic.bytes if traffic else None,
        )


def _names(provider: Provider) -> dict[str, str]:
    by = "ours" if provider.is_ours else "peer"
    return {"provider": provider.name, "by": by, "computes": provider.computes}


def _ratios(
    values: list[float], step: str, times: Times, experiment: Experiment
) -> dict[str, float]:
    """How many times as long as the best of ours, into new memory and over the logits."""
    best = providers.best_backend(experiment.setting)
    columns: dict[str, float] = {}
    for column, name in (("times_ours", best), ("times_in_place", providers.in_place(best))):
        if name in times:
            columns |= ratio(values, times[name][step]).columns(column)
    return columns


def _unavailable(provider: Provider, reason: str, experiment: Experiment) -> Row:
    return experiment.row(kind="unavailable", step="", reason=reason, **_names(provider))
