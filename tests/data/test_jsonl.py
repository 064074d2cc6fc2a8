"""Reading documents: what is accepted, and how a broken line is named."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from text_files import line

from megatron_infoentropy.data.blocks import BrokenLineError, Keys
from megatron_infoentropy.data.jsonl import Record, read_documents

KEY = "meta.pile_set_name"


def read(path: Path, domain_key: str | None = KEY) -> list[Record]:
    return list(read_documents(path, Keys("text", domain_key)))


def broken(path: Path) -> BrokenLineError:
    with pytest.raises(BrokenLineError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{caught.value.line}: ")
    return caught.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_documents_come_in_order_with_domain_and_size(write_lines, name):
    path = write_lines(name, [line("one", "A"), line("zw\u00f6lf", "B")])
    assert read(path) == [Record("one", 3, "A"), Record("zw\u00f6lf", 6, "B")]


def test_only_newlines_separate_documents(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be"
    path = tmp_path / "a.jsonl"
    raw = json.dumps({"text": text, "meta": {"pile_set_name": "A"}}, ensure_ascii=False)
    path.write_bytes(f"{raw}\r\n{raw}".encode())  # a Windows line end; no end at the last line
    assert [record.text for record in read(path)] == [text, text]


def test_every_frame_of_a_concatenated_file_is_read(tmp_path):
    frames = [zstandard.compress(f"{line(text)}\n".encode()) for text in ("a", "b", "c")]
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0xyz"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable.join(frames))
    assert [record.text for record in read(path)] == ["a", "b", "c"]


def test_zeros_around_the_members_of_a_gz_are_no_damage(tmp_path):
    """Tapes fill their last block, and gzip reads such files."""
    path, padding = tmp_path / "a.jsonl.gz", 10_000
    members = [gzip.compress(f"{line(text)}\n".encode()) for text in ("a", "b")]
    path.write_bytes(b"".join(member + bytes(padding) for member in members))
    assert [record.text for record in read(path)] == ["a", "b"]
    for content in (
        bytes(padding),
        bytes(padding) + members[0],
        members[0] + bytes(padding) + b"x",
    ):
        path.write_bytes(content)
        assert (
            "damaged compressed data" in broken(path).reason or "truncated" in broken(path).reason
        )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"text": "a"', "not JSON"),
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
        ("  ", "blank line before the end"),
        ("", "blank line before the end"),
    ],
)
def test_a_broken_line_is_named_by_file_number_and_reason(write_lines, bad, reason):
    error = broken(write_lines("a.jsonl.zst", [line("a"), line("b"), bad, line("c")]))
    assert error.line == 3
    assert reason in error.reason


@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_a_truncated_file_is_an_error_and_not_a_shorter_corpus(write_lines, kept):
    path = write_lines("a.jsonl.zst", [line(f"document {i}" * 50) for i in range(20_000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if kept == 0.5 else int(kept)])
    error = broken(path)
    assert "the file is truncated" in error.reason
    assert error.line == 1 or kept in (0.5, -1)


def test_damaged_compression_is_named(write_lines):
    path = write_lines("a.jsonl.zst", [line("a")])
    path.write_bytes(path.read_bytes() + b"garbage")
    assert broken(path).line == 2
    path.write_bytes(line("a").encode())
    assert "damaged compressed data" in broken(path).reason


def test_compressed_text_under_a_plain_name_is_an_error(write_lines):
    path = write_lines("a.jsonl.zst", [line("a")])
    assert "not UTF-8" in broken(path.rename(path.with_name("a.jsonl"))).reason


def test_other_kinds_of_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl.xz").touch()
    with pytest.raises(ValueError, match=r"must be a \.jsonl, .* or \.arrow file, got .*xz"):
        read(tmp_path / "a.jsonl.xz")
    with pytest.raises(ValueError, match="no such input file"):
        read(tmp_path / "missing.jsonl")
