"""The layouts, on tensors whose every row says what it is."""

import pytest
import torch
from tiny_checkpoint import FAMILIES, tiny_args

from megatron_infoentropy.convert.architecture import architecture_of
from megatron_infoentropy.convert.layout import (
    LAYOUTS,
    cut_vocabulary,
    head_norm,
    pair_halves,
    plain_norm,
    split_gate_up,
    split_qkv,
)
from megatron_infoentropy.convert.naming import LayoutName


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1), (8, 2)])
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
    assert torch.equal(pair_halves(rows, 1, 8)[1, :, 2], expected)
    expected = torch.tensor([0.0, 2, 1, 3, 4, 5, 6, 7])
    assert torch.equal(pair_halves(rows, 1, 4)[1, :, 2], expected), "the rest stays in its place"


def test_interleaving_moves_queries_and_keys_but_not_values() -> None:
    plain, interleaved = (
        architecture_of(tiny_args(rotary_interleaved=flag), None) for flag in (False, True)
    )
    qkv = torch.randn(64, 32)
    for kind, (before, after) in enumerate(
        zip(split_qkv(qkv, plain), split_qkv(qkv, interleaved), strict=True)
    ):
        assert torch.equal(before, after) == (kind == 2)


def test_norms_of_heads_are_reordered_with_the_rows_they_multiply() -> None:
    model = architecture_of(tiny_args(qk_layernorm=True, rotary_interleaved=True), None)
    (weight,) = head_norm(torch.arange(8.0), model)
    assert weight.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_gpt_2_has_queries_keys_and_values_side_by_side_in_columns() -> None:
    model = architecture_of(tiny_args(**FAMILIES["gpt2"]), None)
    rows = torch.arange(96.0)[:, None].expand(96, 32)  # 4 heads of query, key, value of 8 rows
    (columns,) = LAYOUTS["qkv_in_columns"].to_hf(rows, model)
    queries, keys, values = columns[0].view(3, 4, 8)
    assert queries[1].tolist() == list(range(24, 32))
    assert keys[1].tolist() == list(range(32, 40))
    assert values[3].tolist() == list(range(88, 96))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_there_and_back_is_the_same(name: LayoutName, family: str) -> None:
    model = architecture_of(tiny_args(**FAMILIES[family], vocab_size=64), None)
    heads, groups = model.num_heads, model.num_groups
    rows = (heads + 2 * groups) * 8 if "qkv" in name else 64
    if name == "qkv_in_columns" and heads != groups:
        return  # GPT-2 has no groups
    for shape in ((rows, 32), (rows,)):
        tensor = torch.randn(shape)
        parts = LAYOUTS[name].to_hf(tensor, model)
        assert torch.equal(LAYOUTS[name].to_megatron(parts, model), tensor)


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
