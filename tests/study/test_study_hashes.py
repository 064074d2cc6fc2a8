"""Files are read once, then known by their size and time until either changes."""

import os
from pathlib import Path

import pytest
from small_study import write_study

from megatron_infoentropy.study import ledger
from megatron_infoentropy.study.ledger import Step, hash_files, hashes_of, read_progress, run_steps
from megatron_infoentropy.study.steps import find_digest, prepare

TEXT_STUDY = """
    recipe: recipe.yaml
    grid: [{objective: cross_entropy}]
    data: {text: text, tokenizer: tokenizer}
"""


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read, in any order."""
    names, real = [], ledger.hashlib.file_digest

    def file_digest(file, name):
        names.append(Path(file.name).name)
        return real(file, name)

    monkeypatch.setattr(ledger.hashlib, "file_digest", file_digest)
    return names


def later(path):
    """As if it was written a second after it was."""
    time = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))


def test_only_files_of_another_size_or_time_are_read_again(tmp_path, read):
    for name in ("same", "time", "size"):
        (tmp_path / name).write_text(name)
    first = hash_files(tmp_path, (".",), known={})
    assert sorted(read) == ["same", "size", "time"]
    read.clear()
    later(tmp_path / "time")
    size = (tmp_path / "size").stat()
    (tmp_path / "size").write_text("longer")
    os.utime(tmp_path / "size", ns=(size.st_atime_ns, size.st_mtime_ns))
    second = hash_files(tmp_path, (".",), known=first)
    assert sorted(read) == ["size", "time"]
    assert hashes_of(second) == hashes_of(hash_files(tmp_path, (".",), known={}))


def test_finished_steps_are_not_read_again_and_touched_ones_stay_finished(tmp_path, read):
    folder = tmp_path / "run"
    steps = [Step("one", 1, ("a",), lambda: (folder / "a").write_text("x"))]
    digest = run_steps(folder, steps, "")
    read.clear()
    assert read_progress(folder, steps, "").done == ("one",)
    assert read == []
    later(folder / "a")
    assert run_steps(folder, steps, "") == digest
    assert read == ["a"]  # now its new time is recorded
    assert read_progress(folder, steps, "").digest == digest
    assert read == ["a"]


def test_text_is_read_once_and_again_after_it_changed(tmp_path, read, monkeypatch):
    for split in ("train", "validation", "test"):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{split}.jsonl").write_text(split)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")

    def tokens(text, split, tokenizer, output):
        output.mkdir(parents=True, exist_ok=True)
        (output / "manifest.json").write_text((text / f"{split}.jsonl").read_text())

    monkeypatch.setattr("megatron_infoentropy.study.steps._tokens", tokens)
    study, output = write_study(tmp_path, TEXT_STUDY), tmp_path / "out"
    first = prepare(study, output)
    read.clear()
    assert prepare(study, output) == find_digest(study, output) == first
    assert read == []
    text = tmp_path / "text" / "train.jsonl"
    text.write_text("niart")
    later(text)
    assert find_digest(study, output) is None
    assert read == ["train.jsonl"]
    assert prepare(study, output) != first


@pytest.mark.parametrize("name", ["tokens/train/manifest.json", "tokenizer/tokenizer_config.json"])
def test_datasets_that_are_there_are_known_together_with_their_tokenizer(tmp_path, name):
    study, output = write_study(tmp_path), tmp_path / "out"
    (tmp_path / "tokenizer").mkdir()
    first = find_digest(study, output)
    assert prepare(study, output) == find_digest(study, output) == first
    (tmp_path / name).write_text('{"chat_template": ""}')
    assert find_digest(study, output) not in (first, None)
    assert not output.exists()
