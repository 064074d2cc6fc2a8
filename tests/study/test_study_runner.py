"""A whole study, its steps faked: order, failure, interruption, going on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small_study
from small_study import did, fake_steps, write_study

from megatron_infoentropy.study import runner, steps
from megatron_infoentropy.study.runner import (
    StudyFailed,
    duration,
    find_states,
    terminated_as_interrupted,
)

NAMES = ["cross_entropy-seed1", "infoentropy-gamma1-seed1",
         "cross_entropy-seed2", "infoentropy-gamma1-seed2"]  # fmt: skip
STEPS = ["train", "export", "evaluate"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    for module, names in (
        (steps, ("_train", "_export", "_evaluate")),
        (runner, ("_write", "start_worker")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    fake_steps()
    runner.start_worker = start_fake_worker
    return write_study(tmp_path)


def start_fake_worker(study, output, part, *, slot, jobs):
    return subprocess.Popen(
        [sys.executable, small_study.__file__, str(study.path), str(output), part],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_study_is_done_then_found_done_then_redone_where_it_was_damaged(study, tmp_path):
    output, said = tmp_path / "out", []
    page = runner.run_study(study, output, jobs=2, say=said.append)
    assert page.read_text().splitlines() == NAMES
    assert [did(output, name) for name in NAMES] == [STEPS] * 4
    assert sum(": begins" in line for line in said) == 4
    assert all(line.startswith("run ") and " of 4, " in line for line in said)
    assert any(line.endswith("left in all") for line in said)

    (output / NAMES[1] / "hf" / "model").write_text("half")
    (output / NAMES[1] / "evaluation.json").unlink()
    assert [state.is_done for state in find_states(study, output)] == [True, False, True, True]
    said.clear()
    runner.run_study(study, output, say=said.append)
    assert [did(output, name) for name in NAMES] == [
        STEPS, [*STEPS, "export", "evaluate"], STEPS, STEPS
    ]  # fmt: skip


def test_one_failure_is_reported_and_the_others_go_on(study, tmp_path):
    output, said = tmp_path / "out", []
    output.mkdir()
    (output / f"{NAMES[0]}.fails").touch()
    with pytest.raises(StudyFailed, match=rf"1 of 4 runs failed: {NAMES[0]}; .* tries again"):
        runner.run_study(study, output, jobs=2, say=said.append)
    page = (output / "report.html").read_text()
    assert page.splitlines() == [
        *NAMES[1:], f"1 of 4 planned runs are missing: {NAMES[0]}."
    ]  # fmt: skip
    assert any(f"run 1 of 4, {NAMES[0]}: FAILED with exit code 1" in line for line in said)
    assert "no export today" in (output / "logs" / f"{NAMES[0]}.log").read_text()

    (output / f"{NAMES[0]}.fails").unlink()
    runner.run_study(study, output, say=said.append)
    assert did(output, NAMES[0]) == ["train", "export", "export", "evaluate"]


def test_an_interrupted_study_ends_its_runs_and_goes_on_from_there(study, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / f"{NAMES[0]}.hangs").touch()

    def interrupt(line: str) -> None:
        if "exporting" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
        runner.run_study(study, output, say=interrupt)
    assert find_states(study, output)[0].progress.done == ("train",)
    (output / f"{NAMES[0]}.hangs").unlink()
    runner.do_part(study, output, NAMES[0])  # nobody holds its lock
    assert did(output, NAMES[0]) == ["train", "export", "export", "evaluate"]


def test_without_a_finished_run_there_is_nothing_to_report(study, tmp_path):
    with pytest.raises(StudyFailed, match="nothing to report"):
        runner.do_part(study, tmp_path / "out", "report")


def test_an_unknown_part_is_refused_with_those_there_are(study, tmp_path):
    with pytest.raises(ValueError, match=f"has no run 'x'; its runs are {NAMES[0]}"):
        runner.do_part(study, tmp_path / "out", "x")


def test_a_change_of_the_grid_leaves_the_other_runs_alone(study, tmp_path):
    output = tmp_path / "out"
    for name in NAMES[:2]:
        runner.do_part(study, output, name)
    changed = write_study(tmp_path, small_study.TEXT.replace("gamma: 1", "gamma: [1, 2]"))
    done = [state.member.name for state in find_states(changed, output) if state.is_done]
    assert done == NAMES[:2]
    changed = write_study(tmp_path, small_study.TEXT.replace("train-iters: 10", "train-iters: 20"))
    assert not any(state.is_done for state in find_states(changed, output))


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "7 s"), (700, "12 min"), (11100, "3 h 05 min")]
)
def test_durations_are_short(seconds, words):
    assert duration(seconds) == words


def test_data_that_are_not_there_are_named(tmp_path):
    study = write_study(tmp_path)
    (tmp_path / "tokens" / "test" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"lacks test/manifest\.json"):
        find_states(study, Path(tmp_path / "out"))


def test_every_task_of_the_job_array_does_its_part(tmp_path):
    folder = tmp_path / "my studies"
    folder.mkdir()
    study = write_study(folder)
    script = runner.write_script(study, folder / "out", jobs=2)
    lines = script.read_text().splitlines()
    assert "#SBATCH --array=1-4%2" in lines
    assert f"#SBATCH --output='{folder}/out/logs/slurm-%A-%a.log'" in lines
    last_comment = max(i for i, line in enumerate(lines) if line.startswith("#"))
    assert all(line.startswith("#") for line in lines[: last_comment + 1])  # Slurm stops at others
    stand_in = tmp_path / "bin" / "infoentropy"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    parts = []
    for task in range(6):
        environment = {"SLURM_ARRAY_TASK_ID": str(task), "PATH": f"{stand_in.parent}:{os.defpath}"}
        said = subprocess.run(
            ["bash", script], env=environment, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert said[:5] == ["study", str(study.path), "--output", str(folder / "out"), "--only"]
        parts.append(said[5])
    assert parts == ["data", *(member.name for member in study.members), "report"]
