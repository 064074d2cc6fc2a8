"""Rows of the losses: forward, backward and both of every provider, and how often it takes ours;
of the kernels alone, beside a copy of the same logits by PyTorch in the same turns; and of the
output layer with the loss, fused and unfused.

A fast wrong number is worth nothing, so every provider's loss, and its gradient at a few rows, are
compared with float64 from the very same logits before it is timed. That is done in its untimed
passes, which also compile and warm it up, weigh its memory and count its collectives at PyTorch's
dispatcher. A provider that fails there is listed with the reason instead of timed.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_infoentropy import InfoEntropyConfig, infoentropy_loss
from megatron_infoentropy.bench import providers
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.providers import Computes, Loss, Provider, Unavailable, failure
from megatron_infoentropy.bench.results import Row, row_of_case
from megatron_infoentropy.bench.timing import (
    LOGITS_SCALE,
    Clock,
    Experiment,
    Pass,
    columns_of,
    peak_mib,
    ratio,
    time_in_turn,
)
from megatron_infoentropy.kernels import dispatch
from megatron_infoentropy.kernels.contract import MAX, PLAIN, SCALE, SHIFT, Kernels, Shard
from megatron_infoentropy.loss.linear import (
    linear_infoentropy_loss,
    linear_vocab_parallel_statistics,
)
from megatron_infoentropy.progress import progress

CHUNK_BYTES = 1 << 27  # of one float64 temporary
PROBED_ROWS = 16
LOSS_TOLERANCE = 0.02  # of the loss: bf16 losses and the published clamp pass, mistakes do not
GRADIENT_TOLERANCE = 0.05  # of the largest entry


class Truth:
    """Losses and probed gradient rows of every quantity, from this rank's shard of the logits."""

    def __init__(self, logits: torch.Tensor, target: torch.Tensor, group: dist.ProcessGroup):
        self._logits, self._target, self._group = logits, target, group
        probed = torch.linspace(0, len(target) - 1, PROBED_ROWS, dtype=torch.float64)
        self._rows = probed.long().to(target.device)
        self._known: dict[Computes, tuple[float, torch.Tensor]] = {}

    def errors(
        self, computes: Computes, loss: torch.Tensor, gradient: torch.Tensor
    ) -> dict[str, float]:
        """Return the errors, as columns, of a loss and of this rank's gradient [tokens, columns].

        Raises:
            Unavailable: they are too large for the number that it is to be.
        """
        if computes not in self._known:
            self._known[computes] = self._loss_and_rows(computes)
        true_loss, true_rows = self._known[computes]
        start = self._group.rank() * gradient.shape[-1]
        true_rows = true_rows[:, start : start + gradient.shape[-1]]
        difference = (gradient[self._rows].double() - true_rows).abs().max()
        nats = abs(float(loss) - true_loss)  # NaN where the loss is, which no bound holds for
        share = float(difference / true_rows.abs().max())
        if not (nats <= LOSS_TOLERANCE * abs(true_loss) and share <= GRADIENT_TOLERANCE):
            raise Unavailable(
                f"it computes another number: the loss is {nats:.2g} nats off, the gradient "
                f"{share:.2g} of its largest entry"
            )
        return {"loss_error": nats, "gradient_error": share}

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


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every collective called inside the block, also by backward passes, and the bytes that
    this rank contributes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        position = _CONTRIBUTED.get(func._schema.name)
        if position is not None:
            self.collectives += 1
            self.bytes += _bytes(args[position])
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_bytes(tensor) for tensor in tensors)


class Rehearsed(NamedTuple):
    """A provider that can be timed, and what its untimed passes showed."""

    provider: Provider
    loss: Loss
    columns: dict[str, dict[str, float]]  # by step: memory and errors, and collectives


def rehearse(provider: Provider, experiment: Experiment, truth: Truth) -> Rehearsed:
    """Run a provider untimed.

    Raises:
        Unavailable: it cannot run here, or not on every rank, or computes another number.
    """
    reason, rehearsed = "", None
    try:
        rehearsed = _rehearse(provider, provider.make(experiment), experiment, truth)
    except Unavailable as error:
        reason = str(error)
    except Exception as error:  # peers fail in ways of their own; the table says how
        reason = failure(error)
    failed = torch.tensor(rehearsed is None, device=experiment.device, dtype=torch.int32)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=experiment.group)
    if rehearsed is None or failed:
        raise Unavailable(reason or "it failed on another rank")
    return rehearsed


