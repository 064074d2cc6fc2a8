"""What ends a run, and that the same call afterwards gives the same bytes without redoing all."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from encoder_here import interrupted
from golden import assert_same_files
from process_tree import has_ended, processes_of, wait_until
from text_files import line, write

from megatron_infoentropy.data import journal, writer
from megatron_infoentropy.data import preprocess as preprocess_module
from megatron_infoentropy.data.blocks import read_blocks
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.workers import WorkerDied
from megatron_infoentropy.data.writer import DiskFull
from megatron_infoentropy.progress import progress

pytestmark = pytest.mark.usefixtures("small_steps")
MOMENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}
LINES = [line(f"text {i} " * (i % 50), f"domain {i % 3}") for i in range(600)]
LINES[50] = "no document"
LINES[599] = ""


@pytest.fixture
def inputs(tmp_path):
    return [
        write(tmp_path / "a.jsonl", LINES[:200]),
        write(tmp_path / "b.jsonl", LINES[200:400]),
        write(tmp_path / "c.jsonl.zst", LINES[400:]),
    ]


def die_at(moment: int) -> None:
    """Have this process killed when it has come so far."""
    left = moment
    write_whole = writer.write_all

    def step() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def hook(event: str, _: Any) -> None:
        if event in MOMENTS and step():
            os.kill(os.getpid(), signal.SIGKILL)

    def write_all(file: Any, data: bytes) -> None:
        if step():
            file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write_whole(file, data)

    sys.addaudithook(hook)
    writer.write_all = write_all  # type: ignore[assignment]
    journal.write_all = write_all  # type: ignore[assignment]


def survives(prepare: Callable[..., object], inputs: list[Path], moment: int) -> bool:
    """Say whether a forked process that dies at that moment was done before it."""
    process = os.fork()
    if process == 0:
        try:
            die_at(moment)
            prepare(inputs, max_errors=5)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


def test_killed_at_random_moments_it_still_ends_with_the_same_bytes(
    prepare, inputs, tokenizer, tmp_path, monkeypatch
):
    """A moment is the n-th opening, renaming, removing or making of a file, or write to one.

    Of that write, half gets there. Each process goes on from what the one before it left.
    """
    # It opens files that are only read.
    monkeypatch.setattr(preprocess_module, "load_tokenizer", lambda _: tokenizer)
    expected, out = prepare(inputs, "expected", max_errors=5).folder, tmp_path / "out"
    rng = random.Random(0)
    killed = finished = 0
    while killed < 30 or finished == 0:
        moment = rng.choice((20, 200, 2000)) * rng.randint(1, 10) // 10 + 1
        if not survives(prepare, inputs, moment):
            killed += 1
            continue
        finished += 1
        assert_same_files(out, expected)
        assert_same_files(expected, out)
        assert {path.name for path in tmp_path.glob(".*")} <= {".out.partial"}
        shutil.rmtree(out)


def test_what_is_finished_is_not_read_again(prepare, inputs, tmp_path, monkeypatch):
    """Nor encoded; with another number of workers, and with what the first run skipped."""
    expected = prepare(inputs, "expected", max_errors=1).folder
    interrupted(prepare, inputs, 30, max_errors=1)
    assert not (tmp_path / "out").exists()
    with (tmp_path / ".out.partial" / journal.JOURNAL).open("rb") as file:
        saved = json.loads(file.readline())["state"]
    assert saved["file"] == 1
    assert saved["line"] > 1
    read, shown = Mock(wraps=read_blocks), Mock(wraps=progress)
    monkeypatch.setattr(preprocess_module, "read_blocks", read)
    monkeypatch.setattr(preprocess_module, "progress", shown)
    assert_same_files(prepare(inputs, workers=2, max_errors=1).folder, expected)
    sizes = [path.stat().st_size for path in inputs]
    shown.assert_called_once_with("preprocess", sum(sizes), "bytes", sizes[0])
    read_from = [(path.name, start.line) for (path, _, start, _), _ in read.call_args_list]
    assert read_from == [("b.jsonl", saved["line"]), ("c.jsonl.zst", 1)]
    read.reset_mock()
    prepare(inputs)
    read.assert_not_called()  # done is done
    assert not (tmp_path / ".out.partial").exists()


def test_an_unfinished_run_is_not_mixed_with_another_one(prepare, inputs):
    interrupted(prepare, inputs, 30, max_errors=1)
    with pytest.raises(ValueError, match=r"an unfinished run with other options.*--restart"):
        prepare(inputs, options=DataOptions(append_eod=False), max_errors=1)
    with pytest.raises(ValueError, match="an unfinished run with other inputs"):
        prepare(inputs[1:], max_errors=1)
    found = prepare(inputs[1:], restart=True)
    assert [facts.name for facts in found.inputs] == ["b.jsonl", "c.jsonl.zst"]
    assert_same_files(found.folder, prepare(inputs[1:], "expected").folder)


def test_a_run_does_not_replace_what_another_made_while_it_got_ready(
    prepare, inputs, tmp_path, let_another_be_first
):
    let_another_be_first(preprocess_module)
    with pytest.raises(ValueError, match="not empty"):
        prepare(inputs)
    assert (tmp_path / "out" / "a.bin").read_text() == "other"


@pytest.mark.usefixtures("worker_processes")
def test_a_killed_worker_ends_the_run_with_its_lines_and_what_to_do(prepare, tmp_path, monkeypatch):
    many = write(tmp_path / "a.jsonl", [line("some words " * 300)] * 300)
    save, killed = journal.JournalledRun.save, []

    def save_and_kill(self):
        save(self)
        if not killed:
            killed.append(next(pid for pid in processes_of(os.getpid()) if is_worker(pid)))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(journal.JournalledRun, "save", save_and_kill)
    with pytest.raises(WorkerDied, match=r"a\.jsonl:\d+: .* was killed by SIGKILL .* goes on"):
        prepare(many, workers=2)
    assert not (tmp_path / "out").exists()
    assert prepare(many).domains["A"].documents == 300


def is_worker(pid: int) -> bool:
    return b"data.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_workers_end_with_the_process_that_feeds_them(tokenizer_folder, tmp_path):
    """Killed with no chance to tidy up, it leaves nobody behind."""
    many = write(tmp_path / "a.jsonl", [line("some words " * 300)] * 3000)
    program = """
import sys
from pathlib import Path
from megatron_infoentropy.data.preprocess import preprocess
text, *folders = map(Path, sys.argv[1:])
preprocess([text], *folders, workers=2)
"""
    words = [sys.executable, "-c", program, many, tokenizer_folder, tmp_path / "out"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        assert wait_until(lambda: len(processes_of(process.pid)) == 3)
        all_of_it = processes_of(process.pid)
        process.kill()
    assert wait_until(lambda: all(map(has_ended, all_of_it)))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_with_room(prepare, inputs, tmp_path):
    """A limit on the size of files stands in for the disk's: the same error at the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"no room .* MB are free\): make room and give the"):
            prepare(inputs, max_errors=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / journal.JOURNAL).exists()
    made = prepare(inputs, max_errors=1).folder
    assert_same_files(made, prepare(inputs, "expected", max_errors=1).folder)
