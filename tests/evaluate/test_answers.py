"""The report's answers: what they say, and what they must not claim."""

import json
import re
from pathlib import Path

import pytest
from example_answers import write_answers
from example_runs import write_run, write_runs

from megatron_infoentropy.evaluate.report import report_data, write_report
from megatron_infoentropy.evaluate.runs import load_run


def written(runs: list[Path], output: Path) -> tuple[str, dict]:
    page = write_report(runs, output)
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return page.read_text(encoding="utf-8"), data


def data_of(*runs: Path) -> dict:
    return report_data([load_run(run) for run in runs])


def answers_of(data: dict) -> list[str]:
    return [answer["short"] for answer in data["verdict"]["answers"]]


def figures_of(page: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)


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
        assert ("(off the scale)" in figure) == (number in (0, 5, 6)), number
    assert len(figures_of(page)) == 9
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
    assert len(figures_of(page)) == 3
    assert answers_of(data) == ["Nothing to compare.", "Unknown.", "Not at all."]
    assert page.index("<svg ") < page.index("<h2>"), "the curves are on the first screen"
    assert "a has logged 200 of 400 steps." in page


def test_one_evaluated_run_and_a_run_without_log_are_enough(tmp_path):
    run = write_run(tmp_path / "a", objective="infoentropy", gamma=2.0)
    (run / "train.log").unlink()
    write_answers(run, 1)
    page, data = written([run], tmp_path)
    assert len(figures_of(page)) == 2
    assert "there is no cross-entropy run" in data["task_comparisons"][0]["refusal"]
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


def test_gamma_zero_counts_as_cross_entropy(tmp_path):
    zero = write_run(tmp_path / "zero", objective="infoentropy", gamma=0)
    data = data_of(zero, write_run(tmp_path / "one", objective="infoentropy"))
    assert data["comparisons"][0]["baseline"] == "cross entropy"
    assert data["comparisons"][0]["rows"]


def test_a_diverged_run_is_reported_not_fatal(tmp_path):
    run = write_run(tmp_path / "a", evaluated=False)
    log = (run / "train.log").read_text()
    (run / "train.log").write_text(
        re.sub(r"cross entropy: [\d.E+]+ \| w", "cross entropy: nan | w", log, count=1)
    )
    data = data_of(run)
    assert data["runs"][0]["training"]["cross entropy"]["iterations"] == list(range(20, 401, 10))
