"""A run that was trained in stages: what it is called, and whom it counts with."""

import json
from pathlib import Path

import pytest
from example_runs import write_run

from megatron_infoentropy.evaluate.compare import compare_folders
from megatron_infoentropy.evaluate.report import report_data
from megatron_infoentropy.evaluate.runs import load_run


def stage(from_step: int, objective: str = "cross_entropy", seed: int = 1, **loss) -> dict:
    facts = {"objective": objective, "gamma": 1.0, "sigma": 1.0, "normalization": "paper"}
    return {"from_step": from_step, "seed": seed, **facts, "loss": facts | loss}


SWITCHED = [stage(0), stage(16, "infoentropy")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of cross entropy and of InfoEntropy; `mixed` is cross entropy first."""
    folder = tmp_path_factory.mktemp("lineage")
    for seed in (1, 2):
        write_run(folder / f"ce-{seed}", seed=seed)
        write_run(folder / f"ie-{seed}", objective="infoentropy", seed=seed)
    write_run(folder / "mixed", objective="infoentropy", seed=3, lineage=SWITCHED)
    return folder


def test_it_is_a_setting_of_its_own_that_names_every_stage(folder):
    data = report_data([load_run(path) for path in sorted(folder.iterdir())])
    labels = [group["label"] for group in data["groups"]]
    mixed = "cross entropy then InfoEntropy \N{GREEK SMALL LETTER GAMMA}=1 from step 16"
    assert labels[2] == mixed
    assert [len(group["runs"]) for group in data["groups"]] == [2, 2, 1]
    assert [stage["from_step"] for stage in data["runs"][4]["stages"]] == [0, 16]
    assert any("mixed was trained in stages" in s for s in data["verdict"]["limits"])


def test_it_cannot_be_joined_with_runs_of_its_last_objective(folder):
    names = [f"{folder / 'ie-1'},{folder / 'mixed'}", str(folder / "ce-1")]
    with pytest.raises(ValueError, match="mixed are not seeds of one setting"):
        compare_folders(names)


def test_another_seed_on_the_way_is_named_and_is_no_baseline(tmp_path):
    run = load_run(write_run(tmp_path / "a", seed=9, lineage=[stage(0), stage(8, seed=9)]))
    assert run.objective_label == "cross entropy seed 1 then cross entropy seed 9 from step 8"
    assert not run.is_baseline


def test_what_changes_every_objective_alike_is_named_where_it_changed(tmp_path):
    heads = {"label_smoothing": 0.1, "mtp_loss": "weighted"}
    stages = [stage(0, label_smoothing=0.1), stage(8), stage(9, **heads)]
    run = load_run(write_run(tmp_path / "a", lineage=stages))
    assert run.objective_label == (
        "cross entropy label_smoothing 0.1 then cross entropy label_smoothing 0 from step 8 then "
        "cross entropy, of prediction heads too label_smoothing 0.1 from step 9"
    )


def test_a_damaged_lineage_is_refused(tmp_path):
    run = write_run(tmp_path / "a")
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"lineage": [{"objective": "focal"}]}))
    with pytest.raises(ValueError, match="describes no loss"):
        load_run(run)
