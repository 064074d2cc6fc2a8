"""How Megatron arranges the numbers of a parameter, undone and done: pure functions of tensors.

H queries, G key/value groups, D numbers a head; tensors of one layer, output features first.

qkv             [G * (H/G + 2) * D, hidden], or the bias [same]: for each group its H/G queries, its
                key, its value. Llama has three tensors; GPT-NeoX one, by head, which is the same
                for G = H; GPT-2 one, all queries, then keys, then values, input features first
gate_up         [2 * ffn, hidden]: the gate's rows (those that pass through SiLU), then the up rows
vocabulary      [padded, hidden]: rows after the true vocabulary are padding
norm, head_norm [hidden], [D]: with zero-centred norms, the weight minus 1
transposed      GPT-2 keeps input features first
and_zeros       the weight of a layer without a bias, where the family's layer has one

With interleaved rotary positions the rows of every query and key, and what multiplies them, are
reordered so that pairs (0, 1), (2, 3) become (0, R/2), (1, R/2 + 1), as Hugging Face pairs them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_infoentropy.convert.architecture import Architecture


def _only(parts: tuple[Tensor, ...], model: Architecture) -> Tensor:
    return parts[0]


class Layout(NamedTuple):
    """Megatron's tensor as the family's, and the way back (for plain norms, halves paired)."""

    to_hf: Callable[[Tensor, Architecture], tuple[Tensor, ...]]
    to_megatron: Callable[[tuple[Tensor, ...], Architecture], Tensor] = _only


def split_qkv(qkv: Tensor, model: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [H * D, ...], k and v [G * D, ...], rotary halves paired as in Hugging Face."""
    queries, rest = model.num_attention_heads // model.num_query_groups, qkv.shape[1:]
    heads = qkv.view(model.num_query_groups, queries + 2, model.kv_channels, *rest)
    q, k, v = heads[:, :queries], heads[:, queries : queries + 1], heads[:, queries + 1 :]
    if model.rotary_interleaved:
        q, k = pair_halves(q, 2, model.rotary_dim), pair_halves(k, 2, model.rotary_dim)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def join_qkv(parts: tuple[Tensor, ...], model: Architecture) -> Tensor:
    """Return [G * (H/G + 2) * D, ...], group by group."""
    rest = parts[0].shape[1:]
    groups = [part.view(model.num_query_groups, -1, model.kv_channels, *rest) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, *rest)


def pair_halves(tensor: Tensor, axis: int, rotary_dim: int) -> Tensor:
    """Reorder the first `rotary_dim` entries of an axis: 0, 1, 2, 3, ... become 0, 2, ..., 1, 3."""
    turned = tensor.narrow(axis, 0, rotary_dim)
    straight = tensor.narrow(axis, rotary_dim, tensor.shape[axis] - rotary_dim)
    outer, inner = tensor.shape[:axis], tensor.shape[axis + 1 :]
    pairs = turned.reshape(*outer, rotary_dim // 2, 2, *inner)
    return torch.cat([pairs.transpose(axis, axis + 1).flatten(axis, axis + 1), straight], dim=axis)


def split_by_head(qkv: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return GPT-NeoX's: for every head its query, key and value, as in Megatron."""
    if not model.rotary_interleaved:
        return (qkv,)
    return (join_qkv(split_qkv(qkv, model), model),)


def split_in_columns(qkv: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return GPT-2's: all queries, keys, values; a weight with input features first."""
    return (torch.cat(split_qkv(qkv, model)).t().contiguous(),)


def join_from_columns(parts: tuple[Tensor, ...], model: Architecture) -> Tensor:
    return join_qkv(tuple(parts[0].t().contiguous().chunk(3)), model)


def cut_vocabulary(table: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return the rows of tokens that exist, [vocabulary, hidden]."""
    return (table[: model.vocab_size],)


def plain_norm(weight: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return the factor that multiplies the normalised vector."""
    # In fp32: a bf16 sum would lose most of what the stored weight says.
    return (weight.float() + 1 if model.layernorm_zero_centered_gamma else weight,)


def head_norm(weight: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return the factor [D] of a normalised query or key, in the order of its rows."""
    (plain,) = plain_norm(weight, model)
    return (pair_halves(plain, 0, model.rotary_dim) if model.rotary_interleaved else plain,)


def split_gate_up(fc1: Tensor, model: Architecture) -> tuple[Tensor, ...]:
    """Return gate and up, each [ffn, ...]."""
    return tuple(fc1.chunk(2))


def and_zeros(weight: Tensor, model: Architecture) -> tuple[Tensor, Tensor]:
    """Return the weight, and a bias that changes nothing."""
    return weight, weight.new_zeros(len(weight))


LAYOUTS = {
    "same": Layout(lambda tensor, _: (tensor,)),
    "transposed": Layout(
        lambda tensor, _: (tensor.t().contiguous(),), lambda parts, _: parts[0].t().contiguous()
    ),
    "norm": Layout(plain_norm),
    "head_norm": Layout(head_norm),
    "vocabulary": Layout(cut_vocabulary),
    "qkv": Layout(split_qkv, join_qkv),
    "qkv_by_head": Layout(split_by_head),
    "qkv_in_columns": Layout(split_in_columns, join_from_columns),
    "gate_up": Layout(split_gate_up, lambda parts, _: torch.cat(parts)),
    "and_zeros": Layout(and_zeros),
}
