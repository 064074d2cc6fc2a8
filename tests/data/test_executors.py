"""`preprocess --executor`: datatrove makes what one process makes, and only what is missing."""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from golden import assert_same_files
from process_tree import has_ended, processes_of, wait_until
from text_files import line, write
from typer.testing import CliRunner

from megatron_infoentropy.cli import app
from megatron_infoentropy.data.preprocess import preprocess

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
    command = [sys.executable, "-m", "megatron_infoentropy", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def marks(tmp_path: Path) -> dict[str, int]:
    """Task and when it was marked as complete."""
    paths = (tmp_path / "out.shards").glob("tasks-*/shards/completions/*")
    return {path.name: path.stat().st_mtime_ns for path in paths}


def test_failed_killed_and_given_again_it_writes_what_one_process_writes(
    asked, tokenizer_folder, tmp_path
):
    folder, output = tmp_path / "out.shards", tmp_path / "out"
    folder.mkdir()
    blocked = folder / "shard-00001-of-00002"
    blocked.write_text("in the way")
    failing = CliRunner().invoke(app, [*asked, *TASKS, "--executor-option", "workers=1"])
    said = str(failing.exception)
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
    assert not (folder / blocked.name).exists()  # as it would if it had been left to end
    assert not output.exists()

    again = CliRunner().invoke(app, [*asked, *TASKS])
    assert again.exit_code == 0, again.exception
    assert marks(tmp_path) == done | {"00001": marks(tmp_path)["00001"]}
    whole = preprocess(sorted(tmp_path.glob("*.jsonl")), tokenizer_folder, tmp_path / "whole")
    assert_same_files(output, whole.folder)
    assert_same_files(whole.folder, output)

    before = marks(tmp_path), output.stat().st_ctime_ns
    assert CliRunner().invoke(app, [*asked, *TASKS]).exit_code == 0
    assert (marks(tmp_path), output.stat().st_ctime_ns) == before


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(
    asked, tokenizer_folder, tmp_path, monkeypatch, request
):
    """A cluster of this machine, two tasks at a time; a failed one is done again, alone."""
    pytest.importorskip("ray", reason="ray is not installed")
    own = TemporaryDirectory(prefix="ray")  # tmp_path is too long for its sockets
    request.addfinalizer(own.cleanup)
    monkeypatch.setenv("RAY_TMPDIR", own.name)
    words = (*asked, "--executor", "ray", "--tasks", "2", "--executor-option", "workers=2")
    words += ("--executor-option", "cpus_per_task=1")
    blocked = tmp_path / "out.shards" / "shard-00001-of-00002"
    blocked.parent.mkdir()
    blocked.write_text("in the way")
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
    whole = preprocess(sorted(tmp_path.glob("*.jsonl")), tokenizer_folder, tmp_path / "whole")
    assert_same_files(tmp_path / "out", whole.folder)


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
    refused = CliRunner().invoke(app, [*asked, *(word.format(tmp_path) for word in words)])
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
    refused = CliRunner().invoke(app, [*asked, "--executor", kind, "--tasks", "2"])
    assert isinstance(refused.exception, RuntimeError)
    assert re.search(cure, str(refused.exception)), refused.exception
