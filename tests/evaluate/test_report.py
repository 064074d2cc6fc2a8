"""The report's page and the files beside it: whole, escaped, in need of nothing else."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_answers import write_answers
from example_runs import DOMAINS, write_run, write_runs

from megatron_infoentropy.evaluate import plots, wording
from megatron_infoentropy.evaluate.figure import short
from megatron_infoentropy.evaluate.report import report_data, write_report
from megatron_infoentropy.evaluate.runs import load_run

FIGURES = ("differences-by-difficulty", "train-cross-entropy", "train-objective",
           "train-entropy-distribution", "train-weight-distribution", "differences",
           "differences-by-decile", "weights", "calibration", "differences-by-task")  # fmt: skip
EVIL = "<script>alert(1)</script>"
NOTE = "2 of 6 planned runs are missing: x, y."


class Parsed(HTMLParser):
    """The text between the tags of a page, and the names of the tags, which are nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report of four runs: three have answered a task, one corpus text is a script."""
    folder = tmp_path_factory.mktemp("parts")
    runs = write_runs(folder, {"cross_entropy": 0.0, "infoentropy": -0.3}, (1, 2))
    for index, run in enumerate(runs[:3]):
        write_answers(run, index, tasks=["arc_easy-5shot"], items=200, acc=0.3 + index / 100)
    summary = json.loads((runs[2] / "evaluation.json").read_text())
    summary["passage"]["text"][0] = EVIL
    (runs[2] / "evaluation.json").write_text(json.dumps(summary))
    (folder / "report.figures").mkdir()
    (folder / "report.figures" / "old.svg").touch()
    assert write_report(runs, folder, notes=[NOTE]) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def figures_of(page: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)


def test_every_figure_is_well_formed_in_the_page_and_a_file_of_its_own(folder, page):
    figures = dict(zip(FIGURES, figures_of(page), strict=True))
    files = {path.name for path in (folder / "report.figures").iterdir()}
    assert files == {f"{name}.{ending}" for name in FIGURES for ending in ("svg", "csv")}
    assert all(f'href="report.figures/{name}"' in page for name in files)
    every: list[str] = []
    for name, figure in figures.items():
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        ids = re.findall(r'\bid="([^"]+)"', figure)
        assert ids
        assert all(identifier.startswith(f"{name}-") for identifier in ids)
        for reference in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', figure):
            assert "".join(reference) in ids
        every += ids
        bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", figure)
        assert re.findall(r"#[0-9a-f]{6}\b", bare) == [], "a colour that follows no theme"
        alone = (folder / "report.figures" / f"{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(alone)
        assert "var(" not in alone
    assert len(every) == len(set(every))


def test_beside_every_figure_are_its_numbers(folder, data):
    texts = {name: (folder / "report.figures" / f"{name}.csv").read_text() for name in FIGURES}
    tables = {name: list(csv.DictReader(text.splitlines())) for name, text in texts.items()}
    assert all(table and None not in table[0] for table in tables.values())
    (row,) = [row for row in tables["differences"] if row["name"] == "low"]
    (expected,) = [r for r in data["comparisons"][0]["rows"] if r["name"] == "low"]
    assert float(row["difference"]) == expected["difference"]
    for name, values in data["runs"][2]["observed"].items():
        kind, _, percentile = name.partition(" ")
        of_run = [
            row for row in tables[f"train-{kind}-distribution"]
            if (row["run"], row["percentile"]) == (data["runs"][2]["name"], percentile)
        ]  # fmt: skip
        assert [float(row["step"]) for row in of_run] == values["iterations"]


def test_the_page_needs_nothing_from_outside_and_its_tags_are_closed(page):
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) == namespaces
    assert not re.search(r"@import|url\((?!#)", page)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & Parsed(page).tags


def test_the_json_beside_it_holds_what_the_page_is_made_of(page, data):
    assert [group["label"] for group in data["groups"]] == [
        "cross entropy",
        "InfoEntropy \N{GREEK SMALL LETTER GAMMA}=1",
    ]
    assert len(data["runs"]) == 4
    for run in data["runs"]:
        assert len(run["training"]["cross entropy"]["values"]) == 40
        assert len(run["training"]["objective"]["iterations"]) == 40
        assert run["validation"]["cross entropy"]["iterations"] == [100, 200, 300, 400]
        assert run["tokens_seen"] == 400 * 16 * 256
        assert run["info"]["command"][0] == "torchrun"
        assert sum(run["evaluation"]["entropy_histogram"]["tokens"]) > 0
    (comparison,) = data["comparisons"]
    named = {(row["kind"], row["name"]) for row in comparison["rows"]}
    assert {("total", "all tokens"), ("bucket", "low"), ("decile", "10"), ("difficulty", "hard"),
            *(("domain", name) for name in DOMAINS)} <= named  # fmt: skip
    assert comparison["seeds"] == [1, 2]
    assert [curve["group"] for curve in data["weights"]["curves"]] == [1]
    for row in comparison["rows"]:
        if row["kind"] != "decile":  # these are in their figure
            assert f"{row['baseline']:.4f}" in page
            assert f"{row['detectable']:.4f}" in page
    verdict = data["verdict"]
    said = [answer[part] for answer in verdict["answers"] for part in ("short", "more")]
    for sentence in (*said, *verdict["limits"]):
        assert sentence in page
    helped, where, sure = verdict["answers"]
    assert "frequent" not in helped["short"] + helped["more"], "it rests on one test alone"
    assert "rare tokens" in where["short"]
    (total,) = [row for row in comparison["rows"] if row["kind"] == "total"]
    assert f"A true difference of {total['detectable']:.4f} nats per token" in sure["short"]
    assert "of 2 seeds and 250 documents" in sure["more"]


def test_a_passage_shows_which_tokens_weigh_most_and_corpus_text_is_escaped(page, data):
    assert "&lt;script&gt;alert(1)" in page
    (passage,) = data["passages"]
    assert passage["tokens"][0]["text"] == EVIL
    weights = [token["weight"] for token in passage["tokens"]]
    assert sum(weights) / len(weights) == pytest.approx(1)
    entropies = [token["entropy"] for token in passage["tokens"]]
    assert weights[0] / weights[4] == pytest.approx((1 + entropies[0]) / (1 + entropies[4]))
    assert passage["tokens"][0]["level"] == 5
    assert f'class="w5" title="weight {weights[0]:.2f}, entropy 6.10, cross entropy 5.10"' in page


NAMES = (
    "<img src=x>&amp;\"'",
    "<script>1</script>]]>--><!--x",
    "[bold]a[/b] :smile:",
    "a$b$ {{ 1 }} %s",
    '#0072b2 id="a',
    "_nolegend_",
)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[2:4], NAMES[4:]])
def test_names_stand_on_the_page_and_in_its_figures_as_they_are(tmp_path, names):
    runs = []
    for name, objective in zip(names, ("cross_entropy", "infoentropy"), strict=True):
        run = tmp_path / objective
        facts = {"device": name, "versions": {name: name}, "command": [name]}
        write_run(run, name=name, objective=objective, **facts)
        text = (run / "evaluation.json").read_text()
        for domain, other in zip(DOMAINS, names, strict=True):
            text = text.replace(f'"{domain}"', json.dumps(other))
        (run / "evaluation.json").write_text(text)
        write_answers(run, 1)
        for path in (run / "tasks").iterdir():
            path.write_text(path.read_text().replace('"acc"', json.dumps(name)))
        runs.append(run)
    text = write_report(runs, tmp_path, notes=names).read_text(encoding="utf-8")
    page = Parsed(text)
    assert not {"img", "script"} & page.tags
    figures = "".join(Parsed("".join(figures_of(text))).texts)
    for name in names:
        named = [one for one in page.texts if name in one]
        assert len(named) > 7, name  # tables, versions, metrics, domain, note, ...
        assert short(name, 24) in figures


def test_tasks_are_shown_by_setting_and_missing_runs_are_named(page, data):
    (row,) = data["tasks"]
    assert (row["task"], row["metric"], row["samples"]) == ("arc_easy-5shot", "acc", 200)
    first, second = row["cells"]
    assert first["mean"] == pytest.approx(0.305)
    assert first["stderr"] == pytest.approx(0.02)
    assert second["runs"] == 1
    assert "0.3050 &plusmn; 0.0200" in page
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


def test_a_bucket_that_does_not_occur_is_left_blank(tmp_path):
    run = write_run(tmp_path / "a")
    summary = json.loads((run / "evaluation.json").read_text())
    summary["buckets"]["low"] = {
        "tokens": 0, "nats_per_token": None, "perplexity": None, "mean_entropy": None
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(summary))
    page = write_report([run], tmp_path).read_text()
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().split()


def test_runs_that_logged_no_step_in_common_are_reported(tmp_path):
    runs = write_runs(tmp_path, {"infoentropy": 0.0}, range(8), evaluated=False)
    for digit, run in enumerate(runs, start=1):  # of training; what was observed stays
        log = (run / "train.log").read_text()
        (run / "train.log").write_text(log.replace("/     400", f"{digit}/     400"))
    assert "train-cross-entropy" in write_report(runs, tmp_path).read_text()


def test_runs_of_one_name_have_each_its_own_curves(tmp_path):
    objectives = ("cross_entropy", "infoentropy")
    runs = [
        write_run(tmp_path / name / "seed1", objective=name, evaluated=False) for name in objectives
    ]
    page = write_report(runs, tmp_path)
    table = page.with_suffix(".figures") / "train-entropy-distribution.csv"
    curves: dict[str, list[str]] = {}
    for row in csv.DictReader(table.read_text().splitlines()):
        assert row["run"] == "seed1"
        curves.setdefault(row["setting"], []).append(row["nats"])
    one, other = curves.values()
    assert one != other


def test_what_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], tmp_path)
    run = write_run(tmp_path / "a")
    (run / "evaluation.npz").write_bytes(b"torn")
    with pytest.raises(ValueError, match="no readable evaluation"):
        write_report([run], tmp_path)
    assert not list(tmp_path.glob("*.html"))


def test_the_page_can_be_named(tmp_path):
    run = write_run(tmp_path / "a", evaluated=False)
    page = write_report([run], tmp_path / "out" / "page.html")
    assert page.name == "page.html"
    names = ["page.figures", "page.html", "page.json"]
    assert sorted(path.name for path in page.parent.iterdir()) == names
    assert "page.json" in page.read_text(encoding="utf-8")


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


def test_no_setting_s_weights_are_cut_off_by_those_of_the_first(tmp_path, monkeypatch):
    runs = [
        write_run(tmp_path / objective, objective=objective, evaluated=False)
        for objective in ("focal", "infoentropy")
    ]
    log = (runs[1] / "train.log").read_text()
    (runs[1] / "train.log").write_text(re.sub(r"weight max: [\d.]+", "weight max: 99", log))
    monkeypatch.setattr(plots, "finished", lambda name, axes, *_: axes)
    axes = plots.distribution_over_training(report_data([load_run(run) for run in runs]), "weight")
    assert axes.get_ylim()[1] >= max(line.get_ydata().max() for line in axes.lines)


def test_a_diverged_training_does_not_hide_how_the_others_end(tmp_path, monkeypatch):
    runs = write_runs(tmp_path, {"cross_entropy": 0.0, "focal": 0.0, "dft": 0.0}, (1, 2))
    data = report_data([load_run(run) for run in runs])
    for run in data["runs"][-2:]:
        values = run["training"]["cross entropy"]["values"]
        run["training"]["cross entropy"]["values"] = [max(values)] * 2 + [20.0] * (len(values) - 2)
    monkeypatch.setattr(plots, "finished", lambda name, axes, *_: axes)
    axes = plots.training_curves(data, "cross entropy")
    assert axes.get_ylim()[1] < 10
    (label,) = [line.get_label() for line in axes.lines if "off the scale" in line.get_label()]
    assert "DFT" in label
