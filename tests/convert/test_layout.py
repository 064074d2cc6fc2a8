"""The layouts, on tensors whose every row says what it is."""

import pytest
import torch
from tiny_checkpoint import tiny_args

from megatron_infoentropy.convert.architecture import architecture_of
from megatron_infoentropy.convert.layout import (
    cut_vocabulary,
    pair_halves,
    plain_norm,
    split_gate_up,
    split_qkv,
)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1), (6, 2)])
def test_queries_keys_and_values_are_taken_from_the_rows_of_their_group(
    heads: int, groups: int
) -> None:
    width = 2
    model = architecture_of(
        tiny_args(num_attention_heads=heads, num_query_groups=groups, kv_channels=width), None
    )
    rows = []  # (kind 0 query 1 key 2 value, index of the head, row of the head)
    for group in range(groups):
        for head in range(heads // groups):
            rows += [(0, group * (heads // groups) + head, row) for row in range(width)]
        rows += [(1, group, row) for row in range(width)]
        rows += [(2, group, row) for row in range(width)]
    marked = torch.zeros(len(rows), model.hidden_size)
    marked[:, :3] = torch.tensor(rows, dtype=torch.float32)
    for kind, part in enumerate(split_qkv(marked, model)):
        count = heads if kind == 0 else groups
        expected = [[kind, head, row] for head in range(count) for row in range(width)]
        assert part[:, :3].tolist() == expected


def test_interleaved_pairs_become_halves() -> None:
    rows = torch.arange(8.0)[None, :, None].expand(3, 8, 5)  # three heads of eight rows
    expected = torch.tensor([0.0, 2, 4, 6, 1, 3, 5, 7])
    assert torch.equal(pair_halves(rows)[1, :, 2], expected)


def test_interleaving_moves_queries_and_keys_but_not_values() -> None:
    plain, interleaved = (
        architecture_of(tiny_args(rotary_interleaved=flag), None) for flag in (False, True)
    )
    qkv = torch.randn(64, 32)
    for kind, (before, after) in enumerate(
        zip(split_qkv(qkv, plain), split_qkv(qkv, interleaved), strict=True)
    ):
        assert torch.equal(before, after) == (kind == 2)


def test_the_gate_comes_first() -> None:
    model = architecture_of(tiny_args(), None)
    gate, up = split_gate_up(torch.arange(96.0)[:, None].expand(96, 32), model)
    assert gate[:, 0].tolist() == list(range(48))
    assert up[:, 0].tolist() == list(range(48, 96))


def test_only_the_padding_of_the_vocabulary_is_cut() -> None:
    model = architecture_of(tiny_args(), None)
    (table,) = cut_vocabulary(torch.arange(64.0)[:, None].expand(64, 32), model)
    assert table[:, 0].tolist() == list(range(60))


def test_zero_centred_norms_get_their_one_back_in_fp32() -> None:
    model = architecture_of(tiny_args(layernorm_zero_centered_gamma=True), None)
    stored = torch.full((32,), 0.001, dtype=torch.bfloat16)  # 1 + 0.001 is 1 in bf16
    (weight,) = plain_norm(stored, model)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.full((32,), 1.001), atol=1e-5, rtol=0)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes() -> None:
    model = architecture_of(tiny_args(), None)
    with pytest.raises(ValueError, match=r"\[64, 32\].*got \[66, 32\]"):
        split_qkv(torch.zeros(66, 32), model)
