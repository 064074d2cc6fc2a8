"""Door 1: from the last hidden states to per-token statistics, inside the model's forward.

What follows from them, every token's weight and the micro-batch's alpha, is the same for both doors
(`weigh_tokens`).

GPTModel of megatron-core >= 0.19 calls an output processor in place of its own output layer and
loss. Ours applies the output layer itself, so that the logits are known to have no other reader and
their gradient may be written over them: the peak is one tensor of logits, not two. With
`fused_linear` it takes the layer's weight, and no tensor of logits exists at all.

HybridModel has no such argument: there the same statistics take the place of its loss while its
forward runs (`statistics_as_loss`). Multi-token-prediction heads of both are handed the same method
(`loss_of_heads`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.config import InfoEntropyConfig
from megatron_infoentropy.loss import TokenStatistics
from megatron_infoentropy.loss.collective import Group, sum_over_group, world_and_rank
from megatron_infoentropy.loss.layout import arguments_of, as_ids
from megatron_infoentropy.loss.linear import linear_vocab_parallel_statistics
from megatron_infoentropy.loss.objective import (
    TokenSums,
    alpha,
    configured_statistics,
    reduce_sums,
    token_sums,
)
from megatron_infoentropy.loss.token_batch import token_batch
from megatron_infoentropy.loss.weighting import token_loss, token_weight

IGNORED = -100

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (labels, logits) -> [batch, sequence]


@dataclass(frozen=True)
class OutputSettings:
    """The settings of the processor, besides what Megatron hands it."""

    config: InfoEntropyConfig
    group: Group | None  # tensor-parallel
    vocab_size: int | None  # true size: padding of the table stays out of the softmax


def statistics_processor(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    runtime_gather_output: bool | None,
    scale_logits: Any,
    context: OutputSettings,
    **_: Any,
) -> torch.Tensor:
    """[K, batch, sequence] fp32: the K parts of `TokenStatistics` that the configuration needs.

    hidden_states: [sequence, batch, hidden]; labels and loss_mask: [batch, sequence]. Tokens with
    loss_mask 0 are never looked at; their results are 0.
    """
    if runtime_gather_output:
        raise ValueError(
            "the InfoEntropy output processor takes vocabulary-sharded logits and was asked to "
            "gather them; it is for training and validation, call the model without it otherwise"
        )
    target = masked_target(labels, loss_mask)
    if context.config.fused_linear:
        # Here --overlap-param-gather waits for the weight to arrive, and nothing else would.
        for hook in output_layer._forward_pre_hooks.values():
            hook(output_layer, (hidden_states,))
        return _fused_statistics(hidden_states, output_layer, output_weight, target, context)
    logits, _bias = output_layer(hidden_states, weight=output_weight)
    return statistics_of_logits(scale_logits(logits), output_layer, target, context)


@contextmanager
def loss_of_heads(module: Any, loss: Loss) -> Iterator[None]:
    """While it lasts, the prediction heads of a model that takes output processors have this loss.

    The model's own method has no other caller then.
    """
    module.compute_language_model_loss = loss
    try:
        yield
    finally:
        del module.compute_language_model_loss


@contextmanager
def statistics_as_loss(
    module: Any, loss_mask: torch.Tensor | None, context: OutputSettings, head_loss: Loss | None
) -> Iterator[None]:
    """While it lasts, the forward of a model that takes labels returns what the processor returns.

    For a model without output processors. Its own forward hands the logits to its
    `compute_language_model_loss` and reads them no more. With `fused_linear` its output layer hands
    on the hidden states instead, and the loss takes the weight. Prediction heads come before, by
    the same layer and method: they get their logits, and `head_loss` or else the model's own.

    Raises:
        RuntimeError: the forward made its loss without `compute_language_model_loss`.
    """
    if not module.post_process:  # another pipeline stage has the output layer
        yield
        return
    layer, output_weight = module.output_layer, None
    forward, head_loss = layer.forward, head_loss or module.compute_language_model_loss
    logits_of_heads = losses_of_heads = module.config.mtp_num_layers if module.mtp_process else 0
    called = False

    def hand_on(
        hidden_states: torch.Tensor, weight: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, None]:
        nonlocal output_weight, logits_of_heads
        if logits_of_heads:
            logits_of_heads -= 1
            logits: tuple[torch.Tensor, None] = forward(hidden_states, weight=weight, **options)
            return logits
        output_weight = weight
        return hidden_states, None

    def statistics(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        nonlocal called, losses_of_heads
        if losses_of_heads:
            losses_of_heads -= 1
            return head_loss(labels, logits)
        called = True
        target = masked_target(labels, loss_mask)
        if context.config.fused_linear:
            return _fused_statistics(logits, layer, output_weight, target, context)
        return statistics_of_logits(logits, layer, target, context)

    module.compute_language_model_loss = statistics
    if context.config.fused_linear:
        layer.forward = hand_on
    try:
        yield
    finally:
        del module.compute_language_model_loss
        if context.config.fused_linear:
            del layer.forward
    if not called:
        raise RuntimeError(
            f"{type(module).__name__}.forward computed its loss without "
            "compute_language_model_loss, past the InfoEntropy loss: use a tested version of "
            "megatron-core"
        )


def masked_target(labels: torch.Tensor, loss_mask: torch.Tensor | None) -> torch.Tensor:
    """[sequence, batch], as the logits are: the labels, `IGNORED` where the mask is 0."""
    if loss_mask is not None:
        labels = as_ids(labels).masked_fill(loss_mask == 0, IGNORED)
    return labels.transpose(0, 1)


def statistics_of_logits(
    logits: torch.Tensor, output_layer: Any, target: torch.Tensor, context: OutputSettings
) -> torch.Tensor:
    """[K, batch, sequence] of logits that nothing else reads."""
    expected = getattr(output_layer, "output_size_per_partition", None)
    check_sharding(logits.shape[-1], expected, context.group)
    statistics = configured_statistics(
        logits,
        target,
        context.config,
        group=context.group,
        vocab_size=context.vocab_size,
        ignore_index=IGNORED,
        inplace_backward=logits.requires_grad and not logits.is_leaf,
    )
    return pack(statistics).transpose(1, 2).contiguous()


def _fused_statistics(
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    target: torch.Tensor,
    context: OutputSettings,
) -> torch.Tensor:
    """[K, batch, sequence] of an output layer that is not called.

    It is Megatron's ColumnParallelLinear, without a bias.

    `--use-mup`, which would scale the logits, is refused by `check_megatron_args`.
    """
    if output_layer.bias is not None or output_layer.disable_grad_reduce:
        raise ValueError(
            "--infoentropy-fused-linear takes an output layer without bias whose input gradient is "
            f"summed over tensor-parallel ranks, got {output_layer}; leave the flag out"
        )
    arguments = arguments_of(
        context.config,
        group=context.group,
        vocab_size=context.vocab_size,
        ignore_index=IGNORED,
    )
    statistics = linear_vocab_parallel_statistics(
        hidden_states,
        output_layer.weight if output_weight is None else output_weight,
        target,
        chunk_tokens=context.config.chunk_tokens,
        sequence_parallel=output_layer.sequence_parallel,
        into_main_grad=output_layer.gradient_accumulation_fusion,
        skip_masked=context.config.skip_masked,
        **arguments._asdict(),
    )
    return pack(statistics).transpose(1, 2).contiguous()


def pack(statistics: TokenStatistics) -> torch.Tensor:
    """One tensor of all results, since that is what a pipeline schedule carries on."""
    parts = [part for part in statistics if part is not None]
    return torch.stack([part.to(parts[0].dtype) for part in parts])


def unpack(output: torch.Tensor, config: InfoEntropyConfig) -> TokenStatistics:
    """The reverse of `pack`; `is_top` comes back as 0 and 1."""
    return TokenStatistics.of_present(
        output.float().unbind(0),
        uniform=config.label_smoothing > 0,
        squares=config.needs_sum_p_squared,
    )


def check_sharding(columns: int, expected: int | None, group: Group | None) -> None:
    """Gathered logits, taken for a shard, would give a loss that is off by ln(TP) and look fine.

    expected: columns of the output layer's share of the vocabulary; None where it is not known.
    """
    if expected is not None and columns != expected:
        ranks, _ = world_and_rank(group)
        raise ValueError(
            f"expected vocabulary-sharded logits with {expected} columns ({ranks} tensor-parallel "
            f"ranks), got {columns}; build the model with parallel_output=True and call it without "
            "runtime_gather_output"
        )


class Groups(NamedTuple):
    """The process groups over which a micro-batch's tokens are spread."""

    context_parallel: Group | None
    data_parallel: Group | None


