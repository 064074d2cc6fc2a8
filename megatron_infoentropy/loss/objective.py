"""One scalar from per-token cross entropies, weights and a mask.

With w the weights, m the mask, r the data-parallel ranks (all sums over valid tokens):

    paper    alpha sum(w ce) / sum(m),    alpha = mean over r of sum_r(m) / sum_r(w)
    global   sum(w ce) / sum(w)
    none     sum(w ce) / sum(m)

With gamma 0 all three are the mean cross entropy. "paper" is the published objective over valid
tokens; the published code also counts ignored tokens, and clamps probabilities at 1e-8.
"""

from typing import NamedTuple

import torch

from megatron_infoentropy.config import InfoEntropyConfig, Normalization
from megatron_infoentropy.loss.collective import Group, sum_over_group
from megatron_infoentropy.loss.statistics import vocab_parallel_statistics
from megatron_infoentropy.loss.weighting import token_weight


class TokenSums(NamedTuple):
    """Sums over the valid tokens of one micro-batch on one rank; scalars."""

    weighted_ce: torch.Tensor
    weight: torch.Tensor
    count: torch.Tensor


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
) -> torch.Tensor:
    """The mean weighted cross entropy of a micro-batch: a scalar to call `.backward()` on.

    Args:
        logits, target, group, vocab_size, ignore_index, inplace_backward: as in
            `vocab_parallel_statistics`.
        config: objective, gamma, sigma, normalization, ...; None is the published setting.
        loss_mask: [...], in the target's shape; each token's weight is multiplied by it. Tokens
            with 0 take no part.
        data_parallel_group: ranks that hold other tokens of the same micro-batch step.

    Returns:
        Scalar, fp32 (fp64 for fp64 logits), equal on all ranks of both groups. *Averaging*
        parameter gradients over `data_parallel_group`, as data-parallel wrappers do, gives the
        gradient of this value. With no valid token anywhere it is 0, with zero gradients.

    Raises:
        ValueError, RuntimeError: as `vocab_parallel_statistics`; a mask of another shape.
    """
    config = InfoEntropyConfig() if config is None else config
    if loss_mask is not None and loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask must have the target's shape {list(target.shape)}, got "
            f"{list(loss_mask.shape)}"
        )
    if loss_mask is not None:
        # Masked tokens are ignored rather than multiplied by 0: 0 * NaN would be NaN.
        target = target.masked_fill(loss_mask == 0, ignore_index)
    ce, entropy, _ = vocab_parallel_statistics(
        logits,
        target,
        group=group,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        backend=config.backend,
        collective=config.collective,
        inplace_backward=inplace_backward,
    )
    mask = (target != ignore_index).to(ce.dtype)
    if loss_mask is not None:
        mask = mask * loss_mask
    sums = token_sums(ce, token_weight(ce, entropy, config), mask)
    return _mean_over_group(sums, config.normalization, data_parallel_group)


def token_sums(ce: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> TokenSums:
    """What one rank contributes; `mask` has the shape of `ce`, 0 where a token takes no part."""
    masked_weight = mask * weight
    return TokenSums((masked_weight * ce).sum(), masked_weight.sum(), mask.sum())


def inverse_mean_weight(sums: TokenSums) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 / mean(w) of this rank, 1) or (0, 0) where no token has a weight: left out of the mean."""
    takes_part = sums.weight > 0
    inverse = torch.where(takes_part, sums.count / torch.where(takes_part, sums.weight, 1), 0)
    return inverse, takes_part.to(inverse.dtype)


def _mean_over_group(
    sums: TokenSums, normalization: Normalization, group: Group | None
) -> torch.Tensor:
    packed = sum_over_group(torch.stack([*sums, *inverse_mean_weight(sums)]), group)
    weighted_ce, weight, count, inverse_means, ranks = packed.unbind(0)
    if normalization == "global":
        return weighted_ce / torch.where(weight > 0, weight, 1)
    mean = weighted_ce / torch.where(count > 0, count, 1)
    if normalization == "paper":
        return mean * inverse_means / ranks.clamp_min(1)
    return mean
