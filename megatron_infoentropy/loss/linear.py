"""The output layer and the loss in one: hidden states and output weight in, no logits in full.

Two functions. `linear_vocab_parallel_statistics` gives per-token statistics, differentiable for any
upstream gradient; it makes the logits twice. `linear_infoentropy_loss` gives the scalar objective
and, where its weights are detached, makes them once. Both work through the tokens in chunks: peak
memory is one chunk of logits (two while statistics are gathered) beside the gradients.

On each rank of a tensor-parallel group of T: weight [V/T, H], a shard of the vocabulary in rank
order; hidden states of all tokens, equal on all ranks, or with `sequence_parallel` this rank's 1/T
of the first dimension. The gradient by the hidden states is summed over the group here (all-reduce,
or reduce-scatter), as Megatron's ColumnParallelLinear does: the caller must not do it again.
"""

from typing import Any

import torch

from megatron_infoentropy.config import Backend, Collective, InfoEntropyConfig
from megatron_infoentropy.kernels.contract import statistics_dtype
from megatron_infoentropy.loss.collective import Group
from megatron_infoentropy.loss.layout import leave_out_masked, make_options
from megatron_infoentropy.loss.linear_inputs import LinearRequest, prepare_linear
from megatron_infoentropy.loss.linear_objective import LinearSums, Tokens
from megatron_infoentropy.loss.linear_statistics import LinearStatistics
from megatron_infoentropy.loss.objective import (
    PUBLISHED,
    TokenSums,
    objective_sums,
    weighted_mean,
)
from megatron_infoentropy.loss.statistics import TokenStatistics

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
    temperature: float = 1.0,
    uniform_cross_entropy: bool = False,
    backend: Backend = "auto",
    collective: Collective = "gather",
    chunk_tokens: int = 4096,
    sequence_parallel: bool = False,
    into_main_grad: bool = False,
) -> TokenStatistics:
    """`vocab_parallel_statistics` of the logits hidden @ weight^T, which never exist in full.

    Args:
        hidden: [..., H], fp32, bf16, fp16 or fp64; with `sequence_parallel` this rank's slice of
            the first dimension.
        weight: [V/T, H], in the dtype of `hidden`, of an output layer without bias.
        target: [...], integer ids in the whole vocabulary, of all tokens on every rank.
        group: the tensor-parallel group; None where the weight is whole.
        vocab_size: the true size of the whole vocabulary, where the shards are padded.
        ignore_index: the target of tokens that take no part.
        softcap: logits become softcap * tanh(z / softcap).
        temperature: logits are divided by it.
        uniform_cross_entropy: also return -mean ln p, which label smoothing needs.
        backend: which kernels run.
        collective: how the shards' statistics are joined; `vocab_parallel_statistics` has more on
            these seven.
        chunk_tokens: tokens whose logits are made at a time; results depend on it only as far as
            matrix products round differently.
        sequence_parallel: gather `hidden` over `group`, scatter its gradient.
        into_main_grad: add the weight's gradient to `weight.main_grad` where that exists, and
            return to autograd what Megatron's gradient accumulation fusion returns.

    Returns:
        TokenStatistics in the target's shape, fp32 (fp64 for fp64 hidden states).

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together; targets as in
            `vocab_parallel_statistics`.
        RuntimeError: the named backend cannot run on such logits.
    """
    request = LinearRequest(
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        options=make_options(softcap, temperature, uniform_cross_entropy),
        group=group,
        backend=backend,
        collective=collective,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
        into_main_grad=into_main_grad,
    )
    hidden_LH, weight, target_N, settings = prepare_linear(hidden, weight, target, request)
    results: Any = LinearStatistics.apply(hidden_LH, weight, target_N, settings)
    return TokenStatistics(*(result.view(target.shape) for result in results))


