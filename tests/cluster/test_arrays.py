"""Job arrays under a real Slurm: of preprocessing, and of a study."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_runs import Job, wait_until
from light_run import text_of, write_program
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.study.plan import load_study
from megatron_infoentropy.study.runner import write_script

STUDY = """
recipe: {recipe}
grid: [{{objective: cross_entropy}}, {{objective: infoentropy, gamma: 2}}]
data: {{tokens: {tokens}/data, tokenizer: {tokens}/tokenizer}}
"""


@pytest.fixture(scope="session")
def quick_ranks():
    """No ranks here are Megatron's."""
    return {}


@pytest.fixture(autouse=True)
def with_commands(slurm, monkeypatch):
    """The commands of this environment are on PATH, as where a user submits."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{Path(sys.executable).parent}")


def test_tasks_of_preprocess_write_what_one_process_writes(slurm, tokens, tmp_path):
    pytest.importorskip("datatrove", reason="the extra cluster is not installed")
    lines = (tokens / "text.jsonl").read_text().splitlines(keepends=True)
    inputs = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for number, path in enumerate(inputs):
        path.write_text("".join(lines[number::2]))
    output = tmp_path / "out"
    words = ["preprocess", "--input", f"{tmp_path}/*.jsonl", "--tokenizer", tokens / "tokenizer"]
    words += ["--output", output, "--executor", "slurm", "--tasks", "2", "--workers", "1"]
    lacking = CliRunner().invoke(app, list(map(str, words)))
    assert "missing a required argument: 'time'" in str(lacking.exception)
    for option in ("time=1:00:00", "partition=low", "qos=", 'sbatch_args={"comment": "ours"}'):
        words += ["--executor-option", option]
    refused = [*words, "--executor-option", "partition=none"]
    assert "sbatch refused a job" in str(CliRunner().invoke(app, list(map(str, refused))).exception)
    (output.with_name("out.shards") / "shard-00001-of-00002").write_text("in the way")
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.exception
    assert "queued" in done.stdout
    logs = output.with_name("out.shards")
    wait_until(lambda: not _queue(), Path(os.devnull), said=_queue)
    assert not output.exists()  # a shard has failed, so that nothing was merged
    (logs / "shard-00001-of-00002").unlink()
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    wait_until(lambda: not _queue(), Path(os.devnull), said=_queue)
    (again,) = logs.glob("tasks-*/shards/ranks_to_run.json")
    assert again.read_text() == "[1]"
    whole = preprocess(inputs, tokens / "tokenizer", tmp_path / "whole").folder
    made = {
        path.name: path.read_bytes() for path in output.iterdir() if path.suffix in (".bin", ".idx")
    }
    assert made == {name: (whole / name).read_bytes() for name in made}
    assert made
    _array, *_ = logs.glob("tasks-*/shards/launch_script.slurm")
    assert "#SBATCH --signal=USR1@60\n" in _array.read_text()
    assert "#SBATCH --comment=ours\n" in _array.read_text()


def _queue():
    return subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout


def submitted(script: Path) -> Job:
    """Submit the three parts of a study as its script says; the last one."""
    text = script.read_text().replace("#SBATCH --gpus-per-task=1\n", "")
    script.write_text(text.replace("--cpus-per-task=8", "--cpus-per-task=1"))
    lines = [line[4:] for line in text.splitlines() if re.match(r"#   (data=|runs=|sbatch )", line)]
    assert len(lines) == 3
    said = subprocess.run(["bash", "-ec", "\n".join(lines)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return Job(said.stdout)


def test_a_study_makes_its_data_first_and_its_report_last_even_if_a_run_fails(
    tokens, tmp_path, pytestconfig, monkeypatch
):
    folder, parts = tmp_path / "my studies", tmp_path / "parts"
    folder.mkdir()
    recipe = pytestconfig.rootpath / "examples/tiny.yaml"
    (folder / "study.yaml").write_text(STUDY.format(recipe=recipe, tokens=tokens))
    study = load_study(folder / "study.yaml")
    failed = study.members[0].name
    (tmp_path / "bin").mkdir()
    write_program(
        tmp_path / "bin/infoentropy",
        "#!/bin/sh\n"
        'case "$6" in data) sleep 2 ;; report) ;; *) sleep 1 ;; esac\n'
        f'echo "$6" >> "{parts}"\n[ "$6" != "{failed}" ]\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    last = submitted(write_script(study, folder / "out", jobs=2))
    wait_until(lambda: last.JobState == "COMPLETED", parts, said=last.text)
    first, *runs, report = text_of(parts).split()
    assert (first, report) == ("data", "report")
    assert sorted(runs) == sorted(member.name for member in study.members)
    assert len(list((folder / "out/logs").iterdir())) == 4
