"""Cross entropy, entropy and log-sum-exp of every token, from logits whose vocabulary is sharded.

    logits [N, V/T] --shard kernel--> [4, N] --one all-gather, fold in rank order--> ce, H, lse

Each result is exactly differentiable. With upstream gradients g_ce, g_H, g_lse of a token, p the
softmax, d = x - M and Ubar = U / Z:

    dz_i = p_i (A + B d_i) - g_ce [i = y],    A = g_ce + g_lse - g_H Ubar,    B = -g_H

so one kernel serves every loss made of them, and a new weighting needs no new kernel. The backward
pass has no collective. Shapes: N tokens, V columns of this rank's shard, T ranks. Statistics are
fp32 (fp64 for fp64 logits). Source: chain rule; checked against float64 in tests/loss.
"""

from typing import Any, NamedTuple

import torch

from megatron_infoentropy import kernels
from megatron_infoentropy.config import Backend, Collective
from megatron_infoentropy.kernels.contract import PLAIN, Kernels, Shard
from megatron_infoentropy.loss.collective import Group, join_shards, world_and_rank


class TokenStatistics(NamedTuple):
    """Of the predicted distribution of every token; each fp32, nats, in the target's shape."""

    cross_entropy: torch.Tensor  # -ln p(target) >= 0
    entropy: torch.Tensor  # -sum p ln p, in [0, ln vocab_size]
    logsumexp: torch.Tensor  # ln sum e^logit


