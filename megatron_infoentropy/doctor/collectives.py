"""Ranks measured against each other: clocks, all-reduce and all-gather, in results and in time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

REPEATS = 3
ROUND_TRIPS = 5


@dataclass(frozen=True)
class Transfer:
    """One collective of the training: `bytes` of every rank's part, over every `stride`-th rank."""

    name: str
    kind: Literal["all-reduce", "all-gather"]
    bytes: int
    ranks: int  # of a group
    stride: int = 1  # from one rank of a group to its next


@dataclass(frozen=True)
class Measured:
    """A transfer's slowest group: `gbps` is what a rank sends in a ring, in 10^9 bytes a second."""

    transfer: Transfer
    seconds: float
    gbps: float
    wrong_ranks: tuple[int, ...]


def clock_ahead_s(rank: int, world: int, clock: Callable[[], float] = time.time) -> float:
    """By how much this rank's clock is ahead of rank 0's, from the shortest of some round trips.

    Wrong by at most half that round trip. All ranks call it.
    """
    ahead = 0.0
    for other in range(1, world):
        if rank == 0:
            for _ in range(ROUND_TRIPS):
                _receive(other)
                _send(clock(), other)
        elif rank == other:
            trips = []
            for _ in range(ROUND_TRIPS):
                start = clock()
                _send(start, 0)
                theirs = _receive(0)
                trips.append((clock() - start, (clock() + start) / 2 - theirs))
            ahead = min(trips)[1]
    return ahead


def _send(value: float, to: int) -> None:
    dist.send(torch.tensor([value], dtype=torch.float64), to)


def _receive(source: int) -> float:
    box = torch.zeros(1, dtype=torch.float64)
    dist.recv(box, source)
    return float(box)


def measure(transfers: list[Transfer], device: torch.device) -> list[Measured]:
    """Do every transfer a few times; all ranks call it with the same list."""
    world = dist.get_world_size()
    kinds = sorted({(transfer.ranks, transfer.stride) for transfer in transfers})
    groups = {kind: _group(*kind, world) for kind in kinds}
    found = []
    for transfer in transfers:
        seconds, right = _one(transfer, groups[transfer.ranks, transfer.stride], device)
        everyone: list[tuple[float, bool] | None] = [None] * world
        dist.all_gather_object(everyone, (seconds, right))
        results = [result for result in everyone if result is not None]
        slowest = max(result[0] for result in results)
        sent = transfer.bytes * (transfer.ranks - 1)
        if transfer.kind == "all-reduce":
            sent = 2 * sent // transfer.ranks
        wrong = tuple(at for at, result in enumerate(results) if not result[1])
        found.append(Measured(transfer, slowest, sent / slowest / 1e9, wrong))
    return found


def members(ranks: int, stride: int, world: int) -> list[list[int]]:
    """The groups of `ranks` that are `stride` apart: as Megatron cuts its world into them."""
    return [
        [base + first + stride * number for number in range(ranks)]
        for base in range(0, world, ranks * stride)
        for first in range(stride)
    ]


def _group(ranks: int, stride: int, world: int) -> dist.ProcessGroup | None:
    """This rank's, or None for all of them."""
    if ranks == world:
        return None
    mine = dist.new_subgroups_by_enumeration(members(ranks, stride, world))[0]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def _one(
    transfer: Transfer, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[float, bool]:
    """(seconds of the fastest repeat, whether the result is right)"""
    count, gathers = max(1, transfer.bytes // 4), transfer.kind == "all-gather"
    pattern, factors = _numbers(count, transfer.ranks, device)
    seconds = []
    for _ in range(REPEATS):
        mine = pattern * factors[dist.get_rank(group)]
        parts = [torch.empty_like(mine) for _ in range(transfer.ranks if gathers else 0)]
        dist.barrier(group)
        _finish(device)
        start = time.perf_counter()
        if gathers:
            dist.all_gather(parts, mine, group=group)
        else:
            dist.all_reduce(mine, group=group)
        _finish(device)
        seconds.append(time.perf_counter() - start)
    if gathers:
        right = all(torch.equal(part, pattern * factors[at]) for at, part in enumerate(parts))
    else:
        right = torch.equal(mine, pattern * sum(factors))
    return min(seconds), right


def _numbers(count: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """(what is sent, each rank's factor of it), so small that float32 adds them without rounding"""
    pattern = torch.arange(count, dtype=torch.float32, device=device) % 16
    return pattern, [rank % 8 + 1 for rank in range(ranks)]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
