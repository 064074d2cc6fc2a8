"""What stands in the report beside the comparison: files, passages, tasks, the smallest effect."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from example_runs import write_run

from megatron_infoentropy.evaluate.report import report_data, write_report
from megatron_infoentropy.evaluate.runs import load_run
from megatron_infoentropy.tasks.results import Metric, TaskResult


def four_runs(folder: Path) -> list[Path]:
    return [
        write_run(folder / f"{objective}-{seed}", objective=objective, seed=seed, shift=shift)
        for objective, shift in (("cross_entropy", 0.0), ("infoentropy", -0.3))
        for seed in (1, 2)
    ]


def written(runs: list[Path], output: Path) -> tuple[str, dict]:
    page = write_report(runs, output)
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return page.read_text(encoding="utf-8"), data


def test_every_figure_is_a_file_of_its_own_with_its_numbers(tmp_path):
    runs = four_runs(tmp_path)
    (tmp_path / "report.figures").mkdir()
    (tmp_path / "report.figures" / "old.svg").touch()
    page, data = written(runs, tmp_path)
    names = re.findall(r'href="report\.figures/([\w-]+)\.svg"', page)
    assert len(names) == page.count("<svg ")
    files = {path.name for path in (tmp_path / "report.figures").iterdir()}
    assert files == {f"{name}.{ending}" for name in names for ending in ("svg", "csv")}
    for name in files:
        assert f'href="report.figures/{name}"' in page
        text = (tmp_path / "report.figures" / name).read_text(encoding="utf-8")
        if name.endswith(".svg"):
            ElementTree.fromstring(text)
            assert "var(" not in text
        else:
            lengths = {len(row) for row in csv.reader(text.splitlines())}
            assert len(lengths) == 1
    with (tmp_path / "report.figures" / "differences.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["name"] == "low")
    expected = next(r for r in data["comparisons"][0]["rows"] if r["name"] == "low")
    assert float(row["difference"]) == expected["difference"]


def test_the_smallest_effect_is_stated_or_that_there_is_none(tmp_path):
    four = four_runs(tmp_path)
    (sentence,) = report_data([load_run(run) for run in four])["verdict"]["smallest_effects"]
    assert re.search(r"all tokens 0\.\d{4}, high-frequency tokens 0\.\d{4}", sentence)
    one = report_data([load_run(four[0]), load_run(four[2])])
    assert "no difference of any size" in one["verdict"]["smallest_effects"][0]


def test_a_passage_shows_which_tokens_weigh_most_and_corpus_text_is_escaped(tmp_path):
    run = write_run(tmp_path / "a", objective="infoentropy", gamma=1.0)
    summary = json.loads((run / "evaluation.json").read_text())
    summary["passage"]["text"][0] = "<script>alert(1)</script>"
    (run / "evaluation.json").write_text(json.dumps(summary))
    page, data = written([run], tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    (passage,) = data["passages"]
    weights = [token["weight"] for token in passage["tokens"]]
    assert sum(weights) / len(weights) == pytest.approx(1)
    entropies = summary["passage"]["entropy"]
    assert weights[0] / weights[4] == pytest.approx((1 + entropies[0]) / (1 + entropies[4]))
    assert passage["tokens"][0]["level"] == 5
    assert f'class="w5" title="weight {weights[0]:.2f}, entropy 6.10, cross entropy 5.10"' in page


def test_tasks_are_shown_by_setting_with_their_standard_errors(tmp_path):
    runs = four_runs(tmp_path)
    for index, run in enumerate(runs[:3]):
        TaskResult("arc_easy", 5, None, 200, "key", {"acc": Metric(0.3 + index / 100, 0.02)}).save(
            run / "tasks" / "arc_easy-5shot.json"
        )
    page, data = written(runs, tmp_path)
    (row,) = data["tasks"]
    assert (row["task"], row["metric"], row["samples"]) == ("arc_easy-5shot", "acc", 200)
    first, second = row["cells"]
    assert first["mean"] == pytest.approx(0.305)
    assert first["stderr"] == pytest.approx(0.02)
    assert second["runs"] == 1
    assert "0.3050 &plusmn; 0.0200" in page


def test_missing_runs_are_named_on_the_page(tmp_path):
    run = write_run(tmp_path / "a")
    page = write_report([run], tmp_path, notes=["2 of 3 planned runs are missing: x, y."])
    assert "2 of 3 planned runs are missing: x, y." in page.read_text(encoding="utf-8")
