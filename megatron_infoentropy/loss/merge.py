"""Folds the statistics of T vocabulary shards into those of the whole row. Pure arithmetic.

Every rank folds the same numbers in the same order, so every rank gets the same bits. Each term is
non-negative, so nothing cancels. Rows are those of `kernels.contract`.
"""

from typing import NamedTuple

import torch

from megatron_infoentropy.kernels.contract import MAX, SPREAD, TAIL, TARGET


class RowStatistics(NamedTuple):
    """Of whole rows; each [N]."""

    maximum: torch.Tensor  # M
    tail: torch.Tensor  # R = Z - 1, Z = sum e^(x - M)
    spread: torch.Tensor  # U = sum e^(x - M) (M - x)
    target_logit: torch.Tensor  # x_y


def merge_shards(statistics_T4N: torch.Tensor) -> RowStatistics:
    """The statistics of all shards, in rank order, folded into one."""
    m_TN, tail_TN, spread_TN, target_TN = statistics_T4N.unbind(1)
    if len(statistics_T4N) == 1:
        return RowStatistics(m_TN[0], tail_TN[0], spread_TN[0], target_TN[0])
    maximum, top = m_TN.max(0)
    # Only the first shard that holds the maximum keeps it out of its tail; on every other shard
    # the shard's own maximum is part of the mass beside it.
    rank = torch.arange(len(m_TN), device=m_TN.device).unsqueeze(-1)
    tail, spread = rescale(m_TN, tail_TN, spread_TN, maximum)
    tail = torch.where(rank == top, tail_TN, tail)
    return RowStatistics(maximum, tail.sum(0), spread.sum(0), target_TN.sum(0))


def rescale(
    m: torch.Tensor, tail: torch.Tensor, spread: torch.Tensor, maximum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A shard's whole mass and spread, relative to the maximum of all shards instead of its own."""
    empty = m == -torch.inf  # a shard of -inf alone: no mass, and m - maximum may be undefined
    shift = torch.where(empty, 0, m - maximum)
    scale = torch.where(empty, 0, shift.exp())
    mass = 1 + tail
    # A shard far below the maximum has scale 0 and shift -inf at worst: 0, not 0 * inf.
    moved = torch.where(scale == 0, 0, shift * mass)
    return scale * mass, scale * (spread - moved)


def pack_for_sum(statistics_4N: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """This shard's [4, N] of the two-step form: what is summed once the MAX over ranks is known."""
    m, tail, spread, target = (statistics_4N[row] for row in (MAX, TAIL, SPREAD, TARGET))
    mass, moved_spread = rescale(m, tail, spread, maximum)
    is_top = m == maximum
    return torch.stack(
        [torch.where(is_top, tail, mass), is_top.to(tail.dtype), moved_spread, target]
    )


def unpack_sum(sum_4N: torch.Tensor, maximum: torch.Tensor) -> RowStatistics:
    """The whole row's statistics from the sum over ranks of `pack_for_sum`."""
    tail, tops, spread, target = sum_4N.unbind(0)
    return RowStatistics(maximum, tail + (tops - 1), spread, target)
