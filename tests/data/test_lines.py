"""Lines: what is accepted, and bad ones, which make Megatron's tool wait for ever, by name."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from text_files import line, write

from megatron_infoentropy.data import blocks
from megatron_infoentropy.data.blocks import Block, BrokenLineError, Keys, Position
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.jsonl import Record, read_documents
from megatron_infoentropy.data.manifest import PILE_DOMAIN, DataOptions

NO_KEY = '{"txt": "a", "meta": {"pile_set_name": "A"}}'
PLAIN = [json.dumps({"text": f"plain {number}"}) for number in range(40)]
PILE = [line(f"text {number}") for number in range(40)]
NO_STRING = '{"text": 3, "meta": {"pile_set_name": "A"}}'
FIRST, SECOND = (f"{line(text)}\n".encode() for text in ("a", "b"))
ZST, GZ, PADDING = zstandard.compress(FIRST), gzip.compress(FIRST), bytes(10_000)
LARGE = zstandard.compress("\n".join(line(f"document {i}" * 50) for i in range(20_000)).encode())


@pytest.fixture(autouse=True)
def few_lines_a_block(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 150)
    monkeypatch.setattr(blocks, "_READ_BYTES", 50)


def read(path: Path) -> list[Record]:
    return list(read_documents(path, Keys("text", PILE_DOMAIN)))


def broken(path: Path) -> BrokenLineError:
    with pytest.raises(BrokenLineError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{caught.value.line}: ")
    return caught.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_documents_come_in_order_with_domain_and_size(tmp_path, name):
    path = write(tmp_path / name, [line("one", "A"), line("zw\u00f6lf", "B")])
    assert read(path) == [Record("one", 3, "A"), Record("zw\u00f6lf", 6, "B")]


def test_only_newlines_separate_documents(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be"
    path = tmp_path / "a.jsonl"
    raw = json.dumps({"text": text, "meta": {"pile_set_name": "A"}}, ensure_ascii=False)
    path.write_bytes(f"{raw}\r\n{raw}".encode())  # a Windows line end; no end at the last line
    assert [record.text for record in read(path)] == [text, text]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.zst", ZST + b"\x50\x2a\x4d\x18\x03\0\0\0xyz" + zstandard.compress(SECOND)),
        # Tapes fill their last block with zeros, and gzip reads such files.
        ("a.jsonl.gz", GZ + PADDING + gzip.compress(SECOND) + PADDING),
    ],
)
def test_every_frame_of_a_concatenated_file_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [record.text for record in read(tmp_path / name)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "at", "reason"),
    [
        ("a.jsonl.gz", PADDING, 1, "damaged compressed data"),
        ("a.jsonl.gz", PADDING + GZ, 1, "damaged compressed data"),
        ("a.jsonl.gz", GZ + PADDING + b"x", 2, "the file is truncated"),
        ("a.jsonl.zst", ZST + b"garbage", 2, "damaged compressed data"),
        ("a.jsonl.zst", FIRST, 1, "damaged compressed data"),
        ("a.jsonl.zst", b"", 1, "the file is truncated"),
        ("a.jsonl.zst", ZST[:3], 1, "the file is truncated"),
        ("a.jsonl.zst", LARGE[: len(LARGE) // 2], None, "the file is truncated"),
        ("a.jsonl.zst", LARGE[:-1], None, "the file is truncated"),
        ("a.jsonl", ZST, 1, "not UTF-8"),
    ],
)
def test_a_damaged_file_is_an_error_and_not_a_shorter_corpus(tmp_path, name, content, at, reason):
    (tmp_path / name).write_bytes(content)
    error = broken(tmp_path / name)
    assert reason in error.reason
    assert error.line == at or (at is None and error.line > 1)


def test_other_kinds_of_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl.xz").touch()
    with pytest.raises(ValueError, match=r"must be a \.jsonl, .* or \.arrow file, got .*xz"):
        read(tmp_path / "a.jsonl.xz")
    with pytest.raises(ValueError, match="no such input file"):
        read(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"text": "cut o', "not JSON: Unterminated string"),
        ('["text"]', "expected a JSON object, got list"),
        ('{"body": "a"}', "no \"text\" key; the keys are ['body']"),
        ('{"text": null, "meta": {"pile_set_name": "A"}}', "must be a string, got NoneType"),
        ('{"text": "a"}', "no domain: expected a non-empty string at meta.pile_set_name"),
        ('{"text": "a", "meta": "A"}', "no domain"),
        ('{"text": "a", "meta": {"pile_set_name": 3}}', "no domain"),
        (r'{"text": "ab\ud800", "meta": {"pile_set_name": "A"}}', "half a surrogate pair at 2"),
        ('{"text": "\ud800"}', "not UTF-8 at byte 10 of the line"),
        ("[" * 200_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "integer string conversion"),
        ("  ", "blank line before the end of the file"),
        ("", "blank line before the end of the file"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_the_first_bad_line_ends_a_run_by_file_line_and_reason(
    prepare, tmp_path, name, bad, reason
):
    """As it does where no worker parses it."""
    lines = [line(f"text {i}") for i in range(20)]
    path = write(tmp_path / name, [*lines[:13], bad, *lines[13:], "{"])
    error = broken(path)
    assert (error.line, reason in error.reason) == (14, True), error
    with pytest.raises(BrokenLineError) as caught:
        prepare(path, workers=2, options=DataOptions(split_by=PILE_DOMAIN))
    assert str(caught.value) == str(error)
    assert list(tmp_path.iterdir()) == [path]


def test_bad_lines_are_skipped_counted_and_listed(prepare, tmp_path):
    good = [line(f"text {i}", "AB"[i % 2]) for i in range(30)]
    first = [*good[:7], "", "", "  ", good[7], "{", *good[8:15], "", ""]
    second = [NO_KEY, *good[15:], line("", "B"), NO_STRING]
    paths = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl.gz", second)]
    done = prepare(paths, max_errors=6)
    a, b = done.inputs
    assert (a.lines, a.documents, a.empty, a.rejected, a.blank) == (21, 15, 0, 4, 2)
    assert (b.lines, b.documents, b.empty, b.rejected, b.blank) == (18, 16, 1, 2, 0)
    assert {name: facts.rejected for name, facts in done.domains.items()} == {"A": 2, "B": 0}
    listed = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    assert [entry.split("\t")[:2] for entry in listed] == [
        *(["a.jsonl", number] for number in ("8", "9", "10", "12")),
        *(["b.jsonl.gz", number] for number in ("1", "18")),
    ]
    prepare(write(tmp_path / "c.jsonl", good), "clean")
    for name, more in (("a", 0), ("b", 1)):
        found, clean = (IndexedReader(tmp_path / folder / name) for folder in ("out", "clean"))
        assert len(found) == len(clean) + more
        assert (found.tokens == clean.tokens).all()
    assert not (tmp_path / "clean" / "rejected.tsv").exists()


@pytest.mark.parametrize(
    ("name", "lines", "kept", "reason"),
    [
        ("a.jsonl", ["{", line("a"), "[", "x"], None, r":4: not JSON: .*\(2 were skipped already"),
        ("a.jsonl.gz", [line(f"text {i}") for i in range(500)], -20, "the file is truncated"),
    ],
)
def test_a_line_more_than_allowed_and_a_truncated_file_are_not_skipped(
    prepare, tmp_path, name, lines, kept, reason
):
    path = write(tmp_path / name, lines)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BrokenLineError, match=reason):
        prepare(path, max_errors=2)
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_are_not_counted_are_a_mistake_and_not_a_shorter_dataset(
    prepare, tmp_path, monkeypatch
):
    def one_more(path: Path, data: bytes, start: Position) -> Block:
        whole = block(path, data, start)
        return replace(whole, end=Position(whole.end.offset, whole.end.line + 1))

    path = write(tmp_path / "a.jsonl", [line("a")])
    block = blocks._block
    monkeypatch.setattr(blocks, "_block", one_more)
    with pytest.raises(RuntimeError, match="has 2 lines, but 1 documents, 0 rejected and 0 blank"):
        prepare(path)


@pytest.mark.parametrize("lines", [[*PILE, *PLAIN], [*PLAIN, *PILE]])
def test_text_without_domains_is_one_dataset_beside_those_of_domains(prepare, tmp_path, lines):
    nulls = ['{"text": "a", "meta": null}', '{"text": "b", "meta": {"pile_set_name": null}}']
    done = prepare(write(tmp_path / "a.jsonl", lines + nulls))
    assert {name: facts.documents for name, facts in done.domains.items()} == {"A": 40, "all": 42}
    plain = prepare(write(tmp_path / "b.jsonl", PLAIN + nulls), "plain")
    assert plain.domains["all"] == done.domains["all"]
    asked = DataOptions(split_by=None)
    assert prepare(tmp_path / "b.jsonl", "asked", options=asked).domains == plain.domains
    whole = prepare(tmp_path / "a.jsonl", "whole", options=asked)
    assert {name: facts.documents for name, facts in whole.domains.items()} == {"all": 82}


def test_the_byte_order_mark_of_windows_editors_is_no_part_of_a_line(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", PILE)
    clean = prepare(path, "clean").domains
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert prepare(path, "marked", workers=2).domains == clean  # checksums too
