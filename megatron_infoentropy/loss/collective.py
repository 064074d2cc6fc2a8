"""The collectives of the loss, each in one place, and the fold of what they bring.

The statistics of T vocabulary shards are folded into those of the whole row. Every rank folds the
same numbers in the same order, so every rank gets the same bits. Each term is non-negative, so
nothing cancels. Rows are those of `kernels.contract`, R = 4 to 6 of them.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_infoentropy.config import Collective
from megatron_infoentropy.kernels.contract import (
    DISTANCE,
    MAX,
    PLAIN,
    SPREAD,
    TAIL,
    TARGET,
    Options,
)


class RowStatistics(NamedTuple):
    """The statistics of whole rows; each [N]."""

    maximum: torch.Tensor  # M
    tail: torch.Tensor  # R = Z - 1, Z = sum e^(x - M)
    spread: torch.Tensor  # U = sum e^(x - M) (M - x)
    target_logit: torch.Tensor  # x_y
    distance: torch.Tensor | None  # D = sum (M - x), where it was asked for
    squares: torch.Tensor | None  # Q = sum e^(2 (x - M)) - 1, where it was asked for


def merge_shards(
    statistics_TRN: torch.Tensor, columns: Sequence[int], options: Options = PLAIN
) -> RowStatistics:
    """The statistics of all shards, in rank order, folded into one.

    columns: how many columns of each shard take part; options: which rows there are.
    """
    m_TN, tail_TN, spread_TN, target_TN = statistics_TRN[:, : TARGET + 1].unbind(1)
    distance_TN = statistics_TRN[:, DISTANCE] if options.distance else None
    squares_TN = statistics_TRN[:, -1] if options.squares else None
    if len(statistics_TRN) == 1:
        distance = None if distance_TN is None else distance_TN[0]
        squares = None if squares_TN is None else squares_TN[0]
        return RowStatistics(m_TN[0], tail_TN[0], spread_TN[0], target_TN[0], distance, squares)
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
    squares = None
    if squares_TN is not None:
        moved_TN = rescale_squares(m_TN, squares_TN, maximum)
        squares = torch.where(rank == top, squares_TN, moved_TN).sum(0)
    return RowStatistics(maximum, tail.sum(0), spread.sum(0), target_TN.sum(0), distance, squares)


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


def rescale_squares(m: torch.Tensor, squares: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """A shard's whole sum of squares, relative to the maximum of all shards."""
    scale = torch.where(m == -torch.inf, 0, (2 * (m - maximum)).exp())
    return scale * (1 + squares)


def _moved_distance(
    m: torch.Tensor, distance: torch.Tensor, maximum: torch.Tensor, columns: int
) -> torch.Tensor:
    """A shard's sum of distances, to the maximum of all shards instead of to its own."""
    return distance + (maximum - m) * columns if columns else distance


def pack_for_sum(
    statistics_RN: torch.Tensor, maximum: torch.Tensor, columns: int, options: Options
) -> torch.Tensor:
    """Return what this shard adds to the sum, once the MAX over ranks is known: [R, N]."""
    m, tail, spread, target = (statistics_RN[row] for row in (MAX, TAIL, SPREAD, TARGET))
    mass, moved_spread = rescale(m, tail, spread, maximum)
    is_top = m == maximum
    packed = [torch.where(is_top, tail, mass), is_top.to(tail.dtype), moved_spread, target]
    if options.distance:
        packed.append(_moved_distance(m, statistics_RN[DISTANCE], maximum, columns))
    if options.squares:
        squares = statistics_RN[-1]
        packed.append(torch.where(is_top, squares, rescale_squares(m, squares, maximum)))
    return torch.stack(packed)


def unpack_sum(sum_RN: torch.Tensor, maximum: torch.Tensor, options: Options) -> RowStatistics:
    """The whole row's statistics from the sum over ranks of `pack_for_sum`."""
    tail, tops, spread, target = sum_RN[: TARGET + 1].unbind(0)
    distance = sum_RN[DISTANCE] if options.distance else None
    squares = sum_RN[-1] + (tops - 1) if options.squares else None
    return RowStatistics(maximum, tail + (tops - 1), spread, target, distance, squares)


