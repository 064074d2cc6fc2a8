"""What stands in the report beside the comparison: files, passages, tasks, the smallest effect."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_runs import write_run, write_runs
from matplotlib.figure import Figure

from megatron_infoentropy.evaluate import plots, wording
from megatron_infoentropy.evaluate.figure import legend
from megatron_infoentropy.evaluate.report import report_data, write_report
from megatron_infoentropy.evaluate.runs import load_run
from megatron_infoentropy.tasks.results import Metric, TaskResult

EVIL = "<script>alert(1)</script>"
NOTE = "2 of 6 planned runs are missing: x, y."


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report of four runs: three have answered a task, one corpus text is a script."""
    folder = tmp_path_factory.mktemp("parts")
    runs = write_runs(folder, {"cross_entropy": 0.0, "infoentropy": -0.3}, (1, 2))
    for index, run in enumerate(runs[:3]):
        metrics = {"acc": Metric(0.3 + index / 100, 0.02)}
        result = TaskResult("arc_easy", 5, None, 200, "key", metrics)
        result.save(run / "tasks" / "arc_easy-5shot.json")
    summary = json.loads((runs[2] / "evaluation.json").read_text())
    summary["passage"]["text"][0] = EVIL
    (runs[2] / "evaluation.json").write_text(json.dumps(summary))
    (folder / "report.figures").mkdir()
    (folder / "report.figures" / "old.svg").touch()
    write_report(runs, folder, notes=[NOTE])
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("write", "value", "words"),
    [
        (wording.nats, 0.01534, "0.0153"),
        (wording.nats, 16.5314, "16.53"),
        (wording.signed, -16.5314, "\N{MINUS SIGN}16.53"),
        (wording.perplexity, 83.14, "83.14"),
        (wording.perplexity, 9_584.4, "9,584"),
        (wording.perplexity, 8_181_254_191.0, "8.18B"),
        (wording.relative, 0.0134, "+1.35\N{NO-BREAK SPACE}%"),
        (wording.relative, 16.5314, "\N{MULTIPLICATION SIGN} 15.1M"),
        (wording.relative, 800.0, "\N{MULTIPLICATION SIGN} e^800"),
    ],
)
def test_numbers_of_a_model_that_has_diverged_can_be_read_too(write, value, words):
    assert write(value) == words


def test_every_figure_is_a_file_of_its_own(folder, page):
    names = re.findall(r'href="report\.figures/([\w-]+)\.svg"', page)
    assert len(names) == page.count("<svg ")
    files = {path.name for path in (folder / "report.figures").iterdir()}
    assert files == {f"{name}.svg" for name in names}
    for name in files:
        assert f'href="report.figures/{name}"' in page
        text = (folder / "report.figures" / name).read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "var(" not in text


def test_a_passage_shows_which_tokens_weigh_most_and_corpus_text_is_escaped(page, data):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    (passage,) = data["passages"]
    assert passage["tokens"][0]["text"] == EVIL
    weights = [token["weight"] for token in passage["tokens"]]
    assert sum(weights) / len(weights) == pytest.approx(1)
    entropies = [token["entropy"] for token in passage["tokens"]]
    assert weights[0] / weights[4] == pytest.approx((1 + entropies[0]) / (1 + entropies[4]))
    assert passage["tokens"][0]["level"] == 5
    assert f'class="w5" title="weight {weights[0]:.2f}, entropy 6.10, cross entropy 5.10"' in page