class WeightedTokens(NamedTuple):
    """The tokens of a micro-batch, whose objective is the sum of mask alpha w l."""

    mask: torch.Tensor
    weight: torch.Tensor
    loss: torch.Tensor
    sums: TokenSums  # on this rank
    alpha: torch.Tensor  # a scalar; 1 where weights need none here


def weigh_tokens(
    statistics: TokenStatistics,
    mask: torch.Tensor,
    config: InfoEntropyConfig,
    groups: Groups,
    *,
    target: torch.Tensor | None,
    samples: int,
    normalizations: tuple[str, ...] = ("paper",),
) -> WeightedTokens:
    """Weigh the tokens of one micro-batch, all tensors of one shape.

    Ranks that share a micro-batch's sequences (context parallel) count as one.

    normalizations: those whose alpha is one of the micro-batch.
    """
    tokens = token_batch(
        statistics,
        mask,
        target=target,
        samples=samples,
        data_parallel_group=groups.data_parallel,
    )
    weight, loss = token_weight(tokens, config), token_loss(statistics, config)
    sums = token_sums(loss.detach(), weight.detach(), tokens.mask)
    factor = torch.ones_like(sums.tokens)
    if config.normalization in normalizations and config.is_weighted:  # else 1: no collective
        whole = TokenSums(*sum_over_group(torch.stack(sums), groups.context_parallel).unbind(0))
        factor = alpha(reduce_sums(whole, groups.data_parallel), config.normalization)
    return WeightedTokens(tokens.mask, weight, loss, sums, factor)
