"""The output layer and the loss in one: hidden states and output weight in, no logits in full.

Two functions. `linear_vocab_parallel_statistics` gives per-token statistics, differentiable for any
upstream gradient; it makes the logits twice. `linear_infoentropy_loss` gives the scalar objective
and, where its weights are detached, makes them once. Both work through the tokens in chunks: peak
memory is one chunk of logits (two while statistics are gathered) beside the gradients.

On each rank of a tensor-parallel group of T: weight [V/T, H], a shard of the vocabulary in rank
order; hidden states of all tokens, equal on all ranks, or with `sequence_parallel` this rank's 1/T
of the first dimension. The gradient by the hidden states is summed over the group here (all-reduce,
or reduce-scatter), as Megatron's ColumnParallelLinear does: the caller must not do it again.

The statistics make the logits twice:

    forward    of each chunk: logits, this shard's statistics. Then one collective for all tokens.
    backward   of each chunk: logits again, their gradient over them, dX, dW += dz^T X.

Four matrix products, because the upstream gradients may be anything. One chunk of logits is alive
at a time. The statistics are gathered once, after the last chunk: hiding a gather a chunk would
leave the last one in sight all the same. Shapes: as in `linear_chunks`; R rows of statistics.
"""

from typing import Any

import torch

from megatron_infoentropy.config import Backend, Collective, InfoEntropyConfig
from megatron_infoentropy.kernels.contract import statistics_dtype
from megatron_infoentropy.loss import layout, linear_chunks
from megatron_infoentropy.loss.collective import Group, start_join, world_and_rank
from megatron_infoentropy.loss.layout import Settings, StatisticsArguments
from megatron_infoentropy.loss.linear_chunks import LinearGradients, TakenTokens
from megatron_infoentropy.loss.linear_objective import LinearSums, Tokens
from megatron_infoentropy.loss.objective import PUBLISHED, TokenSums, objective_of, weighted_mean
from megatron_infoentropy.loss.statistics import (
    Saved,
    TokenStatistics,
    coefficients,
    refuse_second_derivative,
    token_results,
    upstream_of,
)
from megatron_infoentropy.loss.token_batch import token_batch


def prepare_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    arguments: StatisticsArguments,
    *,
    chunk_tokens: int,
    sequence_parallel: bool,
    into_main_grad: bool,
    skip_masked: bool,
) -> tuple[torch.Tensor, torch.Tensor, TakenTokens, Settings]:
    """(hidden [L, H] of the tokens taken, this rank's weight, which are taken, settings), checked.

    Raises:
        ValueError: shapes, dtypes, targets or sizes that do not fit.
        RuntimeError: the named backend cannot run here.
    """
    group, ignored = arguments.group, arguments.ignore_index
    weight = layout.local_shard(weight, 0, group)
    layout.check_tensors(hidden=hidden, weight=weight, target=target)
    slices, rank = world_and_rank(group) if sequence_parallel else (1, 0)
    _check_shapes(hidden, weight, target, slices)
    ids = layout.as_ids(target)
    taken = linear_chunks.take_tokens(ids, slices, ignored, skip=skip_masked)
    hidden_LH = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    if taken.index_SK is not None:
        hidden_LH = hidden_LH.index_select(0, taken.index_SK[rank])
    cut = layout.cut_tokens(len(hidden_LH), slices, chunk_tokens)
    settings = layout.make_settings(
        hidden, len(weight), arguments, cut=cut, into_main_grad=into_main_grad
    )
    layout.check_targets(ids, settings.vocabulary.size, ignored)
    return hidden_LH, weight, taken, settings


def _check_shapes(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, slices: int
) -> None:
    if weight.dim() != 2 or hidden.dim() < 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "expected hidden [..., H] and weight [V, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    expected = [hidden.shape[0] * slices, *hidden.shape[1:-1]]
    if list(target.shape) != expected:
        slice_of = f", this rank's 1/{slices} of the first dimension," if slices > 1 else ""
        raise ValueError(
            f"expected a target of {expected} for hidden {list(hidden.shape)}{slice_of} got "
            f"{list(target.shape)}; Megatron's hidden states are [sequence, batch, H] while its "
            "labels are [batch, sequence]: transpose one of them"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"expected hidden and weight of one floating dtype, got {hidden.dtype} and "
            f"{weight.dtype}; under autocast, which does not reach the fused loss, pass "
            "weight.to(hidden.dtype)"
        )


