"""A dataset is that of its inputs' content and of all of the tokenizer, not of names and sizes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from encoder_here import when_reading
from golden import assert_same_files
from text_files import line, write

from megatron_infoentropy.data import blocks
from megatron_infoentropy.data import preprocess as preprocess_module
from megatron_infoentropy.data.blocks import BrokenLineError, UnfitDocumentsError
from megatron_infoentropy.data.verify import Fault, verify

LINES = [line(f"text {i} " * (i % 50), "AB"[i % 2]) for i in range(300)]
OTHERS = [each.replace("text 151", "next 151") for each in LINES]  # as many bytes


@pytest.fixture(autouse=True)
def small_samples(small_steps, monkeypatch):
    monkeypatch.setattr(preprocess_module, "_SAMPLE_BYTES", 16)


@pytest.fixture
def text(tmp_path):
    return write(tmp_path / "a.jsonl.zst", LINES)


def rewritten(path: Path, lines: list[str] = OTHERS) -> None:
    """Other content under the same name, written at the same time to all appearances."""
    before = path.stat()
    write(path, lines)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    before = path.stat()
    write(path.with_name(f"new-{path.name}"), OTHERS).rename(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_another_file_of_the_same_name_and_size_is_another_input(prepare, text, change):
    made = prepare(text)
    out = made.folder
    assert made.inputs[0].sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert verify(out, inputs=[text]) == []
    change(text)
    with pytest.raises(ValueError, match=r"out is not empty .*--overwrite"):
        prepare(text)
    problem = f"was made of 1 file(s) {text.name} of other content than those given"
    assert verify(out, inputs=[text]) == [
        Fault(text, "is not what the dataset was made of"),
        Fault(out / "manifest.json", problem),
    ]
    prepare(text, overwrite=True)
    assert_same_files(out, prepare(text, "expected").folder)


def test_samples_tell_inputs_apart_where_times_cannot(prepare, tmp_path, monkeypatch):
    """A dataset that was copied is younger than whatever was done to its inputs."""
    monkeypatch.setattr(preprocess_module, "_SAMPLE_BYTES", 100)
    text = write(tmp_path / "a.jsonl", LINES)
    out = prepare(text).folder
    rewritten(text, [*LINES[:-1], LINES[-1].replace("text 299", "next 299")])
    later = text.stat().st_ctime_ns + 10**12
    os.utime(out / "manifest.json", ns=(later, later))
    with pytest.raises(ValueError, match="is not empty"):
        prepare(text)


def test_the_same_content_is_the_same_input_whenever_it_was_written(prepare, text, tmp_path):
    out = prepare(text).folder
    made = (out / "manifest.json").stat().st_ino
    write(text, LINES)
    prepare(text)
    assert (out / "manifest.json").stat().st_ino == made
    shutil.copytree(out, tmp_path / "copy")
    prepare(text, "copy")


def test_inputs_are_verified_by_name_and_content(prepare, tmp_path):
    """Two of one name, in another order, and one that is missing or too many."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    texts = [write(tmp_path / name, [line(name)]) for name in ("1.jsonl", "x/2.jsonl", "y/2.jsonl")]
    out = prepare(texts).folder
    other = write(tmp_path / "3.jsonl", LINES)
    assert verify(out, inputs=texts[::-1]) == []
    for given, wrong in ((texts[:2], out / "manifest.json"), ([*texts, other], other)):
        assert [fault.path for fault in verify(out, inputs=given)] == [wrong]
    with pytest.raises(ValueError, match="only the manifest of its folder has inputs"):
        verify(out / "a", inputs=texts)


def test_another_end_token_is_another_dataset_and_another_run(prepare, tokenizer_folder, tmp_path):
    """A token of the vocabulary that is no special one."""
    another = Path(shutil.copytree(tokenizer_folder, tmp_path / "another"))
    config = json.loads((another / "tokenizer_config.json").read_text())
    (another / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "e"}))
    text = write(tmp_path / "a.jsonl", [*LINES, "no document", *LINES])
    with pytest.raises(BrokenLineError, match=r"a\.jsonl:301"):
        prepare(text)
    with pytest.raises(ValueError, match="an unfinished run with other tokenizer"):
        prepare(text, tokenizer=another, max_errors=1)
    out = prepare(text, max_errors=1).folder
    assert_same_files(out, prepare(text, "expected", max_errors=1).folder)
    with pytest.raises(ValueError, match=r"out is not empty .*--overwrite"):
        prepare(text, tokenizer=another, max_errors=1)
    assert verify(out, tokenizer=another)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda path: write(path, LINES[:-10]), "a.jsonl"),
        (lambda path: path.open("a").write(line("late") + "\n"), "b.jsonl"),
        (
            lambda path: rewritten(path, [LINES[0], LINES[1].replace("text", "next"), *LINES[2:]]),
            "a.jsonl",
        ),
        (replaced, "b.jsonl"),
    ],
    ids=["shrunk", "appended", "rewritten", "replaced"],
)
def test_an_input_that_changes_while_it_is_read_is_refused(
    prepare, tmp_path, monkeypatch, change, name
):
    """The first of three: while it is read itself, and while the one behind it is."""
    texts = [write(tmp_path / f"{each}.jsonl", LINES) for each in "abc"]
    when_reading(monkeypatch, name, lambda: change(texts[0]))
    with pytest.raises(UnfitDocumentsError, match=r"a\.jsonl changed while it was read"):
        prepare(texts)
    assert sorted(tmp_path.iterdir()) == sorted(texts)


def test_an_input_may_be_touched_while_it_is_read(prepare, text, monkeypatch):
    when_reading(monkeypatch, text.name, text.touch)
    assert prepare(text).inputs[0].lines == len(LINES)


def test_reading_ends_where_the_file_ended_when_it_was_opened(tmp_path):
    text = write(tmp_path / "a.jsonl", LINES)
    size = text.stat().st_size

    def grow(_: int) -> None:
        if text.stat().st_size < 10 * size:
            with text.open("a") as file:
                file.write("x" * 2000)

    assert sum(map(len, blocks.read_chunks(text, grow))) == size
