"""How Megatron arranges the numbers of a parameter, undone: pure functions of tensors.

H queries, G key/value groups, D numbers a head; tensors of one layer, output features first.

qkv         [G * (H/G + 2) * D, hidden]: for each group its H/G queries, its key, its value
gate_up     [2 * ffn, hidden]: the gate's rows (the ones that pass through SiLU), then the up rows
vocabulary  [padded, hidden]: rows after the true vocabulary are padding
norm        [hidden]: with zero-centred norms, the weight minus 1
The other two, linear_proj and linear_fc2, are as in Llama.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_infoentropy.convert.architecture import Architecture
from megatron_infoentropy.convert.naming import Layout


def split_qkv(qkv: Tensor, model: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [H * D, hidden], k and v [G * D, hidden], rotated halves as Llama pairs them."""
    queries = model.num_heads // model.num_groups
    rows = model.num_groups * (queries + 2) * model.head_dim
    _require_shape("qkv", qkv, (rows, model.hidden_size))
    width = model.hidden_size
    heads = qkv.view(model.num_groups, queries + 2, model.head_dim, width)
    q, k, v = heads[:, :queries], heads[:, queries : queries + 1], heads[:, queries + 1 :]
    if model.interleaved_rotary:
        q, k = pair_halves(q), pair_halves(k)
    return q.reshape(-1, width), k.reshape(-1, width), v.reshape(-1, width)


def pair_halves(heads: Tensor) -> Tensor:
    """Reorder rows [..., D, hidden]: rotary pairs (0, 1), (2, 3) become (0, D/2), (1, D/2 + 1)."""
    *outer, head_dim, width = heads.shape
    pairs = heads.reshape(*outer, head_dim // 2, 2, width)
    return pairs.transpose(-3, -2).reshape(*outer, head_dim, width)


def split_gate_up(fc1: Tensor, model: Architecture) -> tuple[Tensor, Tensor]:
    """Return gate and up, each [ffn, hidden]."""
    _require_shape("gate_up", fc1, (2 * model.ffn_hidden_size, model.hidden_size))
    gate, up = fc1.chunk(2)
    return gate, up


def cut_vocabulary(table: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return the rows of tokens that exist, [vocabulary, hidden]."""
    _require_shape("vocabulary", table, (model.padded_vocab_size, model.hidden_size))
    return (table[: model.vocab_size],)


def plain_norm(weight: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return the factor [hidden] that multiplies the normalised vector."""
    _require_shape("norm", weight, (model.hidden_size,))
    # In fp32: a bf16 sum would lose most of what the stored weight says.
    return (weight.float() + 1 if model.zero_centered_norms else weight,)


def attention_output(weight: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return the weight as it is: its columns are the heads in the order of the queries."""
    _require_shape("linear_proj", weight, (model.hidden_size, model.num_heads * model.head_dim))
    return (weight,)


def down(weight: Tensor, model: Architecture) -> tuple[Tensor]:
    """Return the weight as it is, [hidden, ffn]."""
    _require_shape("linear_fc2", weight, (model.hidden_size, model.ffn_hidden_size))
    return (weight,)


LAYOUTS: dict[Layout, Callable[[Tensor, Architecture], tuple[Tensor, ...]]] = {
    "norm": plain_norm,
    "vocabulary": cut_vocabulary,
    "qkv": split_qkv,
    "attention_output": attention_output,
    "gate_up": split_gate_up,
    "down": down,
}


def _require_shape(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"expected {what} weights of shape {list(expected)}, from the training arguments; got "
            f"{list(tensor.shape)}"
        )
