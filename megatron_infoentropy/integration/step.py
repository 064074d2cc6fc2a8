"""Megatron's forward step: a batch in, the scalar to minimise and the numbers to log out.

    the model's forward -> [K, batch, sequence] = ce, entropy, lse, ... (`output`)
    loss function: weights, alpha, (sum, token count, report), the only place that has the mask too

In training the sum is of alpha w l, l a token's loss; Megatron divides it by the token count and
averages over micro-batches and data-parallel ranks (or, with --calculate-per-token-loss, divides
the gradients by the global count). Where ranks hold unequal numbers of valid tokens the former is
a mean of means; the logged "objective" is the mean over tokens, as is `infoentropy_loss`. alpha
and, where it is detached, w are constants in the backward pass. In evaluation the sum is of plain
cross entropy whatever the objective.

"global" normalisation is over the global batch: sum(w ce) / sum(w), however the batch is cut.
sum(w) is known only after the last micro-batch. Megatron runs with per-token losses, i.e. sums of
w ce over micro-batches and ranks, and once all gradients are reduced they are divided by the
batch's weight here, where Megatron itself would divide by its (integer) token count.

Sums over a batch are as many times larger than means as it has tokens, beyond what fp16 holds: the
losses are divided by a power of two near that number, and the gradients multiplied by it in the
end, which changes no bit of a result that is in range.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import roll_tensor
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.integration.batch import get_batch
from megatron_infoentropy.integration.compat import takes_output_processor
from megatron_infoentropy.integration.dropin import find_language_module
from megatron_infoentropy.integration.observe import TokenObserver
from megatron_infoentropy.integration.output import (
    Groups,
    OutputSettings,
    loss_of_heads,
    masked_target,
    statistics_as_loss,
    statistics_of_logits,
    statistics_processor,
    unpack,
    weigh_tokens,
)
from megatron_infoentropy.loss.weighting import LEAST_WEIGHT


class GlobalBatchWeight:
    """Adds up the weights of a step's micro-batches on this rank, then scales the gradients.

    With another normalization than "global" the weights are the loss masks alone.
    """

    def __init__(self, tokens: int = 1) -> None:
        """tokens: about how many a global batch has; 1 leaves the losses as they are."""
        self.unit = 2.0 ** round(math.log2(tokens))
        self._total: torch.Tensor | None = None

    def add(self, weight: torch.Tensor) -> None:
        """Count one micro-batch; scalar, on this rank."""
        weight = weight.detach()
        self._total = weight.clone() if self._total is None else self._total + weight

    def finalize_model_grads(
        self,
        model: list[Any],
        num_tokens: torch.Tensor | None = None,
        pg_collection: Any = None,
        **options: Any,
    ) -> None:
        """`config.finalize_model_grads_func` of a run with "global" normalisation."""
        does_nothing = _BaseDataParallel.scale_gradients
        for chunk in model:
            if getattr(chunk.scale_gradients, "__func__", None) is does_nothing:
                raise ValueError(
                    f"'global' normalization scales gradients, which {type(chunk).__name__} does "
                    "not do; use 'paper' or 'none', or another data-parallel wrapper"
                )
        finalize_model_grads(model, None, pg_collection=pg_collection, **options)
        total = self._sum_over_ranks(pg_collection)
        # Without a weight there is no gradient to scale, and no host has to know.
        scale = self.unit / total.clamp_min(LEAST_WEIGHT * self.unit)
        for chunk in model:
            chunk.scale_gradients(scale)

    def finalize_per_token(
        self, model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any
    ) -> None:
        """`config.finalize_model_grads_func` of other runs with --calculate-per-token-loss.

        Megatron's own, which is handed the sum of the loss masks where it would take their number.
        """
        finalize_model_grads(model, None if num_tokens is None else self._take(), **options)

    def _take(self) -> torch.Tensor:
        """This rank's sum, a scalar; starts the next step from zero."""
        total = self._total
        if total is None:  # a pipeline stage without the loss
            total = torch.zeros((), device=torch.cuda.current_device())
        self._total = None
        return total

    def _sum_over_ranks(self, pg_collection: Any) -> torch.Tensor:
        """The global batch's weight on every rank; starts the next step from zero."""
        if pg_collection is None:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            data = parallel_state.get_data_parallel_group(with_context_parallel=True)
        else:
            # With weights sharded over a further axis its peers hold tokens of their own.
            data = getattr(pg_collection, "dp_cp_gtp_remat", None) or pg_collection.dp_cp
            pipeline = pg_collection.pp
        total = self._take()
        # Only the last stage has weights: a sum over the pipeline hands them to the others.
        torch.distributed.all_reduce(total, group=pipeline)
        torch.distributed.all_reduce(total, group=data)
        return total


