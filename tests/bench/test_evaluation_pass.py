"""The bench of evaluation: what it times, at a size that tells nothing of speed."""

import csv
from pathlib import Path

import numpy as np

from megatron_infoentropy.bench import evaluation_pass
from megatron_infoentropy.bench.evaluation_pass import Shape, _row, bench_evaluation

TINY = Shape(vocabulary=60, hidden=64, layers=1, context=16, tokens=100, batch_tokens=40)
FACTS = dict.fromkeys(("device", "torch", "megatron_core", "commit"), "x") | {"date": "2026-11-23"}


def test_each_pass_is_set_against_the_bare_forward_of_the_same_batches(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(evaluation_pass, "provenance", lambda: FACTS)
    rows = bench_evaluation(TINY, rounds=3, output=tmp_path)
    assert [row.name for row in rows] == ["forward", "evaluation", "log-softmax"]
    assert (rows[0].times_forward, rows[0].times_forward_low) == (1, 1)
    assert all(row.times_forward_low <= row.times_forward <= row.times_forward_high for row in rows)
    (path,) = tmp_path.glob("evaluation_*_202611.csv")
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert [line["name"] for line in table] == [row.name for row in rows]
    assert {line["commit"] for line in table} == {"x"}
    assert {line["vocabulary"] for line in table} == {"60"}


def test_the_ratio_is_taken_round_by_round():
    forward = [1.0, 10.0, 2.0, 50.0, 3.0]  # the machine was busy in some rounds
    row = _row("evaluation", list(np.multiply(forward, [1.1, 1.2, 1.1, 1.1, 1.0])), forward)
    assert np.isclose(row.times_forward, 1.1)
    assert 1.0 <= row.times_forward_low <= row.times_forward_high <= 1.2
