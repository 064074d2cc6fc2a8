"""Log-probability of the taken token and entropy, from logits or from hidden states and weight.

Both functions are thin over the statistics of the loss: the log-probability is minus the cross
entropy, the entropy is exact, and both come from one read of the logits and one collective.
"""

from typing import Any

import torch

from megatron_infoentropy.config import Backend, Collective
from megatron_infoentropy.loss import (
    TokenStatistics,
    linear_vocab_parallel_statistics,
    vocab_parallel_statistics,
)
from megatron_infoentropy.loss.collective import Group
from megatron_infoentropy.loss.layout import leave_out_masked

IGNORED = -100  # the target of tokens that are left out
Pair = tuple[torch.Tensor, torch.Tensor | None]


def logprob_and_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Group | None = None,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    loss_mask: torch.Tensor | None = None,
    keep_mask: torch.Tensor | None = None,
    with_entropy: bool = True,
    entropy_gradient: bool = True,
    inplace_backward: bool = False,
    backend: Backend = "auto",
    collective: Collective = "gather",
) -> Pair:
    """Return the log-probability of every target and the entropy of every distribution.

    Args:
        logits: [..., V/T], this rank's shard of the vocabulary, in rank order over `group`; any
            floating dtype. They are read, never changed, unless `inplace_backward`.
        target: [...], integer ids in the whole vocabulary; -100 leaves a token out.
        group: the tensor-parallel group the vocabulary is split over; None where it is not.
        temperature: divides the logits; a number, or a tensor [...] in the target's shape.
        vocab_size: true vocabulary size where the table is padded: columns at or beyond it take no
            part in either number, and their gradient is exactly 0.
        loss_mask: [...], in the target's shape; a token where it is 0 is left out.
        keep_mask: bool [..., V/T], the entries among which the token was drawn (top-p, top-k). The
            log-probability is relative to these and the target, the entropy stays that of the
            whole distribution. Costs a copy of the logits, of 16-bit ones two in fp32, and a second
            collective.
        with_entropy: False returns None for the entropy.
        entropy_gradient: False returns an entropy that is a constant in the backward pass.
        inplace_backward: write the gradient over the logits: `vocab_parallel_statistics`. With a
            `keep_mask` it is written over the copy.
        backend: which kernels run, "auto" or a name.
        collective: "gather" (bitwise equal on all ranks) or "all_reduce".

    Returns:
        (log-probability <= 0, entropy >= 0), each [...] in nats, fp32 (fp64 for fp64 logits),
        differentiable, equal on all ranks of the group. A token that is left out has 0 for both,
        and a gradient of exactly 0.

    Raises:
        ValueError, RuntimeError: as `vocab_parallel_statistics`; a mask of another shape.
    """
    target, _ = leave_out_masked(target, loss_mask, IGNORED, torch.float32)
    options: dict[str, Any] = {
        "group": group,
        "temperature": temperature,
        "vocab_size": vocab_size,
        "backend": backend,
        "collective": collective,
    }
    if keep_mask is None:
        all_entries = vocab_parallel_statistics(
            logits, target, inplace_backward=inplace_backward, **options
        )
        return _pair(all_entries, all_entries, with_entropy, entropy_gradient)
    if with_entropy and entropy_gradient:  # two gradients are added: in fp32, and rounded once
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept_logits = _among_kept(logits, target, keep_mask, group)
    kept = vocab_parallel_statistics(
        kept_logits, target, inplace_backward=inplace_backward, **options
    )
    if not with_entropy:
        return _pair(kept, kept, with_entropy, entropy_gradient)
    all_entries = vocab_parallel_statistics(logits, target, **options)
    return _pair(kept, all_entries, with_entropy, entropy_gradient)


def linear_logprob_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    group: Group | None = None,
    temperature: float | torch.Tensor = 1.0,
    vocab_size: int | None = None,
    loss_mask: torch.Tensor | None = None,
    with_entropy: bool = True,
    entropy_gradient: bool = True,
    chunk_tokens: int = 4096,
    sequence_parallel: bool = False,
    into_main_grad: bool = False,
    backend: Backend = "auto",
    collective: Collective = "gather",
) -> Pair:
    """Return `logprob_and_entropy` of the logits hidden @ weight^T, which never exist in full.

    Args:
        hidden: [..., H], equal on all ranks of `group`; with `sequence_parallel` this rank's slice
            of the first dimension. Its gradient is summed over the group here.
        weight: [V/T, H], this rank's shard of the output layer, in the dtype of `hidden`.
        target: [...], integer ids in the whole vocabulary, of all tokens on every rank; -100 leaves
            a token out.
        group: the tensor-parallel group; this and the next five as in `logprob_and_entropy`.
        temperature: divides the logits.
        vocab_size: true vocabulary size where the table is padded.
        loss_mask: [...]; a token where it is 0 is left out.
        with_entropy: False returns None for the entropy.
        entropy_gradient: False returns an entropy that is a constant in the backward pass.
        chunk_tokens: tokens whose logits are made at a time.
        sequence_parallel: gather `hidden` over `group`, scatter its gradient.
        into_main_grad: add the weight's gradient to `weight.main_grad` where that exists.
        backend: which kernels run, "auto" or a name.
        collective: "gather" or "all_reduce".

    Returns:
        (log-probability, entropy), as `logprob_and_entropy`.

    Raises:
        ValueError, RuntimeError: as `linear_vocab_parallel_statistics`; a mask of another shape.
    """
    target, _ = leave_out_masked(target, loss_mask, IGNORED, torch.float32)
    statistics = linear_vocab_parallel_statistics(
        hidden,
        weight,
        target,
        group=group,
        temperature=temperature,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
        into_main_grad=into_main_grad,
        backend=backend,
        collective=collective,
    )
    return _pair(statistics, statistics, with_entropy, entropy_gradient)


def _pair(
    of_target: TokenStatistics, of_all: TokenStatistics, with_entropy: bool, entropy_gradient: bool
) -> Pair:
    entropy = of_all.entropy if entropy_gradient else of_all.entropy.detach()
    return -of_target.cross_entropy, entropy if with_entropy else None


def _among_kept(
    logits: torch.Tensor, target: torch.Tensor, keep_mask: torch.Tensor, group: Group | None
) -> torch.Tensor:
    """Return a copy of the logits with -inf for entries that are neither kept nor the target."""
    if keep_mask.shape != logits.shape or keep_mask.dtype != torch.bool:
        raise ValueError(
            f"expected a bool keep_mask in the shape of the logits {list(logits.shape)}, got "
            f"{keep_mask.dtype} {list(keep_mask.shape)}"
        )
    width = logits.shape[-1]
    column = (target - (group.rank() * width if group is not None else 0)).unsqueeze(-1)
    inside, column = (column >= 0) & (column < width), column.clamp(0, width - 1)
    keep = keep_mask.scatter(-1, column, inside | keep_mask.gather(-1, column))
    return logits.masked_fill(~keep, -torch.inf)


def entropy_alone(
    logits: torch.Tensor, group: Group | None, vocab_size: int | None
) -> torch.Tensor:
    """Return the entropy [...] of logits [..., V/T] where no token was taken."""
    anything = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return vocab_parallel_statistics(logits, anything, group=group, vocab_size=vocab_size).entropy
