"""The job array, run by bash with a stand-in for the command."""

import os
import subprocess

from small_study import write_study

from megatron_infoentropy.study.runner import write_script


def test_every_task_does_its_part(tmp_path):
    folder = tmp_path / "my studies"
    folder.mkdir()
    study = write_study(folder)
    script = write_script(study, folder / "out", jobs=2)
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
