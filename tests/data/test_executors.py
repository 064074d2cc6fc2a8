"""`preprocess --executor`: datatrove makes what one process makes, and only what is missing."""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from golden import assert_same_files
from process_tree import has_ended, processes_of, wait_until
from text_files import command, line, write

pytest.importorskip("datatrove", reason="the extra cluster is not installed")
TASKS = ("--executor", "local", "--tasks", "2")


@pytest.fixture
def asked(tmp_path, tokenizer_folder):
    for number in range(2):
        lines = [line(f"file {number} text {i} " * (i % 9), "AB"[i % 2]) for i in range(200)]
        write(tmp_path / f"{number}.jsonl", lines)
    words = ("--input", f"{tmp_path}/*.jsonl", "--tokenizer", tokenizer_folder)
    return tuple(map(str, ("preprocess", *words, "--output", tmp_path / "out")))


def start(*words: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own: datatrove's pool is one of the things tried."""
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_infoentropy", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def marks(tmp_path: Path) -> dict[str, int]:
    """Task and when it was marked as complete."""
    paths = (tmp_path / "out.shards").glob("tasks-*/shards/completions/*")
    return {path.name: path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def blocked(tmp_path):
    """A file in the place of the second shard."""
    path = tmp_path / "out.shards" / "shard-00001-of-00002"
    path.parent.mkdir()
    path.write_text("in the way")
    return path


def test_failed_killed_and_given_again_it_writes_what_one_process_writes(
    prepare, asked, blocked, tmp_path
):
    folder, output = blocked.parent, tmp_path / "out"
    said = str(command(*asked, *TASKS, "--executor-option", "workers=1").exception)
    assert re.match(r"shard 1/2: the output must be a folder, but .* is a file", said), said
    done = marks(tmp_path)
    assert list(done) == ["00000"]

    blocked.unlink()
    killed = start(*asked, *TASKS, "--executor-option", "workers=2")
    assert wait_until(lambda: list(folder.glob(".shard-00001*/*")))
    all_of_it = processes_of(killed.pid)
    killed.kill()
    assert len(all_of_it) >= 5  # with datatrove's manager, its pool and what makes the shard
    assert all(map(has_ended, all_of_it))
    assert marks(tmp_path) == done
    assert not blocked.exists()  # as it would if it had been left to end
    assert not output.exists()

    again = command(*asked, *TASKS)
    assert again.exit_code == 0, again.exception
    before = marks(tmp_path), output.stat().st_ctime_ns
    assert before[0] == done | {"00001": before[0]["00001"]}
    whole = prepare(sorted(tmp_path.glob("*.jsonl")), "whole").folder
    assert_same_files(output, whole)
    assert_same_files(whole, output)
    assert command(*asked, *TASKS).exit_code == 0
    assert (marks(tmp_path), output.stat().st_ctime_ns) == before


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(prepare, asked, blocked, tmp_path, monkeypatch):
    """A cluster of this machine, two tasks at a time; a failed one is done again, alone."""
    pytest.importorskip("ray", reason="ray is not installed")
    words = (*asked, "--executor", "ray", "--tasks", "2", "--executor-option", "workers=2")
    words += ("--executor-option", "cpus_per_task=1")
    # tmp_path is too long for its sockets.
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as own:
        monkeypatch.setenv("RAY_TMPDIR", own)
        failing = start(*words)
        said = failing.communicate()[0]
        assert failing.returncode == 1
        assert re.search(r"tasks \[1\] failed: see .*/logs", said), said[-3000:]
        done = marks(tmp_path)
        assert list(done) == ["00000"]
        blocked.unlink()
        again = start(*words)
        said = again.communicate()[0]
    assert again.returncode == 0, said[-3000:]
    assert marks(tmp_path) == done | {"00001": marks(tmp_path)["00001"]}
    whole = prepare(sorted(tmp_path.glob("*.jsonl")), "whole").folder
    assert_same_files(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("--tasks", "2"), "need --executor local, slurm or ray"),
        (("--executor", "local"), "needs --tasks N"),
        ((*TASKS, "--shard", "0/2"), "give neither --shard nor --restart"),
        ((*TASKS, "--restart"), "give neither --shard nor --restart"),
        (("--executor", "cloud", "--tasks", "2"), "must be local, slurm or ray, got 'cloud'"),
        (("--executor", "local", "--tasks", "3"), "1 to 2, the number of files; got 3"),
        (("--executor", "local", "--tasks", "0"), "1 to 2, the number of files; got 0"),
        ((*TASKS, "--input", "none.jsonl"), "^no such input file: none.jsonl$"),
        ((*TASKS, "--input", "{}/0.jsonl"), "0.jsonl is one file, given 2 times"),
        ((*TASKS, "--executor-option", "time=1"), "'time'; --executor-option has .*workers"),
        ((*TASKS, "--executor-option", "tasks=1"), "'tasks'"),
        ((*TASKS, "--executor-option", "workers=two"), "workers=two should be of type .*int"),
    ],
)
def test_mistakes_are_named(asked, words, cure, tmp_path):
    """Before a task begins, or is queued."""
    refused = command(*asked, *(word.format(tmp_path) for word in words))
    assert isinstance(refused.exception, ValueError)
    assert re.search(cure, str(refused.exception)), refused.exception
    assert not (tmp_path / "out.shards").exists()


@pytest.mark.parametrize(
    ("kind", "missing", "cure"),
    [
        ("local", "datatrove.executor", r"pip install 'megatron-infoentropy\[cluster\]'"),
        ("ray", "ray", "pip install ray"),
        ("slurm", "", "needs sbatch"),
    ],
)
def test_what_is_not_installed_is_named(asked, kind, missing, cure, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    refused = command(*asked, "--executor", kind, "--tasks", "2")
    assert isinstance(refused.exception, RuntimeError)
    assert re.search(cure, str(refused.exception)), refused.exception
