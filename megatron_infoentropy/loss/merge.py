"""Folds the statistics of T vocabulary shards into those of the whole row. Pure arithmetic.

Every rank folds the same numbers in the same order, so every rank gets the same bits. Each term is
non-negative, so nothing cancels. Rows are those of `kernels.contract`, R = 4 or 5 of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_infoentropy.kernels.contract import DISTANCE, MAX, SPREAD, TAIL, TARGET


class RowStatistics(NamedTuple):
    """Of whole rows; each [N]."""

    maximum: torch.Tensor  # M
    tail: torch.Tensor  # R = Z - 1, Z = sum e^(x - M)
    spread: torch.Tensor  # U = sum e^(x - M) (M - x)
    target_logit: torch.Tensor  # x_y
    distance: torch.Tensor | None  # D = sum (M - x), where it was asked for


def merge_shards(statistics_TRN: torch.Tensor, columns: Sequence[int]) -> RowStatistics:
    """The statistics of all shards, in rank order, folded into one.

    columns: how many columns of each shard take part.
    """
    m_TN, tail_TN, spread_TN, target_TN = statistics_TRN[:, : TARGET + 1].unbind(1)
    distance_TN = statistics_TRN[:, DISTANCE] if statistics_TRN.shape[1] > DISTANCE else None
    if len(statistics_TRN) == 1:
        distance = None if distance_TN is None else distance_TN[0]
        return RowStatistics(m_TN[0], tail_TN[0], spread_TN[0], target_TN[0], distance)
    maximum, top = m_TN.max(0)
    # Only the first shard that holds the maximum keeps it out of its tail; on every other shard
    # the shard's own maximum is part of the mass beside it.
    rank = torch.arange(len(m_TN), device=m_TN.device).unsqueeze(-1)
    tail, spread = rescale(m_TN, tail_TN, spread_TN, maximum)
    tail = torch.where(rank == top, tail_TN, tail)
    distance = None
    if distance_TN is not None:
        moved = [
            _moved_distance(m_TN[r], distance_TN[r], maximum, count)
            for r, count in enumerate(columns)
        ]
        distance = torch.stack(moved).sum(0)
    return RowStatistics(maximum, tail.sum(0), spread.sum(0), target_TN.sum(0), distance)


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


def _moved_distance(
    m: torch.Tensor, distance: torch.Tensor, maximum: torch.Tensor, columns: int
) -> torch.Tensor:
    """A shard's sum of distances, to the maximum of all shards instead of to its own."""
    return distance + (maximum - m) * columns if columns else distance


def pack_for_sum(statistics_RN: torch.Tensor, maximum: torch.Tensor, columns: int) -> torch.Tensor:
    """What this shard adds to the two-step form, once the MAX over ranks is known: [R, N]."""
    m, tail, spread, target = (statistics_RN[row] for row in (MAX, TAIL, SPREAD, TARGET))
    mass, moved_spread = rescale(m, tail, spread, maximum)
    is_top = m == maximum
    packed = [torch.where(is_top, tail, mass), is_top.to(tail.dtype), moved_spread, target]
    if len(statistics_RN) > DISTANCE:
        packed.append(_moved_distance(m, statistics_RN[DISTANCE], maximum, columns))
    return torch.stack(packed)


def unpack_sum(sum_RN: torch.Tensor, maximum: torch.Tensor) -> RowStatistics:
    """The whole row's statistics from the sum over ranks of `pack_for_sum`."""
    tail, tops, spread, target = sum_RN[: TARGET + 1].unbind(0)
    distance = sum_RN[DISTANCE] if len(sum_RN) > DISTANCE else None
    return RowStatistics(maximum, tail + (tops - 1), spread, target, distance)