def _rehearse(provider: Provider, loss: Loss, experiment: Experiment, truth: Truth) -> Rehearsed:
    leaf = _leaf(experiment)
    value = loss(leaf, experiment.target)
    _backward(value)
    assert leaf.grad is not None
    errors = truth.errors(provider.computes, value.detach(), leaf.grad)
    del value
    leaf = _leaf(experiment)
    peak = peak_mib(lambda: _backward(loss(leaf, experiment.target)), leaf.device)
    traffic = {} if experiment.ranks is None else _traffic(loss, experiment)
    whole = {"peak_mib": peak, **errors, **traffic.get("both", {})}
    return Rehearsed(provider, loss, {**traffic, "both": whole})


def _traffic(loss: Loss, experiment: Experiment) -> dict[str, dict[str, float]]:
    with CountCollectives() as both:
        with CountCollectives() as forward:
            value = loss(_leaf(experiment), experiment.target)
        with CountCollectives() as backward:
            _backward(value)
    counted = {"forward": forward, "backward": backward, "both": both}
    return {
        step: {"collectives": seen.collectives, "collective_bytes": seen.bytes}
        for step, seen in counted.items()
    }


def _leaf(experiment: Experiment) -> torch.Tensor:
    return experiment.logits.clone().requires_grad_()  # some providers overwrite what they get


def _backward(value: torch.Tensor) -> None:
    value.backward()  # type: ignore[no-untyped-call]


# step -> logits read or written: what the problem needs, whoever solves it
MOVES = {"forward": 1, "backward": 2, "both": 3}
GRADIENT_IN_FORWARD = {"forward": 3, "backward": 0, "both": 3}

Times = dict[str, dict[str, list[float]]]  # {provider: {step: [repeat] ms}}


def measure_losses(experiment: Experiment) -> list[Row]:
    """Rows of every provider: three of one that runs, one with a reason of one that does not."""
    repeats, group = experiment.repeats, experiment.group
    every = providers.ours(experiment) + providers.peers()
    truth = Truth(experiment.logits, experiment.target, group)
    rehearsed, refused = [], []
    shown = progress(str(experiment.case), (repeats + 1) * len(every), "passes")
    with shown if group.rank() == 0 else nullcontext(lambda work: None) as advance:
        for provider in every:
            try:
                rehearsed.append(rehearse(provider, experiment, truth))
            except Unavailable as error:
                refused.append(
                    experiment.row(
                        kind="unavailable", step="", reason=str(error), **_names(provider)
                    )
                )
                advance(repeats)  # the turns it will not take
            advance(1)
        passes = {one.provider.name: partial(_one_pass, one.loss, experiment) for one in rehearsed}
        measured = time_in_turn(passes, experiment.clock, repeats, experiment.ranks, advance)
    times = {name: _by_step(*steps) for name, steps in measured.items()}
    return [row for one in rehearsed for row in _rows(one, times, experiment)] + refused


def _one_pass(loss: Loss, experiment: Experiment) -> Iterator[None]:
    leaf = _leaf(experiment)
    yield
    value = loss(leaf, experiment.target)
    yield
    _backward(value)
    yield


def _by_step(forward: list[float], backward: list[float]) -> dict[str, list[float]]:
    both = [sum(pair) for pair in zip(forward, backward, strict=True)]
    return {"forward": forward, "backward": backward, "both": both}


def _rows(one: Rehearsed, times: Times, experiment: Experiment) -> Iterator[Row]:
    provider = one.provider
    moves = GRADIENT_IN_FORWARD if provider.gradient_in_forward else MOVES
    best = times.get(providers.in_place(providers.best_backend(experiment)))
    for step, values in times[provider.name].items():
        yield experiment.row(
            kind="loss",
            step=step,
            **_names(provider),
            **columns_of(values, moves[step] * experiment.logits.nbytes),
            **(ratio(values, best[step]).columns("times_in_place") if best else {}),
            **one.columns.get(step, {}),
        )


def _names(provider: Provider) -> dict[str, str]:
    by = "ours" if provider.is_ours else "peer"
    return {"provider": provider.name, "by": by, "computes": provider.computes}


# step -> logits read or written
KERNEL_MOVES = {"copy": 2, "statistics": 1, "gradient": 2, "gradient in place": 2}