def configured_linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    config: InfoEntropyConfig,
    *,
    group: Group | None,
    vocab_size: int | None,
    ignore_index: int,
    sequence_parallel: bool,
    into_main_grad: bool,
) -> TokenStatistics:
    """`linear_vocab_parallel_statistics` with what a configuration asks of it."""
    config.require_constant_gamma()
    return linear_vocab_parallel_statistics(
        hidden,
        weight,
        target,
        group=group,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        softcap=config.softcap or None,
        temperature=config.temperature,
        uniform_cross_entropy=config.label_smoothing > 0,
        backend=config.backend,
        collective=config.collective,
        chunk_tokens=config.chunk_tokens,
        sequence_parallel=sequence_parallel,
        into_main_grad=into_main_grad,
    )


def linear_infoentropy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    loss_mask: torch.Tensor | None = None,
    config: InfoEntropyConfig | None = None,
    *,
    group: Group | None = None,
    data_parallel_group: Group | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    sequence_parallel: bool = False,
    into_main_grad: bool = False,
) -> torch.Tensor:
    """`infoentropy_loss` of the logits hidden @ weight^T, which never exist in full.

    With detached weights (`config.detach_weight`, the default) gradients are formed in the forward
    pass and scaled in the backward pass, which then can run once, and which torch.compile cannot
    capture whole; with attached ones, and with a custom weighting, which sees all tokens at once,
    this is `linear_vocab_parallel_statistics` and ordinary PyTorch. Formed first and scaled later,
    16-bit gradients of `hidden` are rounded twice, and in fp16 they are formed without the loss
    scale: for fp16 training take the statistics.

    Args:
        hidden: [..., H]; with `sequence_parallel` this rank's slice of the first dimension.
        weight: [V/T, H], in the dtype of `hidden`, of an output layer without bias.
        target: [...], integer ids in the whole vocabulary, of all tokens on every rank.
        loss_mask: [...], in the target's shape; each token's weight is multiplied by it.
        config: objective, gamma, sigma, normalization, ...; None is the published setting.
        group: the tensor-parallel group; None where the weight is whole.
        data_parallel_group: ranks that hold other tokens of the same micro-batch step.
        vocab_size: the true size of the whole vocabulary, where the shards are padded.
        ignore_index: the target of tokens that take no part.
        sequence_parallel: gather `hidden` over `group`, scatter its gradient.
        into_main_grad: add the weight's gradient to `weight.main_grad` where that exists.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states), equal on all ranks of both groups; gradients as
        `infoentropy_loss`.

    Raises:
        ValueError, RuntimeError: as `linear_vocab_parallel_statistics`; a mask of another shape.
    """
    config = PUBLISHED if config is None else config
    config.require_constant_gamma()
    target, mask = leave_out_masked(target, loss_mask, ignore_index, statistics_dtype(hidden))
    request = LinearRequest(
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        options=make_options(
            config.softcap or None, config.temperature, config.label_smoothing > 0
        ),
        group=group,
        backend=config.backend,
        collective=config.collective,
        chunk_tokens=config.chunk_tokens,
        sequence_parallel=sequence_parallel,
        into_main_grad=into_main_grad,
    )
    hidden_LH, weight, target_N, settings = prepare_linear(hidden, weight, target, request)
    # A custom function may compare tokens: it is shown all of them at once, as without chunks.
    by_chunk = config.detach_weight and config.objective != "custom"
    if by_chunk or not config.is_weighted:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=CANNOT_BE_CAPTURED)
        tokens, differentiate = Tokens(target_N, mask.reshape(-1)), torch.is_grad_enabled()
        sums = TokenSums(
            *LinearSums.apply(hidden_LH, weight, tokens, settings, config, differentiate)
        )
    else:
        results: Any = LinearStatistics.apply(hidden_LH, weight, target_N, settings)
        statistics = TokenStatistics(*(result.view(target.shape) for result in results))
        sums = objective_sums(statistics, config, mask)
    return weighted_mean(sums, config, data_parallel_group)
