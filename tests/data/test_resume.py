"""What ends a run, and that the same call afterwards gives the same bytes without redoing all."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from encoder_here import interrupted
from golden import assert_same_files
from text_files import line, write

from megatron_infoentropy.data import journal, writer
from megatron_infoentropy.data import preprocess as preprocess_module
from megatron_infoentropy.data.blocks import read_blocks
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import load_tokenizer
from megatron_infoentropy.data.workers import WorkerDied
from megatron_infoentropy.data.writer import DiskFull
from megatron_infoentropy.files import work_folder
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


def survives(inputs: list[Path], tokenizer: Path, output: Path, moment: int) -> bool:
    """Say whether a forked process that dies at that moment was done before it."""
    process = os.fork()
    if process == 0:
        try:
            die_at(moment)
            preprocess(inputs, tokenizer, output, max_errors=5)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


def test_killed_at_random_moments_it_still_ends_with_the_same_bytes(
    inputs, tokenizer_folder, tmp_path, monkeypatch
):
    """A moment is the n-th opening, renaming, removing or making of a file, or write to one.

    Of that write, half gets there. Each process goes on from what the one before it left.
    """
    loaded = load_tokenizer(tokenizer_folder)  # it opens files that are only read
    monkeypatch.setattr(preprocess_module, "load_tokenizer", lambda _: loaded)
    expected, out = tmp_path / "expected", tmp_path / "out"
    preprocess(inputs, tokenizer_folder, expected, max_errors=5)
    rng = random.Random(0)
    killed = finished = 0
    while killed < 30 or finished == 0:
        moment = rng.choice((20, 200, 2000)) * rng.randint(1, 10) // 10 + 1
        if not survives(inputs, tokenizer_folder, out, moment):
            killed += 1
            continue
        finished += 1
        assert_same_files(out, expected)
        assert_same_files(expected, out)
        assert {path.name for path in tmp_path.glob(".*")} <= {".out.partial"}
        shutil.rmtree(out)


def test_what_is_finished_is_not_read_again(inputs, tokenizer_folder, tmp_path, monkeypatch):
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

    shown: list[Any] = []

    def noting_progress(*about: Any) -> Any:
        shown.append(about)
        return progress(*about)

    monkeypatch.setattr(preprocess_module, "read_blocks", noting)
    monkeypatch.setattr(preprocess_module, "progress", noting_progress)
    preprocess(inputs, tokenizer_folder, out, workers=2, max_errors=1)
    sizes = [path.stat().st_size for path in inputs]
    assert shown == [("preprocess", sum(sizes), "bytes", sizes[0])]
    assert read == [("b.jsonl", saved["line"]), ("c.jsonl.zst", 1)]
    assert saved["line"] > 1
    assert_same_files(out, tmp_path / "expected")
    preprocess(inputs, tokenizer_folder, out)
    assert len(read) == 2  # done is done
    assert not (tmp_path / ".out.partial").exists()


def test_an_unfinished_run_is_not_mixed_with_another_one(inputs, tokenizer_folder, tmp_path):
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
    inputs, tokenizer_folder, tmp_path, let_another_be_first
):
    """Nor does one replace what the other made while it got ready."""
    with work_folder(tmp_path / "out"):
        with pytest.raises(ValueError, match=r"another run is writing .*out; wait for it"):
            preprocess(inputs, tokenizer_folder, tmp_path / "out")
        assert (tmp_path / ".out.partial" / "lock").exists()

    let_another_be_first(preprocess_module)
    with pytest.raises(ValueError, match="not empty"):
        preprocess(inputs, tokenizer_folder, tmp_path / "out")
    assert (tmp_path / "out" / "a.bin").read_text() == "other"


@pytest.mark.usefixtures("worker_processes")
def test_a_killed_worker_ends_the_run_with_its_lines_and_what_to_do(tokenizer_folder, tmp_path):
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


def test_workers_end_with_the_process_that_feeds_them(tokenizer_folder, tmp_path):
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
            time.sleep(0.01)
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
    inputs, tokenizer_folder, tmp_path
):
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