Group = dist.ProcessGroup


def world_and_rank(group: Group | None) -> tuple[int, int]:
    """(size, this rank) of the group; None is a group of one."""
    return (1, 0) if group is None else (group.size(), group.rank())


def start_join(
    statistics_RN: torch.Tensor,
    group: Group | None,
    collective: Collective,
    columns: Sequence[int],
    options: Options,
) -> Callable[[], RowStatistics]:
    """Begin to join the shards; return what waits for the whole rows' statistics.

    "gather" is one all-gather of 16 bytes a token (4 more with each option), folded in rank order:
    an all-reduce whose order we own, so that all ranks get the same bits whatever the library
    underneath does. "all_reduce" is a MAX of 4 bytes and a packed SUM of 16, without that promise,
    for groups where it is faster; both wait for each other, so they happen in the second half.
    columns: how many take part, of every rank's shard.
    """
    world, rank = world_and_rank(group)
    if world == 1:
        return lambda: merge_shards(statistics_RN.unsqueeze(0), columns, options)
    compiling = torch.compiler.is_compiling()
    # TORCH_DISTRIBUTED_DEBUG=DETAIL asks for a look that stalls a GPU.
    if not compiling and dist.get_debug_level() == dist.DebugLevel.DETAIL:  # type: ignore[attr-defined]
        _compare_shards(statistics_RN, group, world)
    if collective == "all_reduce":
        return lambda: _join_by_sums(statistics_RN, group, columns[rank], options)
    rows, n = statistics_RN.shape
    # Gathered along the first dimension and viewed: gloo refuses a [T, R, N] output.
    every = statistics_RN.new_empty((world * rows, n))
    work = dist.all_gather_into_tensor(every, statistics_RN, group=group, async_op=not compiling)

    def arrived() -> RowStatistics:
        if work is not None and not compiling:  # where dynamo of torch 2.11 returns a tensor
            work.wait()
        return merge_shards(every.view(world, rows, n), columns, options)

    return arrived


def _join_by_sums(
    statistics_RN: torch.Tensor, group: Group | None, columns: int, options: Options
) -> RowStatistics:
    maximum = statistics_RN[MAX].clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    packed = pack_for_sum(statistics_RN, maximum, columns, options)
    dist.all_reduce(packed, group=group)
    return unpack_sum(packed, maximum, options)


def _compare_shards(statistics_RN: torch.Tensor, group: Group | None, world: int) -> None:
    """Say it where all ranks hold the same logits: a whole vocabulary, perhaps, not shards."""
    sums_RN = statistics_RN[: SPREAD + 1].contiguous()
    every = sums_RN.new_empty((world * len(sums_RN), sums_RN.shape[1]))
    dist.all_gather_into_tensor(every, sums_RN, group=group)
    # All are 0 where no token takes part: logits that nobody has read.
    if every.any() and torch.equal(every, sums_RN.repeat(world, 1)):
        warn_of_gathered("all ranks hold equal logits", world)


def warn_of_gathered(why: str, world: int) -> None:
    """Say that logits look gathered where a shard of them was expected."""
    warnings.warn(
        f"{why}: where that is the whole vocabulary, gathered, the loss is too high by "
        f"ln({world}) = {math.log(world):.3f}; pass this rank's own shard, or group=None",
        stacklevel=2,
    )


class _SumOverGroup(torch.autograd.Function):
    """A sum over ranks that all go on to compute the same value from it.

    Backward: every rank holds the same upstream gradient g of that value, and data-parallel
    wrappers average parameter gradients over the group; the factor size(group) makes that average
    the gradient of the value. No communication.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.size = group.size()
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.size, None


def sum_over_group(x: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Sum of `x` over the ranks of a data-parallel group, differentiable; None is one rank."""
    if world_and_rank(group)[0] == 1:
        return x
    result: torch.Tensor = _SumOverGroup.apply(x, group)
    return result
