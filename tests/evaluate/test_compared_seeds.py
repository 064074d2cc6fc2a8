"""Which evaluations count as seeds of one setting, how they are paired, and what is said of it."""

from pathlib import Path

import pytest
from example_runs import example_evaluation, write_run
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.evaluate.compare import compare_folders
from megatron_infoentropy.evaluate.report import report_data
from megatron_infoentropy.evaluate.runs import load_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ce-1, ce-2, ce-3, ie-1, ie-2, ie-3, and plain evaluations plain-1 to plain-4."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in (1, 2, 3):
        write_run(folder / f"ce-{seed}", seed=seed)
        write_run(folder / f"ie-{seed}", objective="infoentropy", seed=seed, shift=-0.3)
    for seed in (1, 2, 3, 4):
        example_evaluation(seed, 0, "x", "f" * 64).save(folder / f"plain-{seed}")
    return folder


@pytest.fixture
def compared(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def compare(*names: str) -> str:
        done = CliRunner().invoke(app, ["compare", *names])
        return done.output if done.exit_code == 0 else str(done.exception)

    return compare


def test_a_folder_named_twice_is_refused(compared):
    for names in (("ce-1,ce-1,ce-1", "ie-1,ie-1,ie-1"), ("ce-1", "ce-2", "./ce-1", "ie-1")):
        assert "ce-1 is named twice" in compared(*names)


def test_one_model_evaluated_twice_is_not_two_seeds(folder, compared, tmp_path):
    first = example_evaluation(1, 0, "x", "f" * 64)
    first.summary["model"]["weights_sha256"] = "another dtype"
    first.save(tmp_path / "again")
    said = compared(f"plain-1,{tmp_path / 'again'}", "plain-2,plain-3")
    assert "are one model evaluated twice, not two seeds" in said
    relabelled = write_run(tmp_path / "ie-9", objective="infoentropy", seed=2, model_seed=1)
    runs = [folder / "ce-1", folder / "ce-2", relabelled]
    runs.append(write_run(tmp_path / "ie-1", objective="infoentropy", seed=1))
    (made,) = report_data([load_run(run) for run in runs])["comparisons"]
    assert "ie-9 and ie-1 are one model evaluated twice" in made["refusal"]


def test_joined_runs_are_paired_by_the_seed_they_were_trained_with(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (straight,) = compare_folders(["ce-1,ce-2", "ie-1,ie-2"])
    (crossed,) = compare_folders(["ce-1,ce-2", "ie-2,ie-1"])
    assert straight.rows == crossed.rows
    assert (straight.pairing, straight.seeds) == ("seed", [1, 2])
    (alone,) = compare_folders(["ce-1", "ce-2", "ie-2", "ie-1"])
    assert alone.rows == straight.rows


def test_joined_runs_are_called_by_their_objective_where_that_tells_them_apart(compared, tmp_path):
    assert "minus cross entropy, nats per token" in compared("ce-1,ce-2", "ie-1,ie-2")
    assert "minus cross entropy, nats per token" in compared("ce-1", "ie-1,ie-2")
    longer = [str(write_run(tmp_path / str(n), seed=n, train_iters=800)) for n in (1, 2)]
    for baseline in ("ce-1,ce-2", "ce-1"):
        assert f"\n{','.join(longer)} minus c" in "\n" + compared(baseline, ",".join(longer))


def test_joined_runs_of_two_objectives_or_one_seed_are_refused(compared, folder, tmp_path):
    assert "ce-1 and ie-2 are not seeds of one setting: cross entropy" in compared(
        "ce-1,ie-2", "ce-3"
    )
    other = write_run(tmp_path / "longer", seed=2, train_iters=800)
    assert "longer are not seeds of one setting" in compared(f"ce-1,{other}", "ie-3")
    same = write_run(tmp_path / "same", seed=1, model_seed=7)
    assert "have the same seed 1" in compared(f"ce-1,{same}", "ie-1,ie-2")


def test_the_output_says_how_evaluations_were_paired(compared):
    assert "paired by seed (1, 2)" in compared("ce-1,ce-2", "ie-2,ie-1")
    said = compared("plain-1,plain-2", "plain-3,plain-4")
    assert "paired by order, as their seeds are not known" in said
    assert "unpaired, 2 and 2 evaluations" in compared("ce-1,ce-2", "plain-3,plain-4")
    assert "unpaired, 2 and 3 evaluations" in compared("ce-1", "ce-2", "ce-3", "plain-3,plain-4")
    said = compared("ie-2", "plain-1")
    assert "one evaluation of each" in said
    assert "80 of 100" not in said
    assert "No difference of any size could have been shown" in said
    head = said.splitlines()[1]
    assert "95 % (single)" in head
    assert "p (Holm)" in head


def test_what_is_left_out_is_named_with_the_reason(compared, folder, tmp_path):
    said = compared("ie-1", "ie-2", "ce-1")
    assert "left out: ie-2, as cross entropy has no evaluated run of seed 2" in said
    repeated = write_run(tmp_path / "ce-again", seed=1, model_seed=8)
    said = compared("ce-1", "ce-2", str(repeated), "ie-1", "ie-2")
    assert "left out: ce-again, as it repeats objective, set-up and seed of ce-1" in said
    assert "left out: ce-3, as there is 1 evaluation only of plain-1" in compared(
        "plain-1", "ce-2,ce-3"
    )
    page = report_data([load_run(folder / name) for name in ("ce-1", "ie-1", "ie-2")])
    assert (
        "Left out: ie-2, as cross entropy has no evaluated run of seed 2."
        in (page["verdict"]["limits"])
    )


def test_identical_evaluations_are_called_so(folder, tmp_path, compared):
    copy = write_run(tmp_path / "copy", objective="infoentropy", seed=1, same_as="cross_entropy")
    said = compared("ce-1", str(copy))
    assert said.count("the evaluations of copy and ce-1 are identical") == 1
    assert "Did it help? No: nothing differs." in said
    data = report_data([load_run(folder / "ce-1"), load_run(copy)])
    assert "are identical" in data["verdict"]["answers"][0]["more"]
    said = compared("ce-1", "ce-2", str(copy), "ie-2")
    assert "the evaluations of copy and ce-1 are identical" in said
    assert "identical" not in compared("ce-1", "ie-1")


def test_joined_runs_need_their_evaluations(compared, tmp_path):
    bare = write_run(tmp_path / "bare", seed=5, evaluated=False)
    assert "has not been evaluated" in compared(f"ce-1,{bare}", "ie-1,ie-2")
    with pytest.raises(ValueError, match="names no folder"):
        compare_folders([",", "x"])
