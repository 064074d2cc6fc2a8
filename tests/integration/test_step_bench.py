"""Training steps as `infoentropy bench --steps` measures them: all losses on one real model."""

import pickle

import pytest
from launch import run_trainer

from megatron_infoentropy.bench.cases import Case

CASE = Case(512, 4000, "bfloat16")


def measure(output):
    """On a forked rank, which has Megatron ready."""
    from megatron_infoentropy.bench.step_rows import measure_steps

    output.write_bytes(pickle.dumps(measure_steps(CASE, 64, 2, 1)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    run_trainer(1, measure, (folder / "rows",), [], folder)
    return pickle.loads((folder / "rows").read_bytes())


def test_every_rival_is_timed_or_says_why_not(rows):
    ours, fused, theirs, left_out = rows
    assert [row.provider for row in rows] == [
        *("infoentropy", "infoentropy fused linear", "megatron unfused", "megatron fused")
    ]
    assert left_out.kind == "unavailable"
    assert "torch.compile is off" in left_out.reason
    assert {row.case for row in rows} == {CASE}
    assert ours.computes == "infoentropy; 4 layers of hidden size 64, 2 sequences of 256"
    assert min(row.median_ms for row in rows[:3]) > 0
    assert theirs.minus_ours_low_ms <= theirs.minus_ours_ms <= theirs.minus_ours_high_ms
    assert ours.minus_ours_ms is None
    assert 0 < ours.percent_of_step < 100
    assert 0 < theirs.percent_of_step < 100
    assert fused.percent_of_step is None


def test_sixteen_bit_logits_cost_ours_less_memory(rows):
    ours, _, theirs, _ = rows
    logits = CASE.tokens * CASE.vocabulary * 2 / 2**20
    assert theirs.peak_mib - ours.peak_mib > logits  # Megatron's copy is in fp32
