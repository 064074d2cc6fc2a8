"""The collectives of the loss, each in one place."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_infoentropy.config import Collective
from megatron_infoentropy.kernels.contract import MAX, SPREAD
from megatron_infoentropy.loss.merge import (
    RowStatistics,
    merge_shards,
    pack_for_sum,
    unpack_sum,
)

Group = dist.ProcessGroup


def world_and_rank(group: Group | None) -> tuple[int, int]:
    """(size, this rank) of the group; None is a group of one."""
    return (1, 0) if group is None else (group.size(), group.rank())


def join_shards(
    statistics_RN: torch.Tensor,
    group: Group | None,
    collective: Collective,
    columns: Sequence[int],
) -> RowStatistics:
    """The whole rows' statistics from this rank's shard.

    "gather" is one all-gather of 16 bytes a token (20 with distances), folded in rank order: an
    all-reduce whose order we own, so that all ranks get the same bits whatever the library
    underneath does. "all_reduce" is a MAX of 4 bytes and a packed SUM of 16, without that promise,
    for groups where it is faster. columns: how many take part, of every rank's shard.
    """
    world, rank = world_and_rank(group)
    if world == 1:
        return merge_shards(statistics_RN.unsqueeze(0), columns)
    if shards_are_compared():
        _compare_shards(statistics_RN, group, world)
    rows, n = statistics_RN.shape
    if collective == "gather":
        # Gathered along the first dimension and viewed: gloo refuses a [T, R, N] output.
        every = statistics_RN.new_empty((world * rows, n))
        dist.all_gather_into_tensor(every, statistics_RN, group=group)
        return merge_shards(every.view(world, rows, n), columns)
    if collective == "all_reduce":
        maximum = statistics_RN[MAX].clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        packed = pack_for_sum(statistics_RN, maximum, columns[rank])
        dist.all_reduce(packed, group=group)
        return unpack_sum(packed, maximum)
    raise ValueError(f"collective must be 'gather' or 'all_reduce', got {collective!r}")


def shards_are_compared() -> bool:
    """Return whether TORCH_DISTRIBUTED_DEBUG=DETAIL asks for a look that stalls a GPU."""
    if torch.compiler.is_compiling():
        return False
    return bool(dist.get_debug_level() == dist.DebugLevel.DETAIL)  # type: ignore[attr-defined]


def _compare_shards(statistics_RN: torch.Tensor, group: Group | None, world: int) -> None:
    """Say it where all ranks hold the same logits: a whole vocabulary, perhaps, not shards."""
    sums_RN = statistics_RN[: SPREAD + 1].contiguous()
    every = sums_RN.new_empty((world * len(sums_RN), sums_RN.shape[1]))
    dist.all_gather_into_tensor(every, sums_RN, group=group)
    if every.numel() and torch.equal(every, sums_RN.repeat(world, 1)):
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
