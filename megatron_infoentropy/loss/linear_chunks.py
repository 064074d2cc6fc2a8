"""Tokens cut into chunks: what is computed and gathered of one, and where its gradients go.

Shapes: L rows of this rank's hidden states (a slice of the sequence under sequence parallelism, all
tokens otherwise), N tokens of all slices, C tokens of one chunk, H hidden size, V columns of this
rank's vocabulary shard. The number of chunks depends on L, and where masked tokens are skipped on
the targets, which all ranks hold: so they issue the same collectives in the same order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_infoentropy.kernels.contract import statistics_dtype
from megatron_infoentropy.loss.collective import Group, world_and_rank
from megatron_infoentropy.loss.layout import Cut, Settings


class TakenTokens(NamedTuple):
    """The tokens that are multiplied: of every slice those that take part, as many of each."""

    index_SK: torch.Tensor | None  # places in the slices, [slices, K]; None is all of them
    shape: torch.Size  # of the target

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """[N] of [...] in the target's shape, contiguous."""
        if self.index_SK is None:
            return values.reshape(-1).contiguous()
        return values.reshape(len(self.index_SK), -1).gather(1, self.index_SK).view(-1)

    def restore(self, result_N: torch.Tensor) -> torch.Tensor:
        """[...] in the target's shape, 0 for the tokens that were left out."""
        if self.index_SK is None:
            return result_N.view(self.shape)
        slices = len(self.index_SK)
        whole_SL = result_N.new_zeros((slices, self.shape.numel() // slices))
        return whole_SL.scatter(1, self.index_SK, result_N.view(slices, -1)).view(self.shape)


def take_tokens(target: torch.Tensor, slices: int, ignore_index: int, *, skip: bool) -> TakenTokens:
    """Return the tokens that take part; all of them unless `skip`, and where a graph is compiled.

    Their number is looked at, which a GPU waits for. Where slices differ in it, the others are
    filled up with tokens that take no part: all ranks then have as many chunks.
    """
    if not skip or torch.compiler.is_compiling() or not target.numel():
        return TakenTokens(None, target.shape)
    takes_part_SL = target.reshape(slices, -1) != ignore_index
    most = int(takes_part_SL.sum(1).max())
    if most == takes_part_SL.shape[1]:
        return TakenTokens(None, target.shape)
    order_SL = takes_part_SL.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return TakenTokens(order_SL[:, :most].contiguous(), target.shape)


def hidden_chunks(
    hidden_LH: torch.Tensor, cut: Cut, group: Group | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, hidden states [C, H]) of every chunk; the next one is gathered meanwhile."""
    started = ((rows, _start_gather(hidden_LH[rows], cut, group)) for rows in cut.chunks())
    for rows, arrived in ahead(started, 1):
        yield rows, arrived()


def ahead[Started](started: Iterable[Started], depth: int) -> Iterator[Started]:
    """Yield each of the started chunks once `depth` later ones are under way."""
    under_way: deque[Started] = deque()
    for one in started:
        under_way.append(one)
        if len(under_way) > depth:
            yield under_way.popleft()
    yield from under_way


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


CONVERTED_BYTES = 1 << 25  # of one fp32 copy of 16-bit columns, on a CPU


class LinearGradients:
    """The gradients by hidden states and by weight, chunk by chunk.

    Hidden states: each rank has the part of its own columns; the sum over ranks is formed once a
    chunk, an all-reduce (or, where ranks hold slices, a reduce-scatter) under the weight's product.
    Weight: added up over chunks in fp32 (fp64 for fp64), whatever its dtype.
    """

    def __init__(
        self,
        hidden_LH: torch.Tensor,
        weight_VH: torch.Tensor,
        needed: Sequence[bool],
        settings: Settings,
        main_grad_VH: torch.Tensor | None = None,
    ) -> None:
        """needed: whether each of the two is; main_grad_VH: what the weight's is added to, where it
        is precise enough."""
        needs_hidden, needs_weight = needed
        self.hidden_LH = torch.empty_like(hidden_LH) if needs_hidden else None
        self.weight_total_VH = _weight_total(weight_VH, main_grad_VH) if needs_weight else None
        self._weight_VH, self._cut, self._group = weight_VH, settings.cut, settings.group
        self._reducing: tuple[dist.Work | None, torch.Tensor] | None = None

    @property
    def are_needed(self) -> bool:
        """Return whether anything is to be added at all."""
        return self.hidden_LH is not None or self.weight_total_VH is not None

    def add(self, rows: slice, dz_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
        """Add the gradients of one chunk, from the gradient by its logits."""
        if self.hidden_LH is not None:
            self._wait()  # one reduction under way at a time: one chunk's memory
            self._reducing = self._reduce(self.hidden_LH[rows], dz_CV)
        if self.weight_total_VH is not None:
            _add_product(self.weight_total_VH, dz_CV, hidden_CH)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(by hidden states, by weight), once every chunk was added."""
        self._wait()
        return self.hidden_LH, self.weight_total_VH

    def _reduce(
        self, out_LH: torch.Tensor, dz_CV: torch.Tensor
    ) -> tuple[dist.Work | None, torch.Tensor]:
        weight_VH = self._weight_VH
        if self._cut.slices > 1:
            # Into a tensor made beforehand, as all products here: autocast leaves those alone.
            mine_CH = weight_VH.new_empty((len(dz_CV), weight_VH.shape[1]))
            torch.mm(dz_CV, weight_VH, out=mine_CH)
            work = dist.reduce_scatter_tensor(out_LH, mine_CH, group=self._group, async_op=True)
            return work, mine_CH
        torch.mm(dz_CV, weight_VH, out=out_LH)
        if world_and_rank(self._group)[0] == 1:
            return None, out_LH
        return dist.all_reduce(out_LH, group=self._group, async_op=True), out_LH

    def _wait(self) -> None:
        if self._reducing is not None and self._reducing[0] is not None:
            self._reducing[0].wait()
        self._reducing = None


def _weight_total(weight_VH: torch.Tensor, main_grad_VH: torch.Tensor | None) -> torch.Tensor:
    dtype = statistics_dtype(weight_VH)
    if main_grad_VH is not None and main_grad_VH.dtype == dtype:
        return main_grad_VH
    return torch.zeros_like(weight_VH, dtype=dtype)


def _add_product(total_VH: torch.Tensor, dz_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """total += dz^T hidden, in the precision of the total.

    16-bit factors with an fp32 total are one matrix product on a GPU, which multiplies 16-bit
    numbers and adds in fp32 anyway. PyTorch has none on a CPU: there blocks of columns are
    converted, exactly, and multiplied in fp32.
    """
    if total_VH.dtype == dz_CV.dtype:
        total_VH.addmm_(dz_CV.t(), hidden_CH)
    elif total_VH.is_cuda:
        torch.addmm(total_VH, dz_CV.t(), hidden_CH, out_dtype=total_VH.dtype, out=total_VH)
    else:
        hidden_CH = hidden_CH.to(total_VH.dtype)
        step = max(1, CONVERTED_BYTES // (len(dz_CV) * total_VH.itemsize))
        for start in range(0, len(total_VH), step):
            dz = dz_CV[:, start : start + step].to(total_VH.dtype)
            total_VH[start : start + step].addmm_(dz.t(), hidden_CH)


def deliver_weight_gradient(
    total_VH: torch.Tensor, weight_VH: torch.Tensor, main_grad_VH: torch.Tensor | None
) -> torch.Tensor | None:
    """Return what autograd gets as the weight's gradient; with a main_grad the total goes there.

    Then it is, as with Megatron's own fused accumulation, a tensor without meaning, that makes the
    hooks of data-parallel wrappers run: they look at `grad_added_to_main_grad`. It must be zeros
    (`zero_out_wgrad`) where autograd adds another gradient to it, that of a tied embedding.
    """
    if main_grad_VH is None:
        return total_VH.to(weight_VH.dtype)
    if total_VH is not main_grad_VH:
        main_grad_VH.add_(total_VH)
    if not hasattr(weight_VH, "grad_added_to_main_grad"):
        return None
    weight_VH.grad_added_to_main_grad = True
    zeros = getattr(weight_VH, "zero_out_wgrad", False)
    return torch.zeros_like(weight_VH) if zeros else torch.empty_like(weight_VH)
