"""The losses that take turns in one training: ours as the recipe says, ours otherwise, Megatron's.

Each is a forward step and a `finalize_model_grads_func` of Megatron's trainer.

They take turns, a training step each, and the parts of every step are timed. A step goes from its
first micro-batch's forward pass to that of the next step: the optimizer, the log line and the
fetching of data are in it. Its parts begin where Megatron calls us. A loss that is fused with the
output layer has no moments of its own; all of it counts as forward.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.language_module import language_module
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args

from megatron_infoentropy.bench.clock import Clock, PeakMeter
from megatron_infoentropy.bench.parts import PartTimes
from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.integration.arguments import check_megatron_args
from megatron_infoentropy.integration.batch import get_batch
from megatron_infoentropy.integration.step import (
    InfoEntropyForwardStep,
    LossResult,
    reject_bad_loss,
)
from megatron_infoentropy.runtime import cpu

WARM_UPS = 2  # of every loss: the first builds the optimizer's state, the second finds it there


@dataclass
class Measured:
    """The times and memory of one loss on this rank."""

    times: list[float] = field(default_factory=list)  # ms of a step, a round each
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak_mib: float = 0.0  # the worst step's, beside what lives between steps


@dataclass(frozen=True)
class Turn:
    """One training step: whose it is and what it is for."""

    contender: "Contender"
    purpose: str  # "warm up", "weigh" or "time"


def turns(contenders: list["Contender"], rounds: int) -> list[Turn]:
    """Every loss warmed up and weighed, then rounds in which each takes a step, in an order that
    turns from round to round."""
    planned = [Turn(each, "warm up") for each in contenders for _ in range(WARM_UPS)]
    planned += [Turn(each, "weigh") for each in contenders]
    for number in range(rounds):
        first = number % len(contenders)
        planned += [Turn(each, "time") for each in contenders[first:] + contenders[:first]]
    return planned


class TurnTakingStep:
    """Megatron's forward step and `finalize_model_grads_func` of a training that is measured."""

    def __init__(
        self,
        planned: list[Turn],
        clock: Clock,
        meter: PeakMeter,
        iteration: Callable[[], int],
        finish: Callable[[dict[str, Measured]], None],
    ) -> None:
        """iteration: number of the step under way; finish: takes the results after every round, so
        that a training that is stopped early leaves those it has. The last is known in one step
        more."""
        self.measured = {turn.contender.name: Measured() for turn in planned}
        self._planned = planned
        self._times = PartTimes(clock)
        self._meter = meter
        self._iteration = iteration
        self._finish = finish
        self._turn = -1
        self._at: int | None = None

    def __call__(self, data_iterator: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if self._iteration() != self._at:
            self._next_turn()
        self._watch(model)
        self._times.enter("forward")
        return self._contender.forward_step(data_iterator, model, *arguments, **options)

    def finalize_model_grads(self, *arguments: Any, **options: Any) -> None:
        self._times.enter("gradients")
        self._contender.finalize(*arguments, **options)
        self._times.enter("optimizer")

    @property
    def _contender(self) -> "Contender":
        return self._planned[min(self._turn, len(self._planned) - 1)].contender

    def _next_turn(self) -> None:
        if self._at is not None and self._turn < len(self._planned):
            self._close(self._planned[self._turn])
        self._at = self._iteration()
        self._turn += 1
        if self._turn < len(self._planned) and self._planned[self._turn].purpose == "weigh":
            self._meter.start()
        self._times.start()

    def _close(self, turn: Turn) -> None:
        spent = self._times.stop()
        measured = self.measured[turn.contender.name]
        if turn.purpose == "weigh":
            measured.peak_mib = self._meter.stop()
        if turn.purpose == "time":
            measured.times.append(sum(spent.values()))
            for part, span in spent.items():
                measured.parts[part].append(span)
            if len({len(each.times) for each in self.measured.values()}) == 1:
                self._finish(self.measured)

    def _watch(self, model: Any) -> None:
        """Learn of a pipeline chunk's logits and of their gradient."""
        while hasattr(model, "module"):  # wrappers for data parallelism and 16-bit floats
            model = model.module
        output_layer = getattr(model, "output_layer", None)
        if output_layer is not None:
            self._times.watch(output_layer)


Finalize = Callable[..., None]

# Megatron's own: name -> (cross_entropy_loss_fusion, cross_entropy_fusion_impl)
FUSIONS = {
    "megatron unfused": (False, "native"),
    "megatron fused": (True, "native"),
    "megatron fused by Transformer Engine": (True, "te"),
}


class Contender(NamedTuple):
    """One loss of the training."""

    name: str
    by: str  # "ours" or "peer"
    forward_step: Callable[..., Any]
    finalize: Finalize
    calls_output_layer: bool = True


class LeftOut(NamedTuple):
    """A loss that cannot take part, and why."""

    name: str
    reason: str


def contenders(
    ours: InfoEntropyForwardStep, finalize: Finalize
) -> tuple[list[Contender], list[LeftOut]]:
    """(the losses, first the recipe's own; those that cannot take part).

    finalize: of the recipe's own training, its reports included.
    """
    found, left_out = [], []
    for name, config in _ours(ours.config).items():
        try:
            check_megatron_args(get_args(), config)
        except ValueError as error:
            left_out.append(LeftOut(name, str(error)))
            continue
        own = InfoEntropyForwardStep(config, ours.vocab_size, ours.batch_weight, ours.observer)
        found.append(Contender(name, "ours", own, finalize, not config.fused_linear))
    for name, fusion in FUSIONS.items():
        reason = _why_not(*fusion)
        if reason:
            left_out.append(LeftOut(name, reason))
        else:
            found.append(
                Contender(name, "peer", MegatronForwardStep(*fusion), finalize_model_grads)
            )
    return found, left_out


def choose(
    names: list[str], every: list[Contender], left_out: list[LeftOut]
) -> tuple[list[Contender], list[LeftOut]]:
    """The losses of these names, of all where there are none.

    Raises:
        ValueError: no loss has such a name, or none that can take part was named.
    """
    if not names:
        return every, left_out
    known = [each.name for each in every] + [each.name for each in left_out]
    unknown = [name for name in names if name not in known]
    chosen = [each for each in every if each.name in names]
    if unknown or not chosen:
        asked = ", ".join(unknown or names)
        raise ValueError(f"no loss can be measured by the name {asked}; these: {', '.join(known)}")
    return chosen, [each for each in left_out if each.name in names]


def _ours(config: InfoEntropyConfig) -> dict[str, InfoEntropyConfig]:
    """The recipe's first; its other objective and its other way through the output layer."""
    unweighted = replace(config.at(0), objective="cross_entropy", weighting="")
    other_way = replace(config, fused_linear=not config.fused_linear)
    return {_name(each): each for each in (config, unweighted, other_way)}


def _name(config: InfoEntropyConfig) -> str:
    objective = config.objective.replace("_", " ")
    return f"{objective}, fused linear" if config.fused_linear else objective


def _why_not(fused: bool, implementation: str) -> str:
    if implementation == "te" and language_module.te_parallel_cross_entropy is None:
        return "Transformer Engine is not installed"
    if fused and cpu.is_installed():
        return "torch.compile is off where Megatron runs on a CPU"
    return ""


class MegatronForwardStep:
    """Plain cross entropy by the model's own loss, as Megatron's pretrain_gpt.py takes it."""

    def __init__(self, fused: bool, implementation: str) -> None:
        self.fused = fused
        self.implementation = implementation

    def __call__(
        self, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[[torch.Tensor], LossResult]]:
        config = get_attr_wrapped_model(model, "config")
        config.cross_entropy_loss_fusion = self.fused
        config.cross_entropy_fusion_impl = self.implementation
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, vp_stage, config, training=model.training)
        forward = model.build_schedule_plan if return_schedule_plan else model
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return output, partial(_summed, batch["loss_mask"])


def _summed(loss_mask: torch.Tensor, losses: torch.Tensor) -> LossResult:
    """(sum of the tokens' cross entropies, their count, report)."""
    loss = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    reject_bad_loss(loss)
    return loss, count.to(torch.int), {"lm loss": torch.stack([loss.detach(), count])}