def vocab_parallel_statistics(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Group | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
    collective: Collective = "gather",
    inplace_backward: bool = False,
) -> TokenStatistics:
    """Cross entropy, entropy and log-sum-exp of every token, each differentiable.

    Args:
        logits: [..., V/T], this rank's shard of the vocabulary, in rank order over `group`; any
            floating dtype. Leading dimensions may be transposed without a copy.
        target: [...], integer ids in the whole vocabulary.
        group: the tensor-parallel group the vocabulary is split over; None where it is not.
        vocab_size: true vocabulary size where the table is padded: columns at or beyond it never
            enter the softmax or the entropy, and their gradient is exactly 0.
        ignore_index: tokens with this target get 0 everywhere and a gradient of exactly 0.
        backend: "native", "reference" or "auto". A named backend never falls back.
        collective: "gather" (one all-gather, bitwise equal on all ranks) or "all_reduce".
        inplace_backward: write the gradient over the logits, which saves one tensor of their size.
            Only for logits that nothing else reads; a second backward pass raises.

    Returns:
        TokenStatistics, each [...] fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together; on a CPU also a target that is
            outside the vocabulary (on a GPU, where a look would stall the device, its cross
            entropy is NaN).
        RuntimeError: the named backend cannot run on these logits.
    """
    _check_arguments(logits, target, inplace_backward)
    order = _memory_order(logits)
    rows_NV = logits.permute(*order, logits.dim() - 1).reshape(-1, logits.shape[-1])
    overlapping = rows_NV.shape[0] > 1 and rows_NV.stride(0) < rows_NV.shape[-1]
    if rows_NV.stride(-1) != 1 or overlapping:  # expanded logits, for one
        rows_NV = rows_NV.contiguous()
    target_N = target.permute(order).reshape(-1).long().contiguous()

    width = logits.shape[-1]
    world, rank = world_and_rank(group)
    vocabulary = _check_vocab_size(vocab_size, width, world)
    _check_targets(target_N, vocabulary, ignore_index)
    start = rank * width
    shard = Shard(start, min(max(vocabulary - start, 0), width), ignore_index)
    chosen = kernels.select(backend, logits.device, logits.dtype)
    results = _Statistics.apply(
        rows_NV, target_N, shard, vocabulary, group, chosen, collective, inplace_backward
    )
    shape = [target.shape[axis] for axis in order]
    inverse = [order.index(axis) for axis in range(len(order))]
    return TokenStatistics(*(result.view(shape).permute(inverse) for result in results))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        target_N: torch.Tensor,
        shard: Shard,
        vocabulary: int,
        group: Group | None,
        chosen: Kernels,
        collective: Collective,
        inplace_backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        row = join_shards(
            chosen.shard_statistics(logits_NV, target_N, shard, PLAIN), group, collective
        )
        ignored = target_N == shard.ignore_index
        z = (1 + row.tail).masked_fill_(ignored, 1)
        log_z, mean_distance = row.tail.log1p(), row.spread / z
        ce = (row.maximum - row.target_logit) + log_z
        # A target that no shard owns must not look like a very good prediction.
        ce.masked_fill_((target_N < 0) | (target_N >= vocabulary), torch.nan)
        ce.masked_fill_(ignored, 0)
        entropy = (log_z + mean_distance).masked_fill_(ignored, 0)
        lse = (row.maximum + log_z).masked_fill_(ignored, 0)
        ctx.save_for_backward(logits_NV, target_N, row.maximum, z, mean_distance, ce, entropy)
        ctx.shard, ctx.kernels, ctx.inplace = shard, chosen, inplace_backward
        ctx.overwritten = False
        return ce, entropy, lse

    @staticmethod
    def backward(
        ctx: Any,
        g_ce: torch.Tensor | None,
        g_entropy: torch.Tensor | None,
        g_lse: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: torch would quietly treat it as constant
            raise RuntimeError(
                "the InfoEntropy statistics have no second derivative; call backward or "
                "torch.autograd.grad without create_graph=True"
            )
        if ctx.overwritten:
            raise RuntimeError(
                "the logits of this loss were overwritten by their gradient in an earlier backward "
                "pass; pass inplace_backward=False to run backward more than once"
            )
        logits_NV, target_N, maximum, z, mean_distance, ce, entropy = ctx.saved_tensors
        coefficients_4N = _coefficients(
            g_ce, g_entropy, g_lse, maximum, z, mean_distance, ce, entropy
        )
        out_NV = logits_NV.detach() if ctx.inplace else torch.empty_like(logits_NV)
        ctx.kernels.shard_gradient(logits_NV, target_N, ctx.shard, PLAIN, coefficients_4N, out_NV)
        if ctx.inplace:
            ctx.overwritten = True
            # The kernels write through raw pointers, which torch cannot see: say so, so that
            # anything else that saved these logits raises instead of reading a gradient.
            torch.autograd.graph.increment_version(logits_NV)
        return out_NV, None, None, None, None, None, None, None


def _coefficients(
    g_ce: torch.Tensor | None,
    g_entropy: torch.Tensor | None,
    g_lse: torch.Tensor | None,
    maximum: torch.Tensor,
    z: torch.Tensor,
    mean_distance: torch.Tensor,
    ce: torch.Tensor,
    entropy: torch.Tensor,
) -> torch.Tensor:
    """[4, N] for the gradient kernel: SHIFT, SCALE, SLOPE, TARGET_GRADIENT.

    The target's own column is formed here as g_ce (p_y - 1) = g_ce expm1(-ce), which stays exact
    for confident tokens, where p_y rounds to 1.
    """
    coefficients_4N = torch.zeros((4, len(z)), dtype=z.dtype, device=z.device)
    shift, scale, slope, own = coefficients_4N.unbind(0)
    shift.copy_(maximum)
    if g_ce is not None:
        scale += g_ce
        own += g_ce * torch.expm1(-ce)
    if g_lse is not None:
        scale += g_lse
        own += g_lse * torch.exp(-ce)
    if g_entropy is not None:
        scale -= g_entropy * mean_distance
        slope -= g_entropy
        # p_y (ln p_y + H): 0 for a target of probability 0, where ce is infinite.
        own -= g_entropy * torch.where(ce == torch.inf, 0, torch.exp(-ce) * (entropy - ce))
    scale /= z
    slope /= z
    return coefficients_4N


def _memory_order(logits: torch.Tensor) -> list[int]:
    """Leading dimensions, outermost in memory first: [s, b, V] seen as [b, s, V] stays put."""
    strides = list(logits.stride())
    return sorted(range(logits.dim() - 1), key=lambda axis: -strides[axis])


def _check_arguments(logits: torch.Tensor, target: torch.Tensor, inplace_backward: bool) -> None:
    if logits.dim() < 2 or target.shape != logits.shape[:-1]:
        raise ValueError(
            "expected logits [..., V] and target [...] with the same leading dimensions, got "
            f"{list(logits.shape)} and {list(target.shape)}; Megatron's output layer gives "
            "[sequence, batch, V] while its labels are [batch, sequence]: transpose one of them"
        )
    if logits.shape[-1] == 0:
        raise ValueError(
            f"expected logits with at least one column, got {list(logits.shape)}: a shard that is "
            "all padding still has its columns; say how many count by vocab_size"
        )
    if not logits.is_floating_point() or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"expected floating-point logits and integer targets, got {logits.dtype} and "
            f"{target.dtype}"
        )
    if inplace_backward and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward=True would replace your own tensor by its gradient: it is for logits "
            "that a model computed, not for a leaf; pass inplace_backward=False"
        )


def _check_vocab_size(vocab_size: int | None, width: int, world: int) -> int:
    """The true vocabulary size."""
    if vocab_size is None:
        return width * world
    if not 0 < vocab_size <= width * world:
        raise ValueError(
            f"vocab_size={vocab_size} does not fit: {world} shard(s) of {width} columns hold "
            f"{width * world} entries; is every rank of the group given its own shard?"
        )
    return vocab_size


def _check_targets(target_N: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    if target_N.device.type != "cpu" or target_N.numel() == 0:
        return
    wrong = ((target_N < 0) | (target_N >= vocabulary)) & (target_N != ignore_index)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{int(wrong.sum())} target(s) lie outside the vocabulary of {vocabulary} entries, the "
            f"first is {int(target_N[index])}; to leave tokens out use ignore_index "
            f"({ignore_index})"
        )
