"""Result files: complete, refused without their origin, gone on with, read back as they were; pages
from them."""

import importlib.util
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from megatron_infoentropy.bench import run
from megatron_infoentropy.bench.cases import Case
from megatron_infoentropy.bench.results import (
    commit_of_this_tree,
    file_to_write,
    read_csv,
    row_of_case,
    write_csv,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def status():
    """Load tools/status.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("status", ROOT / "tools" / "status.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(case, provider, step, ms, **more):
    by = "ours" if "native" in provider else "peer"
    fields = {"kind": "loss", "by": by, "computes": "infoentropy", "threads": 2}
    fields |= {
        "clock": "wall time",
        "repeats": 5,
        "median_ms": ms,
        "p20_ms": ms - 1,
        "p80_ms": ms + 1,
    }
    return row_of_case(case, provider=provider, step=step, **(fields | more))


def example_rows(cases):
    rows = []
    for case in cases:
        for provider, scale in (("native in place", 1.0), ("torch", 9.0)):
            for step, ms in (("forward", 20.0), ("backward", 31.0), ("both", 50.0)):
                more = {"peak_mib": 250.0, "times_in_place": scale}
                rows.append(row(case, provider, step, scale * ms, **more))
        names = {"provider": "liger", "by": "peer", "computes": "", "step": ""}
        names |= {"threads": 2, "clock": "wall time", "reason": "its kernels need a GPU"}
        rows.append(row_of_case(case, kind="unavailable", **names))
        bound = {"limit": "copy", "percent_of_limit": 80.0}
        rows.append(row(case, "native", "statistics", 12.0, kind="kernel", **bound))
    return rows


@pytest.fixture
def rows():
    return example_rows([Case(2048, 32000), Case(2048, 32000, "bfloat16", tensor_parallel=2)])


def test_rows_come_back_as_they_were(rows, facts, tmp_path):
    path = tmp_path / "bench.csv"
    write_csv([asdict(row) for row in rows], facts, path)
    assert read_csv(path) == (rows, facts)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fact", ["device", "torch", "megatron_core", "commit", "date"])
def test_a_file_without_its_origin_is_refused(rows, facts, tmp_path, fact):
    with pytest.raises(ValueError, match=f"needs the {fact}"):
        write_csv([{}], facts | {fact: ""}, tmp_path / "bench.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("provider,median_ms\nnative,1.0\n")
    with pytest.raises(ValueError, match="is not a result file"):
        read_csv(tmp_path / "other.csv")


def test_the_environment_names_the_commit_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("INFOENTROPY_COMMIT", "0123456789abcdef0123456789abcdef01234567")
    assert commit_of_this_tree() == "0123456"
    monkeypatch.setenv("INFOENTROPY_COMMIT", "main")
    with pytest.raises(ValueError, match="7 to 40 hex digits"):
        commit_of_this_tree()
    monkeypatch.delenv("INFOENTROPY_COMMIT")
    with pytest.raises(ValueError, match="set INFOENTROPY_COMMIT"):
        commit_of_this_tree()


def test_a_result_file_has_its_origin_and_nothing_is_measured_without(tmp_path, monkeypatch, rows):
    measured = []
    monkeypatch.setattr(run, "_measure", lambda *_: measured.append(1) or rows)
    monkeypatch.setenv("INFOENTROPY_COMMIT", "abcdef0")
    run.bench([Case(8, 64)], repeats=1, output=tmp_path / "new" / "bench.csv")
    _, facts = read_csv(tmp_path / "new" / "bench.csv")
    assert facts["commit"] == "abcdef0"
    assert facts["torch"]
    assert "transformer_engine" in facts
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.delenv("INFOENTROPY_COMMIT")
    with pytest.raises(ValueError, match="only with the commit they belong to"):
        run.bench([Case(8, 64)], repeats=1, output=tmp_path / "bench.csv")
    assert measured == [1]


def test_pages_are_made_from_result_files(status, rows, facts, tmp_path, monkeypatch):
    monkeypatch.setattr(status, "RESULTS", tmp_path)
    write_csv([asdict(row) for row in rows], facts, tmp_path / "bench_cpu_202611.csv")
    readme, page = " ".join(status.speed().split()), status.every_case()
    line = "| native in place | infoentropy | 20.0 | 31.0 | 50.0 (49.0-51.0) | 1.00 |  | 250 |"
    assert line in page
    assert "### Example CPU, 2 cores" in page
    assert "torch 2.15.0, 2026-11-23, commit abcdef0." in page
    assert "2048 x 32000 float32, 2 threads, wall time." in page
    assert "Example CPU, 2 cores: cross entropy and entropy" in readme
    assert "take 50.0 ms" in readme
    assert "bfloat16" not in readme  # only the first case of a file
    assert "bfloat16, TP 2" in page
    assert "Not measured: liger: its kernels need a GPU." in page
    assert "| native | statistics | 12.0 (11.0-13.0) |  | 80.0 of copy |" in page
    assert "| torch, times ours: >= 8 | 9.00 | yes |" in page
    assert "| statistics, % of what bounds them: >= 80 | 80.0 | yes |" in page
    assert "| paper eager, times ours: >= 20 |  | not measured |" in page
    assert "](../tools/results/bench_cpu_202611.csv)" in page


def test_a_picture_shows_the_first_case_of_its_file(status, rows, facts, tmp_path):
    write_csv([asdict(row) for row in reversed(rows)], facts, tmp_path / "bench.csv")
    svg = status.picture(tmp_path / "bench.csv")
    bars = re.findall(
        r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+)[^"]*z\n" clip-path[^>]*fill: (#\w+)', svg
    )
    assert len(bars) == 4
    widths = {color: float(end) - float(start) for start, _, end, color in bars}
    below = {color: float(y) for _, y, _, color in bars}
    ours, peer = status.SHADES["ours"], status.SHADES["peer"]
    times = dict(zip((*ours, *peer), (20, 50, 180, 450), strict=True))  # backward lies behind
    scale = widths[ours[0]] / 20
    assert widths == pytest.approx({color: ms * scale for color, ms in times.items()}, rel=1e-3)
    assert below[ours[0]] < below[peer[0]]  # the faster one on top
    words = re.findall(r"<text.*?>(.*?)</text>", svg)
    assert {"native in place *", "torch *", "50.0 ms, 1.00 x", "450 ms, 9.00 x"} <= set(words)
    assert "2048 x 32000 bfloat16, TP 2" in words


def test_targets_of_a_gpu_are_judged_at_the_headline(status):
    case = Case(8192, 128256, "bfloat16")
    size = {"bytes": 3 * 8192 * 128256 * 2, "peak_mib": 30.0}
    size |= {"clock": "CUDA events, L2 flushed"}
    rows = [row(case, "triton in place", "both", 1.7, by="ours", times_in_place=1.0, **size)]
    plain = "triton in place (cross entropy)"
    rows.append(row(case, plain, "both", 1.6, by="ours", times_in_place=0.95))
    rows.append(row(case, "megatron unfused", "both", 13.0, times_in_place=7.6))
    rows.append(row(case, "triton", "gradient", 1.1, kind="kernel", percent_of_limit=89.0))
    layer = {"kind": "linear", "computes": "output layer, hidden size 4096, and loss"}
    rows.append(row(case, "fused loss, chunks of 4096", "both", 36.0, **layer))
    met = {words: (value, met) for words, value, met in status.targets(rows)}
    assert met["Megatron unfused, times ours: >= 7.5"] == ("7.60", "yes")
    assert met["gradient, % of the copy bandwidth: >= 90"] == ("89.0", "**no**")
    assert met["entropy, % over our plain cross entropy: <= 3"] == ("5.26", "**no**")
    assert met["peak memory, times the logits: <= 1.01"] == ("1.01", "**no**")  # 1.015
    assert met["Liger vocab-parallel, times ours: >= 3"] == ("", "not measured")
    assert met["fused output layer, hidden size 4096, ms: <= 37"] == ("36.0", "yes")
    rows[-1] = replace(rows[-1], computes="output layer, hidden size 1024, and loss")
    assert list(status.targets(rows))[-1][1:] == ["", "not measured"]


def test_result_files_of_older_commits_are_read():
    rows, facts = read_csv(ROOT / "tools" / "results" / "bench_cpu_202611.csv")
    assert list(facts)[-2:] == ["commit", "date"]
    assert facts["commit"] == "3ff86ec"
    assert {row.kind for row in rows} == {"loss", "linear", "kernel", "limit", "unavailable"}
    first = rows[0]
    assert (first.provider, first.step, first.median_ms) == ("native", "forward", 16.4814)
    assert (first.bytes, first.limit, first.percent_of_limit) == (262144000, "", None)


CASES = [Case(8, 64 * n) for n in (1, 2, 3)]
ROWS = [[row(case, "native", "both", 2.0)] for case in CASES]


@pytest.fixture
def measure(monkeypatch, facts):
    """Stands for what measures a case; its `side_effect` is what becomes of each."""
    stand_in = mock.Mock(side_effect=ROWS)
    monkeypatch.setattr(run, "_measure", stand_in)
    monkeypatch.setattr(run.results, "provenance", lambda: facts)
    monkeypatch.setattr(run, "gc", mock.Mock())  # which takes seconds where much is imported
    return stand_in


def test_a_stopped_run_keeps_its_rows_and_goes_on_at_the_same_commit(measure, tmp_path, facts):
    path = tmp_path / "bench.csv"
    measure.side_effect = [ROWS[0], KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        run.bench(CASES, repeats=1, output=path, resume=True)
    assert read_csv(path)[0] == ROWS[0]
    measure.side_effect = ROWS[1:]
    assert run.bench(CASES, repeats=1, output=path, resume=True) == [row for (row,) in ROWS]
    assert read_csv(path)[0] == [row for (row,) in ROWS]
    facts["commit"], measure.side_effect = "0000000", ROWS
    run.bench(CASES, repeats=1, output=path, resume=True)
    assert [call.args[0].vocabulary // 64 for call in measure.mock_calls] == [1, 2, 2, 3, 1, 2, 3]


def test_an_output_layer_is_measured_whole_and_once_also_where_it_fails(
    measure, monkeypatch, tmp_path
):
    layer = "output layer, hidden size 3, and loss"
    fused = row(CASES[0], "fused loss, chunks of 4", "both", 3.0, kind="linear", computes=layer)
    linear = mock.Mock(side_effect=[[fused], MemoryError("17 GiB")])
    monkeypatch.setattr(run, "measure_linear", linear)
    go_on = partial(run.bench, repeats=1, output=tmp_path / "bench.csv", resume=True)
    split = [replace(CASES[0], tensor_parallel=2), *CASES[:2]]
    whole_too = [[row(case, "native", "both", 2.0)] for case in split]
    measure.side_effect = whole_too
    for _ in range(2):
        assert go_on(split, hidden=3) == [*whole_too[0], fused, *ROWS[0], *ROWS[1]]
    for _ in range(2):
        *_, failed = go_on(split, hidden=5)
        assert (failed.provider, failed.reason) == (
            "output layer, hidden size 5, and loss",
            "it failed: MemoryError: 17 GiB",
        )
    whole, hidden, chunk, *_ = linear.mock_calls[0].args
    assert (whole, hidden, chunk) == (CASES[0], 3, 4)
    assert linear.call_count == 2


def test_a_case_that_fails_is_a_row_with_the_reason(measure):
    measure.side_effect = [ROWS[0], MemoryError("17 GiB"), ROWS[2]]
    rows = run.bench(CASES, repeats=1)
    assert [row.reason for row in rows] == ["", "it failed: MemoryError: 17 GiB", ""]


@pytest.mark.parametrize(
    ("kind", "device", "name"),
    [
        ("cuda", "NVIDIA H200", "h200"),
        ("cuda", "NVIDIA GeForce RTX 4090", "4090"),
        ("cuda", "Tesla V100-SXM2", "v100"),
        ("cpu", "AMD EPYC 9654, 2 cores", "cpu"),
    ],
)
def test_in_a_folder_a_file_is_named_by_device_and_month(tmp_path, kind, device, name):
    facts = {"device": device, "date": "2026-11-23"}
    with mock.patch("megatron_infoentropy.bench.results.find_device") as found:
        found.return_value.type = kind
        assert file_to_write(tmp_path, facts) == tmp_path / f"bench_{name}_202611.csv"
        assert file_to_write(tmp_path / "a.csv", facts) == tmp_path / "a.csv"
