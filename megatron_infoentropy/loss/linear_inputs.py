"""What the fused functions are given, checked and laid out for chunks."""

from typing import NamedTuple

import torch

from megatron_infoentropy import kernels
from megatron_infoentropy.config import Backend, Collective
from megatron_infoentropy.kernels.contract import Options
from megatron_infoentropy.loss.collective import Group, world_and_rank
from megatron_infoentropy.loss.layout import (
    as_ids,
    check_targets,
    check_tensors,
    local_shard,
    split_vocabulary,
)
from megatron_infoentropy.loss.linear_chunks import LinearSettings, cut_tokens


class LinearRequest(NamedTuple):
    """What the caller of a fused function asks for, besides its tensors."""

    vocab_size: int | None
    ignore_index: int
    options: Options
    group: Group | None
    backend: Backend
    collective: Collective
    chunk_tokens: int
    sequence_parallel: bool
    into_main_grad: bool


def prepare_linear(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, request: LinearRequest
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LinearSettings]:
    """(hidden [L, H], this rank's weight, target [N], settings), checked.

    Raises:
        ValueError: shapes, dtypes, targets or sizes that do not fit.
        RuntimeError: the named backend cannot run here.
    """
    group = request.group
    weight = local_shard(weight, 0, group)
    check_tensors(hidden=hidden, weight=weight, target=target)
    slices = world_and_rank(group)[0] if request.sequence_parallel else 1
    _check_shapes(hidden, weight, target, slices)
    vocabulary = split_vocabulary(request.vocab_size, len(weight), group, request.ignore_index)
    hidden_LH = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    target_N = as_ids(target).reshape(-1).contiguous()
    check_targets(target_N, vocabulary.size, vocabulary.shard.ignore_index)
    chosen = kernels.select(request.backend, hidden.device, hidden.dtype)
    cut = cut_tokens(len(hidden_LH), slices, request.chunk_tokens)
    settings = LinearSettings(
        vocabulary,
        request.options,
        group,
        chosen,
        request.collective,
        cut,
        request.into_main_grad,
    )
    return hidden_LH, weight, target_N, settings


def _check_shapes(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, slices: int
) -> None:
    if weight.dim() != 2 or hidden.dim() < 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "expected hidden [..., H] and weight [V, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    expected = [hidden.shape[0] * slices, *hidden.shape[1:-1]]
    if list(target.shape) != expected:
        slice_of = f", this rank's 1/{slices} of the first dimension," if slices > 1 else ""
        raise ValueError(
            f"expected a target of {expected} for hidden {list(hidden.shape)}{slice_of} got "
            f"{list(target.shape)}; Megatron's hidden states are [sequence, batch, H] while its "
            "labels are [batch, sequence]: transpose one of them"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"expected hidden and weight of one floating dtype, got {hidden.dtype} and "
            f"{weight.dtype}; under autocast, which does not reach the fused loss, pass "
            "weight.to(hidden.dtype)"
        )
