"""Training steps in result files, tables and pages; intervals."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.results import read_csv, row_of_case, write_csv
from megatron_infoentropy.bench.step_rows import median_difference
from megatron_infoentropy.bench.table import tables

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def rows():
    fixed = {"kind": "step", "step": "training step", "threads": 2, "clock": "wall time"}
    model = "4 layers of hidden size 256, 8 sequences of 256"
    times = {"repeats": 9, "p20_ms": 2100.0, "p80_ms": 2300.0, "peak_mib": 525.0}
    ours = {"provider": "infoentropy", "by": "ours", "computes": f"infoentropy; {model}"}
    peer = {"provider": "megatron unfused", "by": "peer", "computes": f"cross entropy; {model}"}
    more = {"minus_ours_ms": 255.0, "minus_ours_low_ms": -3.5, "minus_ours_high_ms": 300.0}
    case = Case(2048, 32000)
    return [
        row_of_case(case, **fixed, **times, **ours, median_ms=2200.0, percent_of_step=1.64),
        row_of_case(case, **fixed, **times, **peer, median_ms=2455.0, percent_of_step=5.66, **more),
    ]


def test_rows_are_shown_with_their_difference_from_ours(rows):
    (table,) = tables(rows)
    assert table.title == "training step, 4 layers of hidden size 256, 8 sequences of 256"
    shown = [list(column.cells) for column in table.columns]
    assert shown[0] == ["infoentropy", "megatron unfused"]
    assert shown[4] == ["", "+255.0"]
    assert shown[5] == ["", "-3.5 to +300.0"]
    assert shown[6] == ["1.64", "5.66"]


def test_the_page_has_a_table_of_steps(rows, facts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    spec = importlib.util.spec_from_file_location("bench_report", TOOLS / "bench_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    write_csv(rows, facts, tmp_path / "bench_cpu_202611.csv")
    page = report.everything(tmp_path)
    assert "In training: Megatron GPT, 4 layers of hidden size 256, 8 sequences of 256." in page
    assert "| **infoentropy** | infoentropy | 2200 (2100-2300) |  | 1.64 | 525 |" in page
    assert "2455 (2100-2300) | +255.0 (-3.5 to +300.0) | 5.66 | 525 |" in page
    sys.modules.pop("bench_targets", None)


def test_a_file_from_before_there_were_steps_is_still_read(rows, facts, tmp_path):
    path = tmp_path / "bench.csv"
    write_csv(rows, facts, path)
    assert read_csv(path) == (rows, facts)
    with path.open() as file:
        lines = [
            {k: v for k, v in line.items() if "ours_" not in k} for line in csv.DictReader(file)
        ]
    with path.open("w") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    back, same_facts = read_csv(path)
    assert same_facts == facts
    assert [row.median_ms for row in back] == [2200.0, 2455.0]
    assert back[1].minus_ours_ms is None


def test_an_interval_is_of_the_pairs_not_of_the_times():
    ours = [10.0, 200.0, 30.0, 47.0, 500.0]  # the machine had other things to do
    assert median_difference([time + 5 for time in ours], ours) == (5.0, 5.0, 5.0)
    low, middle, high = median_difference([11.0, 198.0, 33.0, 51.0, 505.0], ours)
    assert middle == 3.0
    assert low < 3.0 < high