class LinearStatistics(torch.autograd.Function):
    """(hidden [L, H], weight [V, H], target [N], settings) -> the `TokenStatistics`, each [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_N: torch.Tensor,
        inverse_temperature_N: torch.Tensor | None,
        settings: Settings,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        (size, shard, columns), options = settings.vocabulary, settings.options
        cut, dtype = settings.cut, statistics_dtype(hidden_LH)
        statistics_RN = hidden_LH.new_empty((options.rows, len(target_N)), dtype=dtype)
        buffer_CV = hidden_LH.new_empty((cut.tokens, len(weight_VH)))
        for rows, hidden_CH in linear_chunks.hidden_chunks(hidden_LH, cut, settings.group):
            part_RC = settings.kernels.statistics(
                linear_chunks.logits_of(hidden_CH, weight_VH, buffer_CV),
                cut.take(target_N, rows),
                cut.take(inverse_temperature_N, rows),
            )
            cut.put(statistics_RN, rows, part_RC)
        row = start_join(statistics_RN, settings.group, settings.collective, columns, options)()
        results, saved = token_results(row, target_N, size, shard.ignore_index, options)
        ctx.save_for_backward(hidden_LH, weight_VH, target_N, inverse_temperature_N, *saved)
        ctx.settings, ctx.main_grad = settings, settings.main_grad_of(weight_VH)
        ctx.parameter = weight_VH  # its attributes: what is unpacked may be a copy without them
        ctx.mark_non_differentiable(results.is_top)
        return results.present()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        hidden_LH, weight_VH, target_N, inverse_temperature_N, *kept = ctx.saved_tensors
        settings: Settings = ctx.settings
        cut, options = settings.cut, settings.options
        upstream = upstream_of(gradients, options)
        coefficients_RN = coefficients(
            *(upstream, Saved(*kept), settings.vocabulary.size, options, inverse_temperature_N)
        )
        needed, main_grad = ctx.needs_input_grad[:2], ctx.main_grad
        sums = LinearGradients(hidden_LH, weight_VH, needed, settings, main_grad)
        buffer_CV = hidden_LH.new_empty((cut.tokens, len(weight_VH)))
        for rows, hidden_CH in linear_chunks.hidden_chunks(hidden_LH, cut, settings.group):
            dz_CV = settings.kernels.gradient(
                linear_chunks.logits_of(hidden_CH, weight_VH, buffer_CV),
                cut.take(target_N, rows),
                cut.take(coefficients_RN, rows),
                cut.take(inverse_temperature_N, rows),
                inplace=True,
            )
            sums.add(rows, dz_CV, hidden_CH)
        by_hidden_LH, total_VH = sums.finish()
        if total_VH is not None:
            total_VH = linear_chunks.deliver_weight_gradient(total_VH, ctx.parameter, main_grad)
        return by_hidden_LH, total_VH, None, None, None


CANNOT_BE_CAPTURED = (
    "the fused InfoEntropy linear forms its gradients in the forward pass, which a compiled graph "
    "cannot hold: compile without fullgraph=True, or take linear_vocab_parallel_statistics or "
    "detach_weight=False"
)


def linear_vocab_parallel_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Group | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    uniform_cross_entropy: bool = False,
    sum_p_squared: bool = False,
    backend: Backend = "auto",
    collective: Collective = "gather",
    chunk_tokens: int = 4096,
    sequence_parallel: bool = False,
    into_main_grad: bool = False,
    skip_masked: bool = True,
) -> TokenStatistics:
    """`vocab_parallel_statistics` of the logits hidden @ weight^T, which never exist in full.

    Args:
        hidden: [..., H], fp32, bf16, fp16 or fp64; with `sequence_parallel` this rank's slice of
            the first dimension.
        weight: [V/T, H], in the dtype of `hidden`, of an output layer without bias.
        target: [...], integer ids in the whole vocabulary, of all tokens on every rank.
        group: the tensor-parallel group, of shards equally wide; None where the weight is whole.
        vocab_size: the true size of the whole vocabulary, where the shards are padded.
        ignore_index: the target of tokens that take no part.
        softcap: logits become softcap * tanh(z / softcap).
        temperature: logits are divided by it; a number, or a tensor with one a token.
        uniform_cross_entropy: also return -mean ln p, which label smoothing needs.
        sum_p_squared: also return sum p^2.
        backend: which kernels run.
        collective: how the shards' statistics are joined; `vocab_parallel_statistics` has more on
            these eight.
        chunk_tokens: tokens whose logits are made at a time; results depend on it only as far as
            matrix products round differently.
        sequence_parallel: gather `hidden` over `group`, scatter its gradient.
        into_main_grad: add the weight's gradient to `weight.main_grad` where that exists, and
            return to autograd what Megatron's gradient accumulation fusion returns.
        skip_masked: multiply only the tokens that take part, whose number a GPU waits for; off,
            shapes do not depend on the data.

    Returns:
        TokenStatistics in the target's shape, fp32 (fp64 for fp64 hidden states).

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together; targets as in
            `vocab_parallel_statistics`.
        RuntimeError: the named backend cannot run on such logits.
    """
    arguments = StatisticsArguments(
        *(group, vocab_size, ignore_index, softcap, temperature),
        *(uniform_cross_entropy, sum_p_squared, backend, collective),
    )
    hidden_LH, weight, taken, settings = prepare_linear(
        hidden,
        weight,
        target,
        arguments,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
        into_main_grad=into_main_grad,
        skip_masked=skip_masked,
    )
    inverse = layout.inverse_temperature(temperature, target, statistics_dtype(hidden))
    inverse_N = None if inverse is None else taken.take(inverse)
    target_N = taken.take(layout.as_ids(target))
    results: Any = LinearStatistics.apply(hidden_LH, weight, target_N, inverse_N, settings)
    return TokenStatistics.of_present(
        (taken.restore(result) for result in results),
        uniform=uniform_cross_entropy,
        squares=sum_p_squared,
    )


def linear_infoentropy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    config: InfoEntropyConfig | None = None,
    *,
    group: Group | None = None,
    loss_mask: torch.Tensor | None = None,
    data_parallel_group: Group | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    sequence_parallel: bool = False,
    into_main_grad: bool = False,
    samples: int = 0,
    token_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """`infoentropy_loss` of the logits hidden @ weight^T, which never exist in full.

    With detached weights (`config.detach_weight`, the default) gradients are formed in the forward
    pass and scaled in the backward pass, which then can run once, and which torch.compile cannot
    capture whole; with attached ones, and with weights that compare tokens (custom, eslm,
    entrodrop), this is `linear_vocab_parallel_statistics` and ordinary PyTorch. Formed first and
    scaled later, 16-bit gradients of `hidden` are rounded twice, and in fp16 they are formed
    without the loss scale: for fp16 training take the statistics.

    Args:
        hidden: [..., H]; with `sequence_parallel` this rank's slice of the first dimension.
        weight: [V/T, H], in the dtype of `hidden`, of an output layer without bias.
        target: [...], integer ids in the whole vocabulary, of all tokens on every rank.
        config: objective, gamma, sigma, normalization, ...; None is the published setting.
        group: the tensor-parallel group, of shards equally wide; None where the weight is whole.
        loss_mask: [...], in the target's shape; each token's weight is multiplied by it.
        data_parallel_group: ranks that hold other tokens of the same micro-batch step.
        vocab_size: the true size of the whole vocabulary, where the shards are padded.
        ignore_index: the target of tokens that take no part.
        sequence_parallel: gather `hidden` over `group`, scatter its gradient.
        into_main_grad: add the weight's gradient to `weight.main_grad` where that exists.
        samples, token_input: as `infoentropy_loss`.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states), equal on all ranks of both groups; gradients as
        `infoentropy_loss`.

    Raises:
        ValueError, RuntimeError: as `linear_vocab_parallel_statistics`; a mask of another shape.
    """
    config = PUBLISHED if config is None else config
    target, mask = layout.leave_out_masked(
        target, loss_mask, ignore_index, statistics_dtype(hidden)
    )
    arguments = layout.arguments_of(
        config, group=group, vocab_size=vocab_size, ignore_index=ignore_index
    )
    layer: dict[str, Any] = {
        "chunk_tokens": config.chunk_tokens,
        "sequence_parallel": sequence_parallel,
        "into_main_grad": into_main_grad,
        "skip_masked": config.skip_masked,
    }
    # Weights that compare tokens are formed of all of them at once, as without chunks.
    by_chunk = config.detach_weight and not config.compares_tokens
    if by_chunk or not config.is_weighted:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=CANNOT_BE_CAPTURED)
        hidden_LH, weight, taken, settings = prepare_linear(
            hidden, weight, target, arguments, **layer
        )
        tokens, differentiate = (
            Tokens(taken.take(target), taken.take(mask)),
            torch.is_grad_enabled(),
        )
        sums = LinearSums.apply(hidden_LH, weight, tokens, settings, config, differentiate)
        return weighted_mean(TokenSums(*sums), config, data_parallel_group)
    statistics = linear_vocab_parallel_statistics(
        hidden, weight, target, **arguments._asdict(), **layer
    )
    batch = token_batch(
        statistics,
        mask,
        target=target,
        samples=samples,
        token_input=token_input,
        data_parallel_group=data_parallel_group,
    )
    return objective_of(statistics, batch, config)
