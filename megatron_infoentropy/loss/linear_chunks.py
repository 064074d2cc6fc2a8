"""Tokens cut into chunks, and what is computed and gathered of one chunk in a forward pass.

Shapes: L rows of this rank's hidden states (a slice of the sequence under sequence parallelism, all
tokens otherwise), N tokens of all slices, C tokens of one chunk, H hidden size, V columns of this
rank's vocabulary shard. The number of chunks depends on L alone, so that all ranks issue the same
collectives in the same order, whatever their data.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_infoentropy.config import Collective
from megatron_infoentropy.kernels.contract import Kernels, Options
from megatron_infoentropy.loss.collective import (
    Group,
    join_shards,
    shards_are_compared,
    world_and_rank,
)
from megatron_infoentropy.loss.layout import Vocabulary
from megatron_infoentropy.loss.merge import RowStatistics, merge_shards


class Cut(NamedTuple):
    """The tokens in chunks of one size, the last perhaps shorter.

    With sequence parallelism a chunk is the same rows of every rank's slice, in rank order. So it
    is gathered, and its gradient scattered, chunk by chunk: no rank ever holds the hidden states,
    or their gradient, of all tokens.
    """

    slices: int  # ranks that hold a slice of the tokens; 1 without sequence parallelism
    rows: int  # L, of one slice
    chunk_rows: int  # of one slice

    @property
    def tokens(self) -> int:
        """Of the largest chunk."""
        return self.slices * self.chunk_rows

    def chunks(self) -> list[slice]:
        """Rows of a slice, chunk by chunk."""
        step = max(1, self.chunk_rows)
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def take(self, whole: torch.Tensor, rows: slice) -> torch.Tensor:
        """[..., C] of [..., N], contiguous."""
        part = self._by_slice(whole)[..., rows]
        return part.reshape(*whole.shape[:-1], -1).contiguous()

    def put(self, whole: torch.Tensor, rows: slice, part: torch.Tensor) -> None:
        """Write [..., C] to its place in [..., N]."""
        place = self._by_slice(whole)[..., rows]
        place.copy_(part.view(place.shape))

    def _by_slice(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.view(*whole.shape[:-1], self.slices, self.rows)


class LinearSettings(NamedTuple):
    """Everything but tensors that the fused functions need."""

    vocabulary: Vocabulary
    options: Options
    group: Group | None
    kernels: Kernels
    collective: Collective
    cut: Cut
    into_main_grad: bool


def cut_tokens(rows: int, slices: int, chunk_tokens: int) -> Cut:
    """Chunks of at most `chunk_tokens` tokens, of nearly equal size: a chunk of one token would
    cost a pass over the whole weight.

    Raises:
        ValueError: chunk_tokens below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}; 4096 is usual")
    count = -(-rows // max(1, chunk_tokens // slices))
    return Cut(slices, rows, -(-rows // count) if count else 0)


def hidden_chunks(
    hidden_LH: torch.Tensor, cut: Cut, group: Group | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, hidden states [C, H]) of every chunk; the next one is gathered meanwhile."""
    started = ((rows, _start_gather(hidden_LH[rows], cut, group)) for rows in cut.chunks())
    current = next(started, None)
    while current is not None:
        following = next(started, None)
        rows, arrived = current
        yield rows, arrived()
        current = following


def _start_gather(
    part_LH: torch.Tensor, cut: Cut, group: Group | None
) -> Callable[[], torch.Tensor]:
    if cut.slices == 1:
        return lambda: part_LH
    whole_CH = part_LH.new_empty((cut.slices * len(part_LH), part_LH.shape[1]))
    work = dist.all_gather_into_tensor(whole_CH, part_LH, group=group, async_op=True)

    def arrived() -> torch.Tensor:
        assert work is not None  # as for every rank of the group
        work.wait()
        return whole_CH

    return arrived


def logits_of(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, buffer_CV: torch.Tensor
) -> torch.Tensor:
    """[C, V], in the buffer's memory."""
    return torch.mm(hidden_CH, weight_VH.t(), out=buffer_CV[: len(hidden_CH)])


def start_join(
    statistics_RC: torch.Tensor,
    group: Group | None,
    collective: Collective,
    columns: Sequence[int],
) -> Callable[[], RowStatistics]:
    """`join_shards` in two halves: what is called between them hides the time of the gather.

    "all_reduce" is two collectives that wait for each other and happens in the second half.
    """
    world, _ = world_and_rank(group)
    if world == 1 or collective != "gather" or shards_are_compared():
        return lambda: join_shards(statistics_RC, group, collective, columns)
    rows, n = statistics_RC.shape
    every = statistics_RC.new_empty((world * rows, n))
    work = dist.all_gather_into_tensor(every, statistics_RC, group=group, async_op=True)

    def arrived() -> RowStatistics:
        assert work is not None
        work.wait()
        return merge_shards(every.view(world, rows, n), columns)

    return arrived
