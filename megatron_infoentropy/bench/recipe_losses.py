"""The losses that take turns in one training: ours as the recipe says, ours otherwise, Megatron's.

Each is a forward step and a `finalize_model_grads_func` of Megatron's trainer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.common.language_module import language_module
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.integration.arguments import check_megatron_args
from megatron_infoentropy.integration.batch import get_batch
from megatron_infoentropy.integration.step import (
    InfoEntropyForwardStep,
    LossResult,
    reject_bad_loss,
)
from megatron_infoentropy.runtime import cpu

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
