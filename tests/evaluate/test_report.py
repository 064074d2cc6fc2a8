"""The report: what it shows, what it must not claim, and that it stands alone."""

import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from example_runs import DOMAINS, write_run, write_runs

from megatron_infoentropy.evaluate.report import report_data, write_report
from megatron_infoentropy.evaluate.runs import load_run

FIGURES = ("differences-by-difficulty", "train-cross-entropy", "train-entropy-distribution",
           "train-weight-distribution", "differences", "differences-by-decile", "weights",
           "calibration")  # fmt: skip


def written(runs: list[Path], output: Path) -> tuple[str, dict]:
    page = write_report(runs, output)
    assert page == output / "report.html"
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return page.read_text(encoding="utf-8"), data


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    folder = tmp_path_factory.mktemp("four")
    shifts = {"cross_entropy": 0.0, "infoentropy": -0.3}
    return written(write_runs(folder / "runs", shifts, (1, 2)), folder)


def data_of(*runs: Path) -> dict:
    return report_data([load_run(run) for run in runs])


def answers_of(data: dict) -> list[str]:
    return [answer["short"] for answer in data["verdict"]["answers"]]


def figures_of(page: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)


def test_the_page_holds_every_figure_as_well_formed_inline_svg(four):
    page, _ = four
    figures = figures_of(page)
    assert len(figures) == len(FIGURES)
    for name, figure in zip(FIGURES, figures, strict=True):
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        ids = re.findall(r'\bid="([^"]+)"', figure)
        assert ids
        assert all(identifier.startswith(f"{name}-") for identifier in ids)
        for reference in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', figure):
            assert "".join(reference) in ids
    ids = [name for figure in figures for name in re.findall(r'\bid="([^"]+)"', figure)]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_from_outside(four):
    page, _ = four
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) == namespaces
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\((?!#)", page)


def test_every_colour_of_a_figure_follows_the_theme(four):
    page, _ = four
    for figure in figures_of(page):
        bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", figure)
        assert re.findall(r"#[0-9a-f]{6}\b", bare) == []


def test_tags_are_closed_and_nested(four):
    class Nesting(html.parser.HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Nesting()
    parser.feed(four[0])
    assert parser.open == []


def test_the_json_beside_it_holds_what_the_page_is_made_of(four):
    page, data = four
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


@pytest.mark.parametrize(
    ("shift", "helped", "where"),
    [
        (-0.3, "Yes.", "Better on less frequent tokens, rare tokens, hard tokens"),
        (0.0, "No difference shown.", "No part shows a difference."),
        (0.4, "No, it hurt.", "Worse on less frequent tokens, rare tokens, hard tokens"),
    ],
)
def test_the_answers_say_whether_it_helped_and_on_what(tmp_path, shift, helped, where):
    shifts = {"cross_entropy": 0.0, "infoentropy": shift}
    data = data_of(*write_runs(tmp_path, shifts, (1, 2, 3)))
    answers = data["verdict"]["answers"]
    assert answers[0]["short"] == helped
    assert answers[1]["short"].startswith(where)
    rows = {(row["kind"], row["name"]): row for row in data["comparisons"][0]["rows"]}
    if shift:
        size = abs(rows["total", "all tokens"]["difference"])
        assert f"by {size:.4f} nats per token" in answers[0]["more"]
        assert (
            f"rare tokens by {abs(rows['bucket', 'low']['difference']):.4f}" in (answers[1]["more"])
        )
    assert "the second in at most 15" in answers[2]["more"], "buckets, difficulty, domains"
    assert "need not hold there" in data["verdict"]["limits"][0]


def test_settings_are_counted_and_one_far_off_does_not_hide_the_others(tmp_path):
    shifts = {"cross_entropy": 0.0, "infoentropy": -0.3, "focal": 0.0, "dft": 4.0}
    runs = write_runs(tmp_path, shifts, (1, 2, 3))
    runs.append(write_run(tmp_path / "eaft", objective="eaft", fingerprint="e" * 64))
    page, data = written(runs, tmp_path)
    assert ", paper normalization is not compared: the runs were evaluated on different" in page
    helped, where, sure = data["verdict"]["answers"]
    assert helped["short"] == "It depends: 1 of 3 helped, 1 hurt."
    assert "Over all held-out text nothing tells focal" in helped["more"]
    assert where["short"] == "1 of 3 settings gain somewhere and 1 of 3 settings lose somewhere."
    assert re.match(r"True differences of 0\.\d{4} to 0\.\d{4} nats per token, by", sure["short"])
    for number, figure in enumerate(figures_of(page)):
        assert ("(off the scale)" in figure) == (number in (0, 4, 5)), FIGURES[number]
    assert len(figures_of(page)) == len(FIGURES)
    assert len(data["passages"]) == 3, "of four weighted settings"


def test_with_one_seed_each_nothing_is_decided(tmp_path):
    runs = [
        write_run(tmp_path / "a", objective="cross_entropy"),
        write_run(tmp_path / "b", objective="infoentropy", shift=-0.3),
    ]
    page, data = written(runs, tmp_path)
    (comparison,) = data["comparisons"]
    assert answers_of(data)[0] == "Undecided."
    assert {row["detectable"] for row in comparison["rows"]} == {None}
    assert "better" not in {row["reading"] for row in comparison["rows"]}
    assert "No difference of any size" in data["verdict"]["answers"][2]["more"]
    assert "seed noise unknown" in page


def test_one_run_without_evaluation_gives_its_curves_and_no_claim(tmp_path):
    run = write_run(tmp_path / "a", evaluated=False, steps=200)
    page, data = written([run], tmp_path)
    assert len(figures_of(page)) == 2
    assert answers_of(data) == ["Not measured.", "Unknown.", "Not at all."]
    assert page.index("<svg ") < page.index("<h2>"), "the curves are on the first screen"
    assert "a has logged 200 of 400 steps." in page


def test_one_evaluated_run_and_a_run_without_log_are_enough(tmp_path):
    run = write_run(tmp_path / "a", objective="infoentropy", gamma=2.0)
    (run / "train.log").unlink()
    page, data = written([run], tmp_path)
    assert len(figures_of(page)) == 2
    assert "there is no cross-entropy run" in data["verdict"]["answers"][0]["more"]
    assert data["runs"][0]["last_iteration"] == 0


def test_runs_of_other_length_seed_or_data_are_not_compared(tmp_path):
    def refusal(**other) -> str:
        run = write_run(tmp_path / next(iter(other)), objective="infoentropy", **other)
        return data_of(baseline, run)["comparisons"][0]["refusal"]

    baseline = write_run(tmp_path / "ce", objective="cross_entropy", seed=1)
    assert "no cross-entropy run of the same size" in refusal(train_iters=800)
    assert "no seed was trained and evaluated" in refusal(seed=7)
    assert "were evaluated on different tokens, or with" in refusal(fingerprint="e" * 64)


def test_a_repeated_seed_is_drawn_but_not_compared(tmp_path):
    data = data_of(*(write_run(tmp_path / name, seed=1) for name in ("a", "b")))
    assert data["groups"][0]["repeated"] == [1]
    assert "b, as it repeats objective, set-up and seed of a" in " ".join(data["verdict"]["limits"])


def test_a_bucket_that_does_not_occur_is_left_blank(tmp_path):
    run = write_run(tmp_path / "a")
    summary = json.loads((run / "evaluation.json").read_text())
    summary["buckets"]["low"] = {
        "tokens": 0, "nats_per_token": None, "perplexity": None, "mean_entropy": None
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(summary))
    page, _ = written([run], tmp_path)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().split()


def test_gamma_zero_counts_as_cross_entropy(tmp_path):
    zero = write_run(tmp_path / "zero", objective="infoentropy", gamma=0)
    data = data_of(zero, write_run(tmp_path / "one", objective="infoentropy"))
    assert data["comparisons"][0]["baseline"] == "cross entropy"
    assert data["comparisons"][0]["rows"]


def test_a_diverged_run_is_reported_not_fatal(tmp_path):
    run = write_run(tmp_path / "a", evaluated=False)
    log = (run / "train.log").read_text()
    (run / "train.log").write_text(re.sub(r"grad norm: 0.812", "grad norm: nan", log))
    data = data_of(run)
    assert "grad norm" not in data["runs"][0]["training"]
    assert "cross entropy" in data["runs"][0]["training"]


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
    (figure,) = [one for one in figures_of(page.read_text()) if "train-entropy" in one]
    lines = re.findall(r'd="([^"]*)"[^>]*fill: none; stroke: var\(--series', figure)
    one, other = sorted(lines, key=len)[-2:]  # the others are the key's
    assert one != other


def test_what_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], tmp_path)
    for text in ("[]", "{"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json is not a readable run description"):
            write_report([tmp_path], tmp_path)
    (tmp_path / "run.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="does not say objective"):
        write_report([tmp_path], tmp_path)
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
