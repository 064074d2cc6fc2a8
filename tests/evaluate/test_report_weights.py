"""The page draws the weights that a run's own loss gives, whatever it was made of."""

import json
import sys

import numpy as np
import pytest
from example_runs import write_run

from megatron_infoentropy.evaluate.report import report_data, write_report
from megatron_infoentropy.evaluate.runs import load_run

# 400 steps of 16 sequences were logged.
HALFWAY = {"gamma_schedule": "linear", "gamma_end": 3.0, "gamma_samples": 2 * 400 * 16}
SETTINGS = [
    ({"gamma": 2.0, "sigma": 0.5}, lambda ce, h: (0.5 + h) ** 2),
    ({"gamma": 1.0, "blend": 0.5}, lambda ce, h: 0.5 * (1 + h) + 0.5),
    ({"gamma": 1.0, **HALFWAY}, lambda ce, h: (1 + h) ** 2),
    ({"gamma": 0.0, **HALFWAY, "blend": 0.25}, lambda ce, h: 0.75 * (1 + h) ** 1.5 + 0.25),
    ({"objective": "focal", "gamma": 2.0}, lambda ce, h: (1 - np.exp(-ce)) ** 2),
    (
        {"objective": "focal", "gamma": 1.0, "blend": 0.5},
        lambda ce, h: 0.5 * (1 - np.exp(-ce)) + 0.5,
    ),
]


@pytest.fixture
def write(tmp_path):
    """Writes a run with a loss."""

    def write_one(loss):
        first = {"objective": "infoentropy", "gamma": 1.0} | loss
        known = {name: first[name] for name in ("objective", "gamma")}
        return write_run(tmp_path / "run", **known, sigma=loss.get("sigma", 1.0), loss=loss)

    return write_one


@pytest.mark.parametrize(("loss", "formula"), SETTINGS, ids=[str(loss) for loss, _ in SETTINGS])
def test_curve_and_passage_are_the_weights_of_the_last_step(write, loss, formula):
    run = load_run(write(loss))
    data = report_data([run])
    histogram = run.evaluation.summary["entropy_histogram"]
    filled = [i for i, tokens in enumerate(histogram["tokens"]) if tokens]
    tokens, entropy, ce = (
        np.array([histogram[name][i] for i in filled])
        for name in ("tokens", "mean_entropy", "mean_ce")
    )
    mean = np.average(formula(ce, entropy), weights=tokens)
    (curve,) = data["weights"]["curves"]
    assert curve["group"] == 0
    drawn = np.interp(entropy, data["weights"]["entropy"], curve["weight"])
    # Between the points of the curve weights are not straight.
    assert drawn[1:] == pytest.approx((formula(ce, entropy) / mean)[1:], rel=0.02)

    passage = run.evaluation.summary["passage"]
    expected = formula(np.array(passage["ce"]), np.array(passage["entropy"]))
    (found,) = data["passages"]
    weights = [token["weight"] for token in found["tokens"]]
    assert weights == pytest.approx(expected / expected.mean(), rel=1e-6)


def test_a_gamma_that_is_0_at_the_end_weighs_nothing(write):
    loss = {"gamma": 1.0, "gamma_schedule": "cosine", "gamma_end": 0.0, "gamma_samples": 100}
    data = report_data([load_run(write(loss))])
    assert data["passages"] == []
    assert data["weights"] is None


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        ("eslm", "other tokens of a micro-batch"),
        ("entrodrop", "other tokens of a micro-batch"),
        ("deft", "sum of squared probabilities"),
    ],
)
def test_weights_that_an_evaluation_does_not_give_are_not_drawn(write, objective, reason):
    data = report_data([load_run(write({"objective": objective}))])
    assert data["passages"] == []
    assert reason in data["verdict"]["limits"][-1]


def test_a_run_folder_alone_makes_no_code_run(write, monkeypatch, tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    page = write_report([write({"objective": "custom", "weighting": "own:weigh"})], tmp_path)
    assert "own" not in sys.modules
    data = json.loads(page.with_suffix(".json").read_text())
    assert data["passages"] == []
    assert data["weights"] is None
    assert "The weights of custom own:weigh are not drawn" in page.read_text()
