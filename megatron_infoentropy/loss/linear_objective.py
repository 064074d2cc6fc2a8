"""The sum of weighted token losses from hidden states and output weight; logits are made once.

With detached weights a token's part of the gradient, up to one factor that all tokens share
(alpha / count, and whatever the caller does to the loss), is known as soon as its statistics are:

    forward    of each chunk: logits, statistics, gather, fold, weight; dz over the logits; dX,
               dW += dz^T X. The gather of a chunk hides under the logits of the next.
    backward   scales dX and dW by the one factor.

Three matrix products instead of four, for keeping dX and dW from forward to backward. Two chunks of
logits are alive at a time, one where there is nothing to gather. Shapes: as in `linear_chunks`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.kernels.contract import statistics_dtype
from megatron_infoentropy.loss import linear_chunks
from megatron_infoentropy.loss.collective import RowStatistics, start_join, world_and_rank
from megatron_infoentropy.loss.layout import Settings
from megatron_infoentropy.loss.linear_chunks import LinearGradients
from megatron_infoentropy.loss.objective import token_sums
from megatron_infoentropy.loss.statistics import (
    TokenStatistics,
    Upstream,
    coefficients,
    refuse_second_derivative,
    token_results,
)
from megatron_infoentropy.loss.token_batch import token_batch
from megatron_infoentropy.loss.weighting import token_loss, token_weight


class Tokens(NamedTuple):
    """The tokens of all slices; each [N]."""

    target: torch.Tensor
    mask: torch.Tensor  # in the dtype of the statistics; 0 where the target is ignored


class LinearSums(torch.autograd.Function):
    """(hidden [L, H], weight [V, H], tokens, ...) -> the `TokenSums`, scalars.

    Only the weighted loss is differentiable, once: its gradients are scaled where they lie.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: torch.Tensor,
        weight_VH: torch.Tensor,
        tokens: Tokens,
        settings: Settings,
        config: InfoEntropyConfig,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, ...]:
        needed = [with_gradients and needs for needs in ctx.needs_input_grad[:2]]
        gradients = LinearGradients(hidden_LH, weight_VH, needed, settings)
        # Summed once at the end, so that the value does not depend on the chunks' size.
        loss_N = hidden_LH.new_empty(len(tokens.target), dtype=statistics_dtype(hidden_LH))
        weight_N = torch.empty_like(loss_N)
        depth = 1 if world_and_rank(settings.group)[0] > 1 else 0  # chunks that wait for a gather
        started = _started_chunks(hidden_LH, weight_VH, tokens, settings, depth + 1)
        for chunk in linear_chunks.ahead(started, depth):
            loss_C, weight_C = _finish(chunk, settings, config, gradients)
            settings.cut.put(loss_N, chunk.rows, loss_C)
            settings.cut.put(weight_N, chunk.rows, weight_C)
        sums = token_sums(loss_N, weight_N, tokens.mask)
        ctx.save_for_backward(*gradients.finish())
        ctx.weight, ctx.settings, ctx.handed_out = weight_VH, settings, False
        ctx.main_grad = settings.main_grad_of(weight_VH)
        ctx.mark_non_differentiable(sums.weight, sums.tokens)
        return tuple(sums)

    @staticmethod
    def backward(
        ctx: Any, factor: torch.Tensor, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.handed_out:
            raise RuntimeError(
                "the gradients of this loss were scaled and handed out in an earlier backward "
                "pass; use linear_vocab_parallel_statistics to run backward more than once"
            )
        ctx.handed_out = True
        by_hidden_LH, total_VH = ctx.saved_tensors
        if by_hidden_LH is not None:
            for rows in ctx.settings.cut.chunks():
                # A factor with dimensions: a GPU would round one without to 16 bits first.
                by_hidden_LH[rows] = by_hidden_LH[rows] * factor.view(1, 1)
        if total_VH is not None:
            total_VH = linear_chunks.deliver_weight_gradient(
                total_VH.mul_(factor), ctx.weight, ctx.main_grad
            )
        return by_hidden_LH, total_VH, None, None, None, None


class _Chunk(NamedTuple):
    """One chunk whose statistics are on their way."""

    rows: slice
    hidden_CH: torch.Tensor
    logits_CV: torch.Tensor
    tokens: Tokens
    arrived: Callable[[], RowStatistics]


def _started_chunks(
    hidden_LH: torch.Tensor,
    weight_VH: torch.Tensor,
    tokens: Tokens,
    settings: Settings,
    buffers: int,
) -> Iterator[_Chunk]:
    """Every chunk, its logits made in one of so many buffers, its statistics on their way."""
    cut = settings.cut
    shape = (cut.tokens, len(weight_VH))
    buffers_CV = [hidden_LH.new_empty(shape) for _ in cut.chunks()[:buffers]]
    hidden_chunks = linear_chunks.hidden_chunks(hidden_LH, cut, settings.group)
    for index, (rows, hidden_CH) in enumerate(hidden_chunks):
        part = Tokens(*(cut.take(whole, rows) for whole in tokens))
        logits_CV = linear_chunks.logits_of(hidden_CH, weight_VH, buffers_CV[index % buffers])
        statistics_RC = settings.kernels.statistics(logits_CV, part.target)
        arrived = start_join(
            *(statistics_RC, settings.group, settings.collective),
            *(settings.vocabulary.columns, settings.options),
        )
        yield _Chunk(rows, hidden_CH, logits_CV, part, arrived)


def _finish(
    chunk: _Chunk, settings: Settings, config: InfoEntropyConfig, gradients: LinearGradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's loss and weight, once the chunk's part of the gradients is added."""
    target_C, mask_C = chunk.tokens
    (size, shard, _), options = settings.vocabulary, settings.options
    results, saved = token_results(chunk.arrived(), target_C, size, shard.ignore_index, options)
    loss_C, weight_C, upstream = _token_terms(results, mask_C, config, gradients.are_needed)
    if upstream is not None:
        coefficients_RC = coefficients(upstream, saved, size, options)
        dz_CV = settings.kernels.gradient(chunk.logits_CV, target_C, coefficients_RC, inplace=True)
        gradients.add(chunk.rows, dz_CV, chunk.hidden_CH)
    return loss_C, weight_C


def _token_terms(
    results: TokenStatistics, mask_C: torch.Tensor, config: InfoEntropyConfig, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor, Upstream | None]:
    """Return each token's loss and weight; if asked, their masked sum's gradient by each result."""
    leaves = {
        name: result.detach().requires_grad_(differentiate)
        for name, result in results._asdict().items()
        if name in Upstream._fields and result is not None
    }
    with torch.set_grad_enabled(differentiate):
        statistics = TokenStatistics(**{"is_top": results.is_top, **leaves})
        loss = token_loss(statistics, config)
        weight = token_weight(token_batch(statistics, mask_C), config)
        if not differentiate:
            return loss, weight, None
        total = token_sums(loss, weight, mask_C).weighted_loss
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    upstream = dict(zip(leaves, gradients, strict=True))
    return loss.detach(), weight, Upstream(*(upstream.get(name) for name in Upstream._fields))
