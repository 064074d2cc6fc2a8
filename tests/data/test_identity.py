"""A dataset is that of its inputs' content and of all of the tokenizer, not of names and sizes."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from golden import assert_same_files
from text_files import line, write

from megatron_infoentropy.data import blocks, journal
from megatron_infoentropy.data import preprocess as preprocess_module
from megatron_infoentropy.data.blocks import Block, BrokenLineError, UnfitDocumentsError
from megatron_infoentropy.data.preprocess import preprocess
from megatron_infoentropy.data.verify import Fault, verify
from megatron_infoentropy.data.workers import Encoded

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
def test_another_file_of_the_same_name_and_size_is_another_input(
    text, tokenizer_folder, tmp_path, change
):
    out = tmp_path / "out"
    facts = preprocess([text], tokenizer_folder, out).inputs[0]
    assert facts.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert verify(out, inputs=[text]) == []
    change(text)
    with pytest.raises(ValueError, match=r"out is not empty .*--overwrite"):
        preprocess([text], tokenizer_folder, out)
    problem = f"was made of 1 file(s) {text.name} of other content than those given"
    assert verify(out, inputs=[text]) == [
        Fault(text, "is not what the dataset was made of"),
        Fault(out / "manifest.json", problem),
    ]
    preprocess([text], tokenizer_folder, out, overwrite=True)
    preprocess([text], tokenizer_folder, tmp_path / "expected")
    assert_same_files(out, tmp_path / "expected")


def test_samples_tell_inputs_apart_where_times_cannot(tokenizer_folder, tmp_path, monkeypatch):
    """A dataset that was copied is younger than whatever was done to its inputs."""
    monkeypatch.setattr(preprocess_module, "_SAMPLE_BYTES", 100)
    text, out = write(tmp_path / "a.jsonl", LINES), tmp_path / "out"
    preprocess([text], tokenizer_folder, out)
    rewritten(text, [*LINES[:-1], LINES[-1].replace("text 299", "next 299")])
    later = text.stat().st_ctime_ns + 10**12
    os.utime(out / "manifest.json", ns=(later, later))
    with pytest.raises(ValueError, match="is not empty"):
        preprocess([text], tokenizer_folder, out)


def test_the_same_content_is_the_same_input_whenever_it_was_written(
    text, tokenizer_folder, tmp_path
):
    out = tmp_path / "out"
    preprocess([text], tokenizer_folder, out)
    made = (out / "manifest.json").stat().st_ino
    write(text, LINES)
    preprocess([text], tokenizer_folder, out)
    assert (out / "manifest.json").stat().st_ino == made
    shutil.copytree(out, tmp_path / "copy")
    preprocess([text], tokenizer_folder, tmp_path / "copy")


def test_inputs_are_verified_by_name_and_content(tokenizer_folder, tmp_path):
    """Two of one name, in another order, and one that is missing or too many."""
    texts = [write(tmp_path / "1.jsonl", LINES)]
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        texts.append(write(tmp_path / name / "2.jsonl", [line(name)]))
    preprocess(texts, tokenizer_folder, tmp_path / "out")
    assert verify(tmp_path / "out", inputs=texts[::-1]) == []
    assert [found.path.name for found in verify(tmp_path / "out", inputs=texts[:2])] == [
        "manifest.json"
    ]
    other = write(tmp_path / "3.jsonl", LINES)
    assert verify(tmp_path / "out", inputs=[*texts, other]) == [
        Fault(other, "is not what the dataset was made of")
    ]
    with pytest.raises(ValueError, match="only the manifest of its folder has inputs"):
        verify(tmp_path / "out" / "a", inputs=texts)


@pytest.fixture
def with_another_end(tokenizer_folder, tmp_path):
    """The tokenizer, where a token of its vocabulary ends documents that is no special one."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "another")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "e"}))
    return Path(folder)


def test_another_end_token_is_another_dataset(text, tokenizer_folder, with_another_end, tmp_path):
    preprocess([text], tokenizer_folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out is not empty .*--overwrite"):
        preprocess([text], with_another_end, tmp_path / "out")
    assert verify(tmp_path / "out", tokenizer=with_another_end)


def test_a_run_does_not_go_on_with_another_end_token(tokenizer_folder, with_another_end, tmp_path):
    text = write(tmp_path / "a.jsonl", [*LINES, "no document", *LINES])
    with pytest.raises(BrokenLineError, match=r"a\.jsonl:301"):
        preprocess([text], tokenizer_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="an unfinished run with other tokenizer"):
        preprocess([text], with_another_end, tmp_path / "out", max_errors=1)
    preprocess([text], tokenizer_folder, tmp_path / "out", max_errors=1)
    preprocess([text], tokenizer_folder, tmp_path / "expected", max_errors=1)
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def when_reading(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[], object]) -> None:
    """Have something happen when the first lines of the input `name` are taken in."""
    add = journal.JournalledRun.add

    def and_change(self: journal.JournalledRun, block: Block, encoded: Encoded) -> None:
        if block.path.name == name and block.start.line == 1:
            change()
        add(self, block, encoded)

    monkeypatch.setattr(journal.JournalledRun, "add", and_change)


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
    tokenizer_folder, tmp_path, monkeypatch, change, name
):
    """The first of three: while it is read itself, and while the one behind it is."""
    texts = [write(tmp_path / f"{each}.jsonl", LINES) for each in "abc"]
    when_reading(monkeypatch, name, lambda: change(texts[0]))
    with pytest.raises(UnfitDocumentsError, match=r"a\.jsonl changed while it was read"):
        preprocess(texts, tokenizer_folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted(texts)


def test_an_input_may_be_touched_while_it_is_read(text, tokenizer_folder, tmp_path, monkeypatch):
    when_reading(monkeypatch, text.name, text.touch)
    assert preprocess([text], tokenizer_folder, tmp_path / "out").inputs[0].lines == len(LINES)


def test_reading_ends_where_the_file_ended_when_it_was_opened(tmp_path):
    text = write(tmp_path / "a.jsonl", LINES)
    size = text.stat().st_size

    def grow(_: int) -> None:
        if text.stat().st_size < 10 * size:
            with text.open("a") as file:
                file.write("x" * 2000)

    assert sum(map(len, blocks.read_chunks(text, grow))) == size
