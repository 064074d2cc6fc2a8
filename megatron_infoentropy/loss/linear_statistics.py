"""The statistics of every token from hidden states and output weight; logits are made twice.

    forward    of each chunk: logits, this shard's statistics. Then one collective for all tokens.
    backward   of each chunk: logits again, their gradient over them, dX, dW += dz^T X.

Four matrix products, because the upstream gradients may be anything. One chunk of logits is alive
at a time. The statistics are gathered once, after the last chunk: hiding a gather a chunk would
leave the last one in sight all the same. Shapes: as in `linear_chunks`; R rows of statistics.
"""

from typing import Any

import torch

from megatron_infoentropy.kernels import ops
from megatron_infoentropy.kernels.contract import statistics_dtype
from megatron_infoentropy.loss.collective import join_shards
from megatron_infoentropy.loss.linear_chunks import LinearSettings, hidden_chunks, logits_of
from megatron_infoentropy.loss.linear_gradients import (
    LinearGradients,
    deliver_weight_gradient,
    main_grad_of,
    new_weight_total,
    refuse_second_derivative,
)
from megatron_infoentropy.loss.token import Saved, Upstream, coefficients, token_results


class LinearStatistics(torch.autograd.Function):
    """(hidden [L, H], weight [V, H], target [N], settings) -> the `TokenResults`, each [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_N: torch.Tensor,
        settings: LinearSettings,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        (size, shard, columns), options = settings.vocabulary, settings.options
        statistics_RN = _shard_statistics(hidden_LH, weight_VH, target_N, settings)
        row = join_shards(statistics_RN, settings.group, settings.collective, columns)
        results, saved = token_results(row, target_N, size, shard.ignore_index, options)
        ctx.save_for_backward(hidden_LH, weight_VH, target_N, *saved)
        ctx.settings, ctx.main_grad = settings, main_grad_of(weight_VH, settings)
        ctx.parameter = weight_VH  # its attributes: what is unpacked may be a copy without them
        ctx.mark_non_differentiable(results.is_top)
        return tuple(result for result in results if result is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        hidden_LH, weight_VH, target_N, *kept = ctx.saved_tensors
        settings: LinearSettings = ctx.settings
        g_ce, g_entropy, g_lse, _, *g_uniform = gradients
        upstream = Upstream(g_ce, g_entropy, g_lse, *(g_uniform or [None]))
        size = settings.vocabulary.size
        coefficients_RN = coefficients(upstream, Saved(*kept), size, settings.options)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total_VH = None
        if needs_weight:
            total_VH = _accumulator(weight_VH, ctx.main_grad)
        sums = LinearGradients(
            torch.empty_like(hidden_LH) if needs_hidden else None,
            total_VH,
            settings.cut,
            settings.group,
        )
        _add_gradients(sums, hidden_LH, weight_VH, target_N, coefficients_RN, settings)
        by_hidden_LH, total_VH = sums.finish()
        if total_VH is not None:
            total_VH = deliver_weight_gradient(total_VH, ctx.parameter, ctx.main_grad)
        return by_hidden_LH, total_VH, None, None


def _shard_statistics(
    hidden_LH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    settings: LinearSettings,
) -> torch.Tensor:
    """[R, N], of this rank's columns."""
    cut, options = settings.cut, settings.options
    dtype = statistics_dtype(hidden_LH)
    statistics_RN = hidden_LH.new_empty((options.rows, len(target_N)), dtype=dtype)
    buffer_CV = hidden_LH.new_empty((cut.tokens, len(weight_VH)))
    for rows, hidden_CH in hidden_chunks(hidden_LH, cut, settings.group):
        logits_CV = logits_of(hidden_CH, weight_VH, buffer_CV)
        part_RC = ops.shard_statistics(
            settings.kernels,
            logits_CV,
            cut.take(target_N, rows),
            settings.vocabulary.shard,
            options,
        )
        cut.put(statistics_RN, rows, part_RC)
    return statistics_RN


def _add_gradients(
    sums: LinearGradients,
    hidden_LH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    coefficients_RN: torch.Tensor,
    settings: LinearSettings,
) -> None:
    cut = settings.cut
    buffer_CV = hidden_LH.new_empty((cut.tokens, len(weight_VH)))
    for rows, hidden_CH in hidden_chunks(hidden_LH, cut, settings.group):
        dz_CV = ops.shard_gradient(
            settings.kernels,
            logits_of(hidden_CH, weight_VH, buffer_CV),
            cut.take(target_N, rows),
            settings.vocabulary.shard,
            settings.options,
            cut.take(coefficients_RN, rows),
            inplace=True,
        )
        sums.add(rows, dz_CV, hidden_CH, weight_VH)


def _accumulator(weight_VH: torch.Tensor, main_grad_VH: torch.Tensor | None) -> torch.Tensor:
    """What the weight's gradient is added to: its main_grad where that is precise enough."""
    if main_grad_VH is not None and main_grad_VH.dtype == statistics_dtype(weight_VH):
        return main_grad_VH
    return new_weight_total(weight_VH)
