"""Shapes: the grids are the ones that the targets are stated for, mistakes are named."""

import pytest

from megatron_infoentropy.bench.cases import HEADLINE, Case, adapt, grid


def test_the_full_grid_is_every_shape_whole_and_as_a_shard_of_eight():
    cases = grid("full")
    assert len(cases) == len(set(cases)) == 3 * 3 * 2 * 2
    assert {case.tokens for case in cases} == {4096, 8192, 16384}
    assert {case.vocabulary for case in cases} == {32000, 128256, 262144}
    assert {case.dtype for case in cases} == {"bfloat16", "float32"}
    assert {case.columns for case in cases if case.shard_of == 8} == {4000, 16032, 32768}
    assert (cases[0].tokens, cases[0].vocabulary, cases[0].dtype) == (*HEADLINE, "bfloat16")
    assert {(c.tokens, c.vocabulary) for c in cases if c.compiled} == {HEADLINE}


def test_the_small_grid_has_both_dtypes_and_two_ranks():
    cases = grid("small")
    assert [case.dtype for case in cases] == ["float32", "bfloat16", "float32"]
    assert [case.tensor_parallel for case in cases] == [1, 1, 2]


@pytest.mark.parametrize("name", ["small", "headline", "full"])
def test_tiny_grids_keep_what_cases_are(name):
    whole, tiny = grid(name), adapt(grid(name), tiny=True, compiled=False)
    for before, after in zip(whole, tiny, strict=True):
        kept = ("dtype", "tensor_parallel", "shard_of")
        assert all(getattr(before, field) == getattr(after, field) for field in kept)
        assert after.tokens * after.vocabulary <= before.tokens * before.vocabulary / 4000
        assert not after.compiled
    assert adapt(whole, tiny=False, compiled=True) == whole


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Case(8, 64, "int8"), "dtype must be float32 or bfloat16"),
        (lambda: Case(8, 65, tensor_parallel=2), "does not split evenly over 2 ranks"),
        (lambda: Case(0, 64), "must be positive"),
        (lambda: grid("huge"), "grid must be small, headline or full"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
