"""A disk that is really full: a small tmpfs, which grows afterwards."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from golden import assert_same_files
from text_files import line, write

from megatron_infoentropy.data import blocks, journal
from megatron_infoentropy.data.preprocess import DiskFull, preprocess


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED: a full disk needs the right to mount one ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("saved", [False, True], ids=["nothing saved yet", "journal saved"])
def test_a_full_disk_is_one_sentence_shows_nothing_and_the_run_goes_on_with_room(
    small_disk: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: bool,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(journal, "SAVE_EVERY_S", 0.0 if saved else 1e9)
    monkeypatch.setattr(journal, "SAVE_AFTER_INPUT_S", 0.0 if saved else 1e9)
    lines = [line(f"text {i} and {i * i} " * 20, f"domain {i % 3}") for i in range(3000)]
    text = write(tmp_path / "a.jsonl", lines)
    out = small_disk / "out"
    with pytest.raises(DiskFull) as full:
        preprocess([text], tokenizer_folder, out)
    said = str(full.value)
    assert said.startswith(f"no room for the output below {small_disk} (No space left on device; ")
    assert said.endswith("make room and give the same command again, it goes on from what is "
                         "finished")  # fmt: skip
    assert not out.exists()
    assert [entry.name for entry in small_disk.iterdir()] == ([".out.partial"] if saved else [])
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    preprocess([text], tokenizer_folder, out)
    preprocess([text], tokenizer_folder, tmp_path / "expected")
    assert_same_files(out, tmp_path / "expected")
    assert [entry.name for entry in small_disk.iterdir()] == ["out"]