def measure_kernels(experiment: Experiment) -> list[Row]:
    """Time a copy of the logits, and every step of every backend that runs here."""
    logits, target = experiment.logits, experiment.target
    passes: dict[tuple[str, str], Pass] = {("torch", "copy"): partial(_copy, logits)}
    for name in (name for name, reason in providers.backends(experiment).items() if reason is None):
        for step in ("statistics", "gradient", "gradient in place"):
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
    times = time_in_turn(passes, experiment.clock, experiment.repeats)
    columns = {
        (name, step): columns_of(values, KERNEL_MOVES[step] * logits.nbytes)
        for (name, step), (values,) in times.items()
    }
    copied = columns.pop(("torch", "copy"))
    names = {"provider": "torch", "by": "peer", "computes": "", "step": "copy"}
    timed = [experiment.row(kind="limit", **names, **copied)]
    for (name, step), measured in columns.items():
        names = {"provider": name, "by": "ours", "computes": "", "step": step}
        share = 100 * measured["gb_per_s"] / copied["gb_per_s"]
        limit = {"limit": "copy", "percent_of_limit": share}
        timed.append(experiment.row(kind="kernel", **names, **measured, **limit))
    return timed + rows


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


LinearLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def linear_losses(chunk_tokens: int) -> dict[str, LinearLoss]:
    """Return the ways from hidden states, weight and target to the loss, and the last of them where
    a part of the tokens is valid alone.
    """
    config = InfoEntropyConfig(chunk_tokens=chunk_tokens)

    def unfused(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return infoentropy_loss(hidden @ weight.t(), target, config, inplace_backward=True)

    def statistics(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        of = linear_vocab_parallel_statistics(hidden, weight, target, chunk_tokens=chunk_tokens)
        weights = 1 + of.entropy.detach()
        return (weights * of.cross_entropy).sum() / weights.sum()

    def fused(
        tenths: int, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        masked = torch.arange(len(target), device=target.device) % 10 >= tenths
        return linear_infoentropy_loss(hidden, weight, target.masked_fill(masked, -100), config)

    return {
        "unfused, gradient over the logits": unfused,
        f"fused statistics, chunks of {chunk_tokens}": statistics,
        f"fused loss, chunks of {chunk_tokens}": partial(fused, 10),
        "the same, 50 % of the tokens valid": partial(fused, 5),
        "the same, 10 % of the tokens valid": partial(fused, 1),
    }


def measure_linear(
    case: Case, hidden: int, chunk_tokens: int, device: torch.device, *, repeats: int, computes: str
) -> list[Row]:
    """Time forward and backward of the output layer with the loss on one rank, a row a way.

    Memory is beside hidden states and weight. Expected, with L the logits of all tokens, C those of
    a chunk, dX and dW the gradients, S dW as it is summed in fp32: unfused L + dX + dW; fused
    C + dX + S, or where that is more dX + S + dW (16-bit dW).
    """
    inputs = _linear_inputs(case, hidden, device)
    losses = linear_losses(chunk_tokens)
    passes = {name: partial(_linear_pass, loss, *inputs) for name, loss in losses.items()}
    clock = Clock(device)
    with progress("output layer", (repeats + 1) * len(passes), "passes") as advance:
        peaks = {}
        for name, one_pass in passes.items():  # also compiles and warms up
            peaks[name] = peak_mib(lambda run=one_pass: list(run()), device)  # type: ignore[misc]
            advance(1)
        times = time_in_turn(passes, clock, repeats, advance=advance)
    common = {"kind": "linear", "by": "ours", "computes": computes, "step": "both"}
    common |= {"clock": clock.name}
    threads = torch.get_num_threads()
    return [
        row_of_case(
            case,
            threads=threads,
            provider=name,
            peak_mib=peaks[name],
            **common,
            **columns_of(values),
        )
        for name, (values,) in times.items()
    ]


def _linear_inputs(case: Case, hidden: int, device: torch.device) -> list[torch.Tensor]:
    """[hidden states, weight, target]: the logits' standard deviation is the other tables'."""
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(case.tokens, hidden, device=device, generator=generator)
    weight = torch.randn(case.vocabulary, hidden, device=device, generator=generator)
    weight.mul_(LOGITS_SCALE / hidden**0.5)
    target = torch.randint(case.vocabulary, (case.tokens,), device=device, generator=generator)
    dtype = getattr(torch, case.dtype)
    return [states.to(dtype), weight.to(dtype), target]


def _linear_pass(
    loss: LinearLoss, states: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> Iterator[None]:
    """Forward and backward; gradients are dropped with the leaves."""
    leaves = states.detach().requires_grad_(), weight.detach().requires_grad_()
    yield
    _backward(loss(*leaves, target))
    yield
