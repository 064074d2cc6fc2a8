"""What ends a run, and that the same call afterwards gives the same bytes without redoing all."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from golden import assert_same_files
from text_files import line, write

from megatron_infoentropy.data import journal
from megatron_infoentropy.data import preprocess as preprocess_module
from megatron_infoentropy.data.blocks import read_blocks
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.workers import WorkerDied
from megatron_infoentropy.data.writer import DiskFull
from megatron_infoentropy.files import work_folder

pytestmark = pytest.mark.usefixtures("small_steps")
LINES = [line(f"text {i} " * (i % 50), f"domain {i % 3}") for i in range(600)]
LINES[50] = "no document"
LINES[599] = ""


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "a.jsonl", LINES[:200]),
        write(tmp_path / "b.jsonl", LINES[200:400]),
        write(tmp_path / "c.jsonl.zst", LINES[400:]),
    ]


def test_killed_at_random_moments_it_still_ends_with_the_same_bytes(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    command = [sys.executable, Path(__file__).with_name("killed_runs.py"), tmp_path, "30", "0"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    killed, finished = map(int, done.stdout.split())
    assert killed >= 30
    assert finished >= 1


def interrupted(inputs: list[Path], tokenizer: Path, output: Path, at: int, **options: int) -> None:
    """A run that ends with an error when it takes in block number `at`."""
    taken = 0
    add = journal.JournalledRun.add

    def stop(self: journal.JournalledRun, *block: object) -> None:
        nonlocal taken
        taken += 1
        if taken == at:
            raise KeyboardInterrupt
        add(self, *block)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.JournalledRun, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, tokenizer, output, **options)  # type: ignore[arg-type]


def test_what_is_finished_is_not_read_again(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor encoded; with another number of workers, and with what the first run skipped."""
    preprocess(inputs, tokenizer_folder, tmp_path / "expected", max_errors=1)
    out = tmp_path / "out"
    interrupted(inputs, tokenizer_folder, out, 30, max_errors=1)
    assert not out.exists()
    with (tmp_path / ".out.partial" / journal.JOURNAL).open("rb") as file:
        saved = json.loads(file.readline())["state"]
    assert saved["file"] == 1
    read: list[tuple[str, int]] = []

    def noting(path: Path, *rest: Any, **keys: Any) -> object:
        if rest:  # not the look whether the first block's documents name domains
            read.append((path.name, rest[1].line))
        return read_blocks(path, *rest, **keys)

    monkeypatch.setattr(preprocess_module, "read_blocks", noting)
    preprocess(inputs, tokenizer_folder, out, workers=2, max_errors=1)
    assert read == [("b.jsonl", saved["line"]), ("c.jsonl.zst", 1)]
    assert saved["line"] > 1
    assert_same_files(out, tmp_path / "expected")
    preprocess(inputs, tokenizer_folder, out)
    assert len(read) == 2  # done is done
    assert not (tmp_path / ".out.partial").exists()


def test_an_unfinished_run_is_not_mixed_with_another_one(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    interrupted(inputs, tokenizer_folder, tmp_path / "out", 30, max_errors=1)
    options = DataOptions(append_eod=False)
    with pytest.raises(ValueError, match=r"an unfinished run with other options.*--restart"):
        preprocess(inputs, tokenizer_folder, tmp_path / "out", options=options, max_errors=1)
    with pytest.raises(ValueError, match="an unfinished run with other inputs"):
        preprocess(inputs[1:], tokenizer_folder, tmp_path / "out", max_errors=1)
    found = preprocess(inputs[1:], tokenizer_folder, tmp_path / "out", restart=True)
    assert [facts.name for facts in found.inputs] == ["b.jsonl", "c.jsonl.zst"]
    preprocess(inputs[1:], tokenizer_folder, tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_two_runs_do_not_write_the_same_output(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    with work_folder(tmp_path / "out"):
        with pytest.raises(ValueError, match=r"another run is writing .*out; wait for it"):
            preprocess(inputs, tokenizer_folder, tmp_path / "out")
        assert (tmp_path / ".out.partial" / "lock").exists()


@pytest.mark.usefixtures("worker_processes")
def test_a_killed_worker_ends_the_run_with_its_lines_and_what_to_do(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    many = write(tmp_path / "a.jsonl", [line("some words " * 300)] * 300)
    found: list[int] = []

    def kill_a_worker() -> None:
        me = os.getpid()
        while not found:
            children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
            busy = [
                c for c in children if b"data.workers" in Path(f"/proc/{c}/cmdline").read_bytes()
            ]
            if busy and (tmp_path / ".out.partial" / journal.JOURNAL).exists():
                found.append(int(busy[0]))
                os.kill(found[0], signal.SIGKILL)
            time.sleep(0.01)

    threading.Thread(target=kill_a_worker, daemon=True).start()
    with pytest.raises(WorkerDied, match=r"a\.jsonl:\d+: .* was killed by SIGKILL .* goes on"):
        preprocess([many], tokenizer_folder, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
    assert preprocess([many], tokenizer_folder, tmp_path / "out").domains["A"].documents == 300


def test_workers_end_with_the_process_that_feeds_them(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Killed with no chance to tidy up, it leaves nobody behind."""
    many = write(tmp_path / "a.jsonl", [line("some words " * 300)] * 3000)
    program = f"""
from pathlib import Path
from typing import Any
from megatron_infoentropy.data.preprocess import preprocess
preprocess([Path({str(many)!r})], Path({str(tokenizer_folder)!r}), Path({str(tmp_path / "o")!r}),
    workers=2)
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        children: list[str] = []
        while len(children) < 2:
            assert process.poll() is None
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    for child in children:
        while Path(f"/proc/{child}").exists() and "Z" not in state(child):
            time.sleep(0.01)  # pytest's own limit ends a wait that is in vain


def state(process: str) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_with_room(
    inputs: list[Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk's: the same error at the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, before[1]))
    try:
        with pytest.raises(
            DiskFull, match=r"no room .* MB are free\): make room and give the same"
        ):
            preprocess(inputs, tokenizer_folder, tmp_path / "out", max_errors=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / journal.JOURNAL).exists()
    preprocess(inputs, tokenizer_folder, tmp_path / "out", max_errors=1)
    preprocess(inputs, tokenizer_folder, tmp_path / "expected", max_errors=1)
    assert_same_files(tmp_path / "out", tmp_path / "expected")