logger = logging.getLogger(__name__)

SPIKY_LOSS_FACTOR = 10  # a loss this many times the largest seen is reported, as in Megatron

Report = dict[str, torch.Tensor]
LossResult = tuple[torch.Tensor, torch.Tensor, Report]


def _groups() -> Groups:
    return Groups(mpu.get_context_parallel_group(), mpu.get_data_parallel_group())


class InfoEntropyForwardStep:
    """`forward_step_func` for `megatron.training.pretrain`."""

    def __init__(
        self,
        config: InfoEntropyConfig,
        vocab_size: int,
        batch_weight: GlobalBatchWeight,
        observer: TokenObserver,
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.batch_weight = batch_weight
        self.observer = observer

    def __call__(
        self, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[[torch.Tensor], LossResult]]:
        timers, straggler = get_timers(), StragglerDetector()
        timers("batch-generator", log_level=2).start()
        with straggler(bdata=True):
            vp_stage = get_attr_wrapped_model(model, "vp_stage")
            model_config = get_attr_wrapped_model(model, "config")
            batch = get_batch(data_iterator, vp_stage, model_config, training=model.training)
        timers("batch-generator").stop()

        forward = model.build_schedule_plan if return_schedule_plan else model
        config = self.config.at(get_args().consumed_train_samples)  # saved and resumed by Megatron
        of_logits = replace(config, ignore_target=-1, mtp_loss="megatron")  # both are seen to here
        settings = OutputSettings(of_logits, mpu.get_tensor_model_parallel_group(), self.vocab_size)
        module, mask = find_language_module(model), batch["loss_mask"]
        options: dict[str, Any] = {"labels": batch["labels"], "loss_mask": mask}
        heads = None
        if model.training and config.mtp_loss == "weighted":
            heads = HeadLoss(module, mask, settings, _groups(), get_args().consumed_train_samples)
        door: AbstractContextManager[None] = nullcontext()
        if not takes_output_processor(module):
            door = statistics_as_loss(module, mask, settings, heads)
        else:
            options["output_processor"] = statistics_processor
            options["output_processor_context"] = settings
            if heads is not None:
                door = loss_of_heads(module, heads)
        with straggler, door:
            output = forward(
                batch["tokens"], batch["position_ids"], batch["attention_mask"], **options
            )
        if not model.training:
            return output, partial(validation_loss, mask)
        report = {} if heads is None else heads.report
        return output, partial(self._training_loss, batch["labels"], mask, config, report)

    def _training_loss(
        self,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        config: InfoEntropyConfig,
        report_of_heads: Report,
        output: torch.Tensor,
    ) -> LossResult:
        args = get_args()
        loss, num_tokens, report, weight = training_loss(
            loss_mask, output, config, _groups(), labels, args.consumed_train_samples
        )
        report |= report_of_heads
        mask_sum = report["weight"][1]
        if not args.calculate_per_token_loss:
            # Megatron divides by whole tokens; a loss mask of fractions has another sum.
            loss = loss * torch.where(mask_sum > 0, num_tokens / mask_sum, 1)
        is_global = self.config.normalization == "global"
        self.batch_weight.add(report["weight"][0] if is_global else mask_sum)
        self.observer.add(unpack(output.detach(), config), weight, loss_mask, report["objective"])
        if self.config.gamma_schedule != "constant":
            # Filled on the device: a copy from the host would wait for it.
            gamma = torch.full_like(loss.detach(), config.gamma)
            report["gamma"] = torch.stack([gamma, torch.ones_like(gamma)])
        reject_bad_loss(loss)
        return loss / self.batch_weight.unit, num_tokens, report


def training_loss(
    loss_mask: torch.Tensor,
    output: torch.Tensor,
    config: InfoEntropyConfig,
    groups: Groups,
    labels: torch.Tensor | None = None,
    samples: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, Report, torch.Tensor]:
    """(sum of alpha w l, token count, report, weights) of one micro-batch on one rank.

    loss_mask, labels: [batch, sequence], the former from 0 to 1; output: [K, batch, sequence];
    samples: consumed before this step. With "global" the sum is of w l: the weight of the whole
    batch is not known yet and divides the gradients in the end.
    """
    statistics = unpack(output, config)
    tokens = weigh_tokens(statistics, loss_mask, config, groups, target=labels, samples=samples)
    mask, sums = tokens.mask, tokens.sums
    loss = tokens.alpha * (mask * tokens.weight * tokens.loss).sum()
    divisor = sums.weight if config.normalization == "global" else sums.tokens
    report = {
        "objective": torch.stack([loss.detach(), divisor]),
        "cross entropy": _mean_over(mask, statistics.cross_entropy),
        "entropy": _mean_over(mask, statistics.entropy),
        "accuracy": _mean_over(mask, statistics.is_top),
        "weight": torch.stack([sums.weight, sums.tokens]),
    }
    if config.normalization == "paper":
        report["alpha"] = torch.stack([tokens.alpha, torch.ones_like(tokens.alpha)])
    return loss, _whole(sums.tokens), report, tokens.weight.detach()


class HeadLoss:
    """The loss of the multi-token-prediction heads over one micro-batch, in place of Megatron's.

    Megatron asks for one head after the other, each a token further on. It multiplies what it gets
    by the loss mask, so many tokens further on, and takes the mean over that, so that alpha and
    the mean are each head's own.
    """

    def __init__(
        self,
        module: Any,
        loss_mask: torch.Tensor,
        settings: OutputSettings,
        groups: Groups,
        samples: int,
    ) -> None:
        self.report: Report = {}
        self._module, self._mask = module, loss_mask
        self._groups, self._samples = groups, samples
        # Megatron has formed the heads' logits already, of which it counts the right ones.
        self._settings = replace(settings, config=replace(settings.config, fused_linear=False))

    def __call__(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return alpha w l, [batch, sequence]; labels [batch, sequence], logits [s, b, V/TP]."""
        config, module = self._settings.config, self._module
        self._mask, _ = roll_tensor(self._mask, cp_group=module.pg_collection.cp)
        target = masked_target(labels, self._mask)
        output = statistics_of_logits(logits, module.output_layer, target, self._settings)
        statistics = unpack(output, config)
        tokens = weigh_tokens(
            *(statistics, self._mask, config, self._groups), target=labels, samples=self._samples
        )
        name = f"mtp_{len(self.report) + 1} cross entropy"
        self.report[name] = _mean_over(tokens.mask, statistics.cross_entropy)
        return tokens.alpha * tokens.weight * tokens.loss


def validation_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> LossResult:
    """(sum of plain cross entropy, token count, report): the same for every objective."""
    mask = loss_mask.to(output.dtype)
    loss, count = (mask * output[0]).sum(), mask.sum()
    return loss, _whole(count), {"cross entropy": torch.stack([loss.detach(), count])}


def _whole(tokens: torch.Tensor) -> torch.Tensor:
    """The sum of a loss mask as Megatron counts tokens, in integers: some tokens are never none."""
    return tokens.ceil().to(torch.int)


def _mean_over(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(sum, count), which Megatron adds up over micro-batches and ranks, then divides."""
    return torch.stack([(mask * values.detach()).sum(), mask.sum()])


def reject_bad_loss(loss: torch.Tensor) -> None:
    """Make Megatron's own checks of a local loss, unless --no-check-for-nan-in-loss-and-grad."""
    args, rerun = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            rerun.validate_result(
                result=loss,
                rejection_func=partial(_is_bad, name, is_bad),
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=loss,
            rejection_func=partial(
                rerun.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )


def _is_bad(name: str, is_bad: Callable[[torch.Tensor], torch.Tensor], loss: torch.Tensor) -> bool:
    """Return whether a loss is `name`, and log where: Megatron counts iterations from 2."""
    is_bad_here = bool(is_bad(loss))
    if is_bad_here:
        rank, iteration = dist.get_rank(), get_args().curr_iteration + 1
        logger.error(f"rank {rank}: the loss is {name} at iteration {iteration}, training stops")
    return is_bad_here
