"""The sum of weighted token losses from hidden states and output weight; logits are made once.

With detached weights a token's part of the gradient, up to one factor that all tokens share
(alpha / count, and whatever the caller does to the loss), is known as soon as its statistics are:

    forward    of each chunk: logits, statistics, gather, fold, weight; dz over the logits; dX,
               dW += dz^T X. The gather of a chunk hides under the logits of the next.
    backward   scales dX and dW by the one factor.

Three matrix products instead of four, for keeping dX and dW from forward to backward. Two chunks of
logits are alive at a time, one where there is nothing to gather. Shapes: as in `linear_chunks`.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.kernels import ops
from megatron_infoentropy.kernels.contract import statistics_dtype
from megatron_infoentropy.loss import linear_chunks
from megatron_infoentropy.loss.collective import RowStatistics, start_join, world_and_rank
from megatron_infoentropy.loss.layout import Settings
from megatron_infoentropy.loss.linear_chunks import LinearGradients
from megatron_infoentropy.loss.objective import TokenSums, token_sums
from megatron_infoentropy.loss.statistics import (
    TokenStatistics,
    Upstream,
    coefficients,
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
        needs_hidden, needs_weight = (with_gradients and n for n in ctx.needs_input_grad[:2])
        gradients = LinearGradients(
            torch.empty_like(hidden_LH) if needs_hidden else None,
            linear_chunks.new_weight_total(weight_VH) if needs_weight else None,
            settings.cut,
            settings.group,
        )
        one_pass = _Pass(weight_VH, tokens, settings, config, gradients)
        sums = one_pass.run(hidden_LH)
        ctx.save_for_backward(*gradients.finish())
        ctx.weight, ctx.main_grad = (
            weight_VH,
            linear_chunks.main_grad_of(weight_VH, settings.into_main_grad),
        )
        ctx.cut, ctx.handed_out = settings.cut, False
        ctx.mark_non_differentiable(sums.weight, sums.tokens)
        return tuple(sums)

    @staticmethod
    def backward(
        ctx: Any, factor: torch.Tensor, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        linear_chunks.refuse_second_derivative()
        if ctx.handed_out:
            raise RuntimeError(
                "the gradients of this loss were scaled and handed out in an earlier backward "
                "pass; use linear_vocab_parallel_statistics to run backward more than once"
            )
        ctx.handed_out = True
        by_hidden_LH, total_VH = ctx.saved_tensors
        if by_hidden_LH is not None:
            for rows in ctx.cut.chunks():
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


class _Pass:
    """One forward pass over all chunks."""

    def __init__(
        self,
        weight_VH: torch.Tensor,
        tokens: Tokens,
        settings: Settings,
        config: InfoEntropyConfig,
        gradients: LinearGradients,
    ) -> None:
        self.weight_VH, self.tokens, self.gradients = weight_VH, tokens, gradients
        self.settings, self.config = settings, config
        # Summed once at the end, so that the value does not depend on the chunks' size.
        dtype = statistics_dtype(weight_VH)
        self.token_loss_N = weight_VH.new_empty(len(tokens.target), dtype=dtype)
        self.token_weight_N = torch.empty_like(self.token_loss_N)

    def run(self, hidden_LH: torch.Tensor) -> TokenSums:
        cut, group = self.settings.cut, self.settings.group
        depth = 1 if world_and_rank(group)[0] > 1 else 0  # chunks that wait for their gather
        shape = (cut.tokens, len(self.weight_VH))
        buffers_CV = [hidden_LH.new_empty(shape) for _ in cut.chunks()[: depth + 1]]
        under_way: deque[_Chunk] = deque()
        for index, (rows, hidden_CH) in enumerate(
            linear_chunks.hidden_chunks(hidden_LH, cut, group)
        ):
            under_way.append(self._start(rows, hidden_CH, buffers_CV[index % (depth + 1)]))
            if len(under_way) > depth:
                self._finish(under_way.popleft())
        for chunk in under_way:
            self._finish(chunk)
        return token_sums(self.token_loss_N, self.token_weight_N, self.tokens.mask)

    def _start(self, rows: slice, hidden_CH: torch.Tensor, buffer_CV: torch.Tensor) -> _Chunk:
        settings = self.settings
        vocabulary, options = settings.vocabulary, settings.options
        tokens = Tokens(*(settings.cut.take(whole, rows) for whole in self.tokens))
        logits_CV = linear_chunks.logits_of(hidden_CH, self.weight_VH, buffer_CV)
        statistics_RC = ops.shard_statistics(
            settings.kernels, logits_CV, tokens.target, vocabulary.shard, options
        )
        arrived = start_join(
            statistics_RC, settings.group, settings.collective, vocabulary.columns, options
        )
        return _Chunk(rows, hidden_CH, logits_CV, tokens, arrived)

    def _finish(self, chunk: _Chunk) -> None:
        settings, (target_C, mask_C) = self.settings, chunk.tokens
        (size, shard, _), options = settings.vocabulary, settings.options
        results, saved = token_results(chunk.arrived(), target_C, size, shard.ignore_index, options)
        differentiate = self.gradients.are_needed
        loss_C, weight_C, upstream = _token_terms(results, mask_C, self.config, differentiate)
        settings.cut.put(self.token_loss_N, chunk.rows, loss_C)
        settings.cut.put(self.token_weight_N, chunk.rows, weight_C)
        if upstream is None:
            return
        dz_CV = ops.shard_gradient(
            settings.kernels,
            chunk.logits_CV,
            target_C,
            shard,
            options,
            coefficients(upstream, saved, size, options),
            inplace=True,
        )
        self.gradients.add(chunk.rows, dz_CV, chunk.hidden_CH, self.weight_VH)


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
