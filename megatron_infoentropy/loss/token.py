"""Per-token numbers from a row's folded statistics, and the kernel's coefficients from upstream
gradients. Pure arithmetic on [N]; the formulas stand in `loss.statistics`.
"""

from typing import NamedTuple

import torch

from megatron_infoentropy.kernels.contract import Options
from megatron_infoentropy.loss.merge import RowStatistics


class TokenResults(NamedTuple):
    """Of the predicted distribution of every token; nats; ignored tokens have 0. Each [N]."""

    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    is_top: torch.Tensor  # bool: no logit is above the target's
    uniform_cross_entropy: torch.Tensor | None  # with options.distance


class Saved(NamedTuple):
    """What the backward pass needs of every token besides its logits; each [N]."""

    maximum: torch.Tensor
    z: torch.Tensor
    mean_distance: torch.Tensor  # Ubar = U / Z
    cross_entropy: torch.Tensor
    entropy: torch.Tensor


class Upstream(NamedTuple):
    """Gradients of the objective by each result; None where it does not depend on one. Each [N]."""

    cross_entropy: torch.Tensor | None
    entropy: torch.Tensor | None
    logsumexp: torch.Tensor | None
    uniform_cross_entropy: torch.Tensor | None


def token_results(
    row: RowStatistics,
    target_N: torch.Tensor,
    vocabulary: int,
    ignore_index: int,
    options: Options,
) -> tuple[TokenResults, Saved]:
    """The results, and what to keep for `coefficients`."""
    ignored = target_N == ignore_index
    z = (1 + row.tail).masked_fill(ignored, 1)
    log_z, mean_distance = row.tail.log1p(), row.spread / z
    ce = (row.maximum - row.target_logit) + log_z
    # A target that no shard owns must not look like a very good prediction.
    ce = ce.masked_fill((target_N < 0) | (target_N >= vocabulary), torch.nan)
    ce = ce.masked_fill(ignored, 0)
    entropy = (log_z + mean_distance).masked_fill(ignored, 0)
    lse = (row.maximum + log_z).masked_fill(ignored, 0)
    is_top = (row.target_logit == row.maximum) & ~ignored
    uniform = None
    if row.distance is not None:
        uniform = (row.distance / vocabulary + log_z).masked_fill(ignored, 0)
    return (
        TokenResults(ce, entropy, lse, is_top, uniform),
        Saved(row.maximum, z, mean_distance, ce, entropy),
    )


def coefficients(
    upstream: Upstream, saved: Saved, vocabulary: int, options: Options
) -> torch.Tensor:
    """[R, N] for the gradient kernel: SHIFT, SCALE, SLOPE, TARGET_GRADIENT and OFFSET if asked for.

    The target's own column is formed here as g_ce (p_y - 1) = g_ce expm1(-ce), which stays exact
    for confident tokens, where p_y rounds to 1.
    """
    g_ce, g_entropy, g_lse, g_uniform = upstream
    scale = slope = own = offset = torch.zeros_like(saved.z)
    p_y = torch.exp(-saved.cross_entropy)
    if g_ce is not None:
        scale = scale + g_ce
        own = own + g_ce * torch.expm1(-saved.cross_entropy)
    if g_lse is not None:
        scale = scale + g_lse
        own = own + g_lse * p_y
    if g_entropy is not None:
        scale = scale - g_entropy * saved.mean_distance
        slope = slope - g_entropy
        # p_y (ln p_y + H): 0 for a target of probability 0, where ce is infinite.
        surprise = torch.where(p_y == 0, 0, p_y * (saved.entropy - saved.cross_entropy))
        own = own - g_entropy * surprise
    if g_uniform is not None:
        scale = scale + g_uniform
        offset = offset - g_uniform / vocabulary
        own = own + g_uniform * (p_y - 1 / vocabulary)
    scale, slope = scale / saved.z, slope / saved.z
    rows = [saved.maximum, scale, slope, own, offset][: options.rows]  # in the contract's order
    if options.temperature != 1:
        rows[1:] = [row / options.temperature for row in rows[1:]]
    return torch.stack(rows)