class Texts(HTMLParser):
    """The text between the tags of a page, and the names of the tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)


NAMES = (
    "<img src=x>&amp;\"'",
    "<script>1</script>]]>--><!--x",
    "[bold]a[/b] :smile:",
    "a$b$ {{ 1 }} %s",
    '#0072b2 id="a',
    "_nolegend_",
)


def test_names_stand_on_the_page_and_in_its_figures_as_they_are(tmp_path):
    runs = []
    for seed, name in enumerate(NAMES, start=1):
        facts = {"device": name, "versions": {name: name}, "command": [name]}
        run = tmp_path / str(seed)
        write_run(run, name=name, objective="infoentropy", seed=seed, **facts)
        text = (run / "evaluation.json").read_text()
        text = text.replace('"Python documentation"', json.dumps(name))
        (run / "evaluation.json").write_text(text)
        result = TaskResult(name, None, None, 9, "key", {"acc": Metric(0.5, 0.1)})
        result.save(run / "tasks" / f"{seed}.json")
        runs.append(run)
    text = write_report(runs, tmp_path, notes=NAMES).read_text(encoding="utf-8")
    page = Texts(text)
    assert not {"img", "script"} & page.tags
    figures = Texts("".join(re.findall(r"<svg .*?</svg>", text, re.DOTALL)))
    for name in NAMES:
        named = [one for one in page.texts if name in one]
        assert len(named) > 7, name  # tables, versions, a legend, domain, note, ...
        assert name in "".join(figures.texts)


def test_tasks_are_shown_by_setting_with_their_standard_errors(page, data):
    (row,) = data["tasks"]
    assert (row["task"], row["metric"], row["samples"]) == ("arc_easy-5shot", "acc", 200)
    first, second = row["cells"]
    assert first["mean"] == pytest.approx(0.305)
    assert first["stderr"] == pytest.approx(0.02)
    assert second["runs"] == 1
    assert "0.3050 &plusmn; 0.0200" in page


def test_missing_runs_are_named_on_the_page(page):
    assert NOTE in page


def test_commands_name_no_folder_of_the_machine_that_ran_them(tmp_path, monkeypatch):
    words = ["/opt/venv/bin/python3", "--save", str(tmp_path / "out" / "a" / "checkpoints"),
             "--seed", "1", "--data", str(tmp_path / "tokens")]  # fmt: skip
    run = load_run(write_run(tmp_path / "out" / "a", command=words, evaluated=False))
    monkeypatch.chdir(tmp_path)
    command = report_data([run])["runs"][0]["info"]["command"]
    assert command == ["python", "--save", "out/a/checkpoints", "--seed", "1", "--data", "tokens"]
    monkeypatch.chdir("/")
    assert report_data([run])["runs"][0]["info"]["command"][0] == "python"


def test_no_setting_s_weights_are_cut_off_by_those_of_the_first(tmp_path, monkeypatch):
    runs = [
        write_run(tmp_path / objective, objective=objective, evaluated=False)
        for objective in ("focal", "infoentropy")
    ]
    log = (runs[1] / "train.log").read_text()
    (runs[1] / "train.log").write_text(re.sub(r"weight max: [\d.]+", "weight max: 99", log))
    monkeypatch.setattr(plots, "finished", lambda name, axes, words: axes)
    axes = plots.distribution_over_training(report_data([load_run(run) for run in runs]), "weight")
    assert axes.get_ylim()[1] >= max(line.get_ydata().max() for line in axes.lines)


def test_a_diverged_training_does_not_hide_how_the_others_end(tmp_path, monkeypatch):
    runs = write_runs(tmp_path, {"cross_entropy": 0.0, "focal": 0.0, "dft": 0.0}, (1, 2))
    data = report_data([load_run(run) for run in runs])
    for run in data["runs"][-2:]:
        values = run["training"]["cross entropy"]["values"]
        run["training"]["cross entropy"]["values"] = [max(values)] * 2 + [20.0] * (len(values) - 2)
    monkeypatch.setattr(plots, "finished", lambda name, axes, words: axes)
    axes = plots.training_curves(data)
    assert axes.get_ylim()[1] < 10
    legend = {line.get_label() for line in axes.lines}
    assert {text for text in legend if text.endswith("(off the scale)")} == (
        {"dft-1 (off the scale)", "dft-2 (off the scale)"}
    )


@pytest.mark.parametrize("settings", [4, 5])
def test_a_legend_that_would_hide_curves_stands_above_the_panel(settings):
    figure = Figure()
    axes = figure.add_subplot()
    for number in range(settings):
        axes.plot([0, 1], [number, number], label=str(number))
    legend(axes, "upper right")
    assert bool(figure.legends) == (settings > 4)
    assert bool(axes.get_legend()) == (settings <= 4)


def test_an_axis_of_no_differences_has_two_ends():
    row = {"kind": "total", "name": "all tokens", "difference": 0.0, "low": 0.0, "high": 0.0}
    (low, high), _ = plots._scale([({"letter": "B", "label": "focal"}, [row])])
    assert low < 0 < high
