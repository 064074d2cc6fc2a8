"""Preprocesses again and again in forked processes that kill themselves at random moments.

    python killed_runs.py FOLDER KILLS SEED     FOLDER holds tokenizer/ and the inputs *.jsonl*

A moment is the n-th time that the process opens, renames, removes or makes a file or is about to
write to one (then half of the data gets there). Each process goes on from what the one before it
left. Whenever one gets through, its output is compared with that of an undisturbed run. Encoding
is done in the process itself: what is tried here is what is on the disk.
"""

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from encoder_here import EncoderHere

from megatron_infoentropy.data import blocks, journal, workers, writer
from megatron_infoentropy.data import preprocess as preprocess_module
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.tokenizer import load_tokenizer

MOMENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


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


def survives(folder: Path, moment: int) -> bool:
    """Whether a process that dies at that moment was done before it."""
    process = os.fork()
    if process == 0:
        die_at(moment)
        make(folder, folder / "out")
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status == 0


def make(folder: Path, output: Path) -> None:
    preprocess(sorted(folder.glob("*.jsonl*")), folder / "tokenizer", output, max_errors=5)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(folder: Path, kills: int, seed: int) -> None:
    loaded = load_tokenizer(folder / "tokenizer")
    preprocess_module.load_tokenizer = lambda _: loaded  # which opens files that are only read
    workers._Worker = EncoderHere  # type: ignore[assignment, misc]
    blocks.BLOCK_BYTES = 2000
    blocks._READ_BYTES = 1000
    os.fsync = lambda _: None  # a killed process loses nothing that a running system holds
    make(folder, folder / "expected")
    journal.SAVE_EVERY_S = journal.SAVE_AFTER_INPUT_S = 0.0
    expected = content(folder / "expected")
    rng = random.Random(seed)
    killed = finished = 0
    while killed < kills or finished == 0:
        if not survives(folder, rng.choice((20, 200, 2000)) * rng.randint(1, 10) // 10 + 1):
            killed += 1
            continue
        finished += 1
        assert content(folder / "out") == expected
        left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
        assert left <= {".out.partial"}, left
        for path in (folder / "out").iterdir():
            path.unlink()
        (folder / "out").rmdir()
    sys.stdout.write(f"{killed} {finished}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
