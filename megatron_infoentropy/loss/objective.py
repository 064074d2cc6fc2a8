"""One scalar from per-token cross entropies, weights and a mask.

With w the weights, m the mask, r the data-parallel ranks (all sums over valid tokens):

    paper    alpha sum(w l) / sum(m),    alpha = mean over r of sum_r(m) / sum_r(w)
    global   sum(w l) / sum(w)
    none     sum(w l) / sum(m)

l is a token's cross entropy, unless smoothing or a regulariser is asked for (`weighting`). With
gamma 0 all three are its mean. "paper" is the published objective over valid tokens; the published
code also counts ignored tokens, and clamps probabilities at 1e-8.
"""

from typing import NamedTuple

import torch

from megatron_infoentropy.config import InfoEntropyConfig, Normalization
from megatron_infoentropy.kernels.contract import statistics_dtype
from megatron_infoentropy.loss.collective import Group, sum_over_group
from megatron_infoentropy.loss.layout import arguments_of, leave_out_masked
from megatron_infoentropy.loss.statistics import TokenStatistics, vocab_parallel_statistics
from megatron_infoentropy.loss.token_batch import TokenBatch, token_batch
from megatron_infoentropy.loss.weighting import LEAST_WEIGHT, token_loss, token_weight

# Made here once: torch.compile cannot follow what the configuration checks when it is made.
PUBLISHED = InfoEntropyConfig()


class TokenSums(NamedTuple):
    """Sums over the valid tokens of one micro-batch on one rank; scalars."""

    weighted_loss: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor


class GroupSums(NamedTuple):
    """The same over the ranks of a group, and what "paper" averages over them; scalars."""

    weighted_loss: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor
    inverse_means: torch.Tensor  # sum over ranks of 1 / mean(w)
    ranks: torch.Tensor  # that had a token with a weight


def infoentropy_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    config: InfoEntropyConfig | None = None,
    *,
    group: Group | None = None,
    loss_mask: torch.Tensor | None = None,
    data_parallel_group: Group | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    samples: int = 0,
    token_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean weighted cross entropy of a micro-batch: a scalar to call `.backward()` on.

    Args:
        logits: [..., V/T], this rank's vocab shard.
        target: [...], integer ids in the whole vocabulary.
        config: objective, gamma, sigma, normalization, ...; None is the published setting.
        group: the tensor-parallel group, of shards equally wide; None where the logits are whole.
        loss_mask: [...], in the target's shape, 0 to 1; each token's weight is multiplied by it,
            and means are over its sum. Tokens with 0 take no part.
        data_parallel_group: ranks that hold other tokens of the same micro-batch step; the mean
            is over all their valid tokens.
        vocab_size: the true size of the whole vocabulary, where the shards are padded.
        ignore_index: the target of tokens that take no part.
        inplace_backward: write the gradient over the logits. More on these five is in
            `vocab_parallel_statistics`.
        samples: training samples consumed before this step, and
        token_input: [...], numbers of your own, both for a weighting that asks for them
            (`TokenBatch`).

    Returns:
        Scalar, fp32 (fp64 for fp64 logits), equal on all ranks of both groups. *Averaging*
        parameter gradients over `data_parallel_group`, as data-parallel wrappers do, gives the
        gradient of this value. With no valid token anywhere it is 0, with zero gradients.

    Raises:
        ValueError, RuntimeError: as `vocab_parallel_statistics`; a mask of another shape.
    """
    config = PUBLISHED if config is None else config
    target, mask = leave_out_masked(target, loss_mask, ignore_index, statistics_dtype(logits))
    statistics = configured_statistics(
        logits,
        target,
        config,
        group=group,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
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


def objective_of(
    statistics: TokenStatistics, batch: TokenBatch, config: InfoEntropyConfig
) -> torch.Tensor:
    """Return the scalar objective of a micro-batch, all its tokens weighted together."""
    loss, weight = token_loss(statistics, config), token_weight(batch, config)
    sums = token_sums(loss, weight, batch.mask)
    return weighted_mean(sums, config, batch.data_parallel_group)


def weighted_mean(
    sums: TokenSums, config: InfoEntropyConfig, data_parallel_group: Group | None
) -> torch.Tensor:
    """Return the scalar objective of all ranks of a data-parallel group."""
    whole = reduce_sums(sums, data_parallel_group)
    mean = whole.weighted_loss / torch.where(whole.tokens > 0, whole.tokens, 1)
    return mean * alpha(whole, config.normalization)


def configured_statistics(
    logits: torch.Tensor,
    target: torch.Tensor,
    config: InfoEntropyConfig,
    *,
    group: Group | None,
    vocab_size: int | None,
    ignore_index: int,
    inplace_backward: bool = False,
) -> TokenStatistics:
    """`vocab_parallel_statistics` with what a configuration asks of it."""
    if config.fused_linear:
        raise ValueError(
            "fused_linear needs the hidden states and the output weight, not logits: use "
            "linear_infoentropy_loss, or the trainer (--infoentropy-fused-linear)"
        )
    arguments = arguments_of(config, group=group, vocab_size=vocab_size, ignore_index=ignore_index)
    return vocab_parallel_statistics(
        logits, target, inplace_backward=inplace_backward, **arguments._asdict()
    )


def token_sums(loss: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> TokenSums:
    """Return one rank's sums; `mask`, in the shape of `loss`, is 0 where a token takes no part."""
    masked_weight = mask * weight
    return TokenSums((masked_weight * loss).sum(), masked_weight.sum(), mask.sum())


def reduce_sums(sums: TokenSums, group: Group | None) -> GroupSums:
    """The sums over a data-parallel group: one all-reduce of 20 bytes, differentiable."""
    # A rank without a weight has no mean to invert: it joins the sum and is left out of the mean.
    takes_part = sums.weight != 0  # also where it is NaN, which must not vanish here
    inverse_mean = torch.where(takes_part, _inverse_mean(sums.tokens, sums.weight), 0)
    packed = torch.stack([*sums, inverse_mean, takes_part.to(inverse_mean.dtype)])
    return GroupSums(*sum_over_group(packed, group).unbind(0))


def alpha(sums: GroupSums, normalization: Normalization) -> torch.Tensor:
    """The factor that makes weights comparable: the objective is alpha sum(w l) / sum(m)."""
    if normalization == "paper":
        return sums.inverse_means / sums.ranks.clamp_min(1)
    if normalization == "global":
        return _inverse_mean(sums.tokens, sums.weight)
    return torch.ones_like(sums.tokens)


def _inverse_mean(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1/mean(w), finite: where weights sum to less, the loss goes to 0 with them."""
    divisor = weight.clamp_min(LEAST_WEIGHT)
    if divisor.requires_grad:  # whose gradient's 1/sum(w)^2 leaves the range of fp32
        divisor = divisor.double()
    return (tokens / divisor).to(tokens.dtype)
