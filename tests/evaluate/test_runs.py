"""What a run is called, by its loss and its stages, and whom it counts with."""

import json

import pytest
from example_runs import write_run

from megatron_infoentropy.evaluate.groups import group_runs
from megatron_infoentropy.evaluate.report import report_data
from megatron_infoentropy.evaluate.runs import load_run

GAMMA = "\N{GREEK SMALL LETTER GAMMA}"


def stage(from_step: int, objective: str = "cross_entropy", seed: int = 1, **loss) -> dict:
    facts = {"objective": objective, "gamma": 1.0, "sigma": 1.0, "normalization": "paper"}
    return {"from_step": from_step, "seed": seed, **facts, "loss": facts | loss}


@pytest.mark.parametrize(
    ("stages", "label"),
    [
        ([stage(0), stage(16, "infoentropy")],
         f"cross entropy then InfoEntropy {GAMMA}=1 from step 16"),
        ([stage(0), stage(8, seed=9)],
         "cross entropy seed 1 then cross entropy seed 9 from step 8"),
        ([stage(0, label_smoothing=0.1), stage(8),
          stage(9, label_smoothing=0.1, mtp_loss="weighted")],
         "cross entropy label_smoothing 0.1 then cross entropy label_smoothing 0 from step 8 then "
         "cross entropy, of prediction heads too label_smoothing 0.1 from step 9"),
    ],
)  # fmt: skip
def test_a_run_that_went_on_otherwise_is_a_setting_that_names_every_stage(tmp_path, stages, label):
    plain = [write_run(tmp_path / f"ce-{seed}", seed=seed) for seed in (1, 2)]
    mixed = write_run(tmp_path / "mixed", objective=stages[-1]["objective"], lineage=stages)
    data = report_data([load_run(path) for path in (*plain, mixed)])
    groups = {group["label"]: group for group in data["groups"]}
    assert [len(group["runs"]) for group in groups.values()] == [2, 1]
    assert not groups[label]["is_baseline"]
    assert any("mixed was trained in stages" in s for s in data["verdict"]["limits"])


def test_a_damaged_lineage_is_refused(tmp_path):
    run = write_run(tmp_path / "a", lineage=[{"objective": "focal"}])
    with pytest.raises(ValueError, match="describes no loss"):
        load_run(run)


def test_runs_of_another_loss_are_not_seeds_of_one_setting(tmp_path):
    full = {"objective": "infoentropy", "gamma": 1.0, "sigma": 1.0, "normalization": "paper"}
    several = {
        "published": {},
        "blended": {"blend": 0.5},
        "rising": {"gamma": 0.0, "gamma_schedule": "linear", "gamma_samples": 500},
        "own": {"objective": "custom", "weighting": "mine:weigh"},
        "smoothed": {"label_smoothing": 0.1},
        "without a target": {"ignore_target": 0},
        "tenth": {"objective": "eslm"},
        "fifth": {"objective": "eslm", "quantile": 0.2},
        "without gamma": {"objective": "deft"},
    }
    loaded = [
        load_run(write_run(tmp_path / name, objective="infoentropy", seed=1, loss=full | changes))
        for name, changes in several.items()
    ]
    groups = group_runs(loaded)
    assert [len(group.runs) for group in groups] == [1] * len(several)
    assert len({group.label for group in groups}) == len(several)
    words = [run.objective_label.partition(",")[0] for run in loaded]
    assert words[-3:] == ["ESLM quantile 0.1", "ESLM quantile 0.2", "DEFT"]
    assert not any(group.is_baseline for group in groups), "a schedule from 0 is not plain"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"run\.json is not a readable run description"),
        ("{", r"run\.json is not a readable run description"),
        (json.dumps({"name": "x"}), "does not say objective"),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)
