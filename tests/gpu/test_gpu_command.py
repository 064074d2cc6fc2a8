"""tools/gpu.sh on a CPU: its steps' own commands, small; and that it leaves no GPU test out."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu.sh"
SHORT = ["kernels", "headline", "tests", "sanitizer"]
LONG = ["curves", "steps", "compiled", "trainings"]


def run(folder, *words, **environment):
    """(exit status, what was printed)."""
    done = subprocess.run(
        [str(SCRIPT), "--dry-run", *words],
        env={
            **{**os.environ, "PYTHON": sys.executable, "OUT": str(folder)},
            **{"INFOENTROPY_COMMIT": "abcdef0", "OMP_NUM_THREADS": "1"},
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def outcomes(folder):
    with (folder / "steps.csv").open(newline="") as file:
        return [(row["step"], row["outcome"], row["commit"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("steps", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=str)
def test_every_step_runs_once_and_leaves_its_results(steps, tmp_path):
    code, said = run(tmp_path, *steps)
    assert code == 0, said
    assert outcomes(tmp_path) == [(step, "ok", "abcdef0") for step in steps]
    written = {path.name for path in tmp_path.iterdir()}
    assert len(written) <= 8, "no more files than come back from a lent card"
    assert {"gpu.log", "steps.csv", "tests.csv"} <= written
    assert not [path for path in tmp_path.glob("*.csv") if "it failed" in path.read_text()]
    code, said = run(tmp_path, *steps)
    assert code == 0
    assert said.splitlines()[:-1] == [f"before  {step}" for step in steps]


def test_a_step_that_fails_or_finds_no_time_is_told_and_left_to_do(tmp_path):
    code, said = run(tmp_path, "kernels", "tests", LIMIT="14")
    assert code == 1
    assert "NO TIME tests" in said
    assert "tests" not in [step for step, outcome, _ in outcomes(tmp_path) if outcome == "ok"]


@pytest.mark.parametrize(
    ("words", "commit", "status", "said"),
    [
        (["kernel"], "", 2, "no step kernel; these: kernels headline "),
        ([], "x", 1, "before the steps"),
    ],
)
def test_what_is_wrong_before_the_steps_is_told(words, commit, status, said, tmp_path):
    code, told = run(tmp_path, *words, INFOENTROPY_COMMIT=commit)
    assert code == status
    assert said in told


def test_every_file_of_gpu_tests_is_in_a_step():
    script = SCRIPT.read_text()
    named = set(re.findall(r"tests/\S+\.py", script))
    assert all((ROOT / name).exists() for name in named)
    marked = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"mark\.gpu\b", path.read_text(encoding="utf-8"))
    ]
    left_out = {str(path.relative_to(ROOT)) for path in marked} - named
    assert not left_out


def test_packing_states_the_size_and_refuses_what_would_not_arrive(tmp_path):
    clone, wheels = tmp_path / "clone", tmp_path / "wheels"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    shutil.copy(SCRIPT, clone / "tools")
    built = next((ROOT / "megatron_infoentropy").glob("_C*.so"))
    shutil.copy(built, clone / "megatron_infoentropy")
    (clone / "setup.py").write_text("")  # what is built is there
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x"],
                   cwd=clone, check=True)  # fmt: skip
    wheels.mkdir()
    (wheels / "a.whl").write_bytes(b"x" * 2**20)

    def pack():
        done = subprocess.run(
            [str(clone / "tools/gpu.sh"), "pack", str(wheels)],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    code, said = pack()
    assert code == 0, said
    packed = {path.name for path in (clone / "build/gpu").iterdir()}
    assert packed == {"wheels", "results", "sources", "commit", built.name}
    (wheels / "a.whl").write_bytes(b"x" * 2**26)
    code, said = pack()
    assert code == 1
    assert re.search(r"\d+ of 64 MiB", said)
    (clone / "README.md").write_text("changed")
    code, said = pack()
    assert code != 0
    assert "commit first" in said
