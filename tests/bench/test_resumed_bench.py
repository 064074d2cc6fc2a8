"""A bench that is stopped or fails keeps what it has and goes on from there."""

from unittest import mock

import pytest

from megatron_infoentropy.bench import run
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.results import read_csv, row_of_case

CASES = [Case(8, 64 * n) for n in (1, 2, 3)]
NOTHING = {"threads": 1, "clock": "wall time", "by": "ours", "computes": "", "step": "both"}


@pytest.fixture
def measured(monkeypatch, facts):
    """Cases in the order in which they were measured; one of 128 entries fails while it is bad."""
    found = []

    def measure(case, compiled, device, repeats):
        found.append(case)
        if case.vocabulary == 128 and measure.fails:
            raise measure.fails
        return [row_of_case(case, kind="loss", provider="native", median_ms=1.0, **NOTHING)]

    measure.fails = None
    monkeypatch.setattr(run, "_measure", measure)
    monkeypatch.setattr(run.results, "provenance", lambda: facts)
    monkeypatch.setattr(run, "gc", mock.Mock())  # which takes seconds where much is imported
    return found, measure


def test_a_stopped_run_keeps_its_rows_and_goes_on(measured, tmp_path):
    found, measure = measured
    path = tmp_path / "bench.csv"
    measure.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run.bench(CASES, repeats=1, output=path, resume=True)
    assert [row.case for row in read_csv(path)[0]] == [Case(8, 64)]
    measure.fails = None
    rows = run.bench(CASES, repeats=1, output=path, resume=True)
    assert [case.vocabulary for case in found] == [64, 128, 128, 192]
    assert [row.vocabulary for row in rows] == [64, 128, 192]
    assert [row.vocabulary for row in read_csv(path)[0]] == [64, 128, 192]


def test_a_file_of_another_commit_is_begun_anew(measured, tmp_path, facts):
    found, _ = measured
    path = tmp_path / "bench.csv"
    run.bench(CASES, repeats=1, output=path, resume=True)
    facts["commit"] = "0000000"
    run.bench(CASES, repeats=1, output=path, resume=True)
    assert len(found) == 6


def test_a_case_that_fails_is_a_row_with_the_reason(measured):
    _, measure = measured
    measure.fails = MemoryError("17 GiB")
    rows = run.bench(CASES, repeats=1)
    assert [row.reason for row in rows] == ["", "it failed: MemoryError: 17 GiB", ""]
