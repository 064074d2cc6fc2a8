"""Bad lines, which make Megatron's tool wait for ever: an end by name, or a count; plain lines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from text_files import line, write

from megatron_infoentropy.data import blocks
from megatron_infoentropy.data.blocks import Block, BrokenLineError, Position
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.preprocess import preprocess

NO_KEY = '{"txt": "a", "meta": {"pile_set_name": "A"}}'
PLAIN = [json.dumps({"text": f"plain {number}"}) for number in range(40)]
PILE = [line(f"text {number}") for number in range(40)]
NO_STRING = '{"text": 3, "meta": {"pile_set_name": "A"}}'


@pytest.fixture(autouse=True)
def few_lines_a_block(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 150)
    monkeypatch.setattr(blocks, "_READ_BYTES", 50)


@pytest.mark.parametrize(
    ("suffix", "bad", "reason"),
    [
        ("", '{"text": "cut o', "not JSON: Unterminated string"),
        (".zst", "", "blank line before the end of the file"),
        (".gz", '{"text": "a"}', "no domain: expected a non-empty string at meta.pile_set_name"),
    ],
)
def test_the_first_bad_line_ends_the_run_by_file_line_and_reason(
    tokenizer_folder, tmp_path, suffix, bad, reason
):
    lines = [line(f"text {i}") for i in range(20)]
    path = write(tmp_path / f"a.jsonl{suffix}", [*lines[:13], bad, *lines[13:], "{"])
    with pytest.raises(BrokenLineError) as caught:
        preprocess([path], tokenizer_folder, tmp_path / "out", workers=2)
    assert str(caught.value).startswith(f"{path}:14: {reason}")
    assert list(tmp_path.iterdir()) == [path]


def test_bad_lines_are_skipped_counted_and_listed(tokenizer_folder, tmp_path):
    good = [line(f"text {i}", "AB"[i % 2]) for i in range(30)]
    first = [*good[:7], "", "", "  ", good[7], "{", *good[8:15], "", ""]
    second = [NO_KEY, *good[15:], line("", "B"), NO_STRING]
    paths = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl.gz", second)]
    done = preprocess(paths, tokenizer_folder, tmp_path / "out", max_errors=6)
    a, b = done.inputs
    assert (a.lines, a.documents, a.empty, a.rejected, a.blank) == (21, 15, 0, 4, 2)
    assert (b.lines, b.documents, b.empty, b.rejected, b.blank) == (18, 16, 1, 2, 0)
    assert {name: facts.rejected for name, facts in done.domains.items()} == {"A": 2, "B": 0}
    listed = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    assert [entry.split("\t")[:2] for entry in listed] == [
        *(["a.jsonl", number] for number in ("8", "9", "10", "12")),
        *(["b.jsonl.gz", number] for number in ("1", "18")),
    ]
    preprocess([write(tmp_path / "c.jsonl", good)], tokenizer_folder, tmp_path / "clean")
    for name, more in (("a", 0), ("b", 1)):
        found, clean = (IndexedReader(tmp_path / folder / name) for folder in ("out", "clean"))
        assert len(found) == len(clean) + more
        assert (found.tokens == clean.tokens).all()
    assert not (tmp_path / "clean" / "rejected.tsv").exists()


def test_one_bad_line_more_than_allowed_ends_the_run(tokenizer_folder, tmp_path):
    path = write(tmp_path / "a.jsonl", ["{", line("a"), "[", line("b"), "x"])
    with pytest.raises(BrokenLineError, match=r"a\.jsonl:5: not JSON: .*\(2 were skipped already"):
        preprocess([path], tokenizer_folder, tmp_path / "out", max_errors=2)


def test_a_truncated_file_is_no_line_to_skip(tokenizer_folder, tmp_path):
    path = write(tmp_path / "a.jsonl.gz", [line(f"text {i}") for i in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BrokenLineError, match="the file is truncated"):
        preprocess([path], tokenizer_folder, tmp_path / "out", max_errors=1000)
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_are_not_counted_are_a_mistake_and_not_a_shorter_dataset(
    tokenizer_folder, tmp_path, monkeypatch
):
    def one_more(path: Path, data: bytes, start: Position) -> Block:
        whole = block(path, data, start)
        return replace(whole, end=Position(whole.end.offset, whole.end.line + 1))

    path = write(tmp_path / "a.jsonl", [line("a")])
    block = blocks._block
    monkeypatch.setattr(blocks, "_block", one_more)
    with pytest.raises(RuntimeError, match="has 2 lines, but 1 documents, 0 rejected and 0 blank"):
        preprocess([path], tokenizer_folder, tmp_path / "out")


def test_text_without_domains_becomes_one_dataset(tokenizer_folder, tmp_path):
    path = write(tmp_path / "a.jsonl.zst", PLAIN)
    done = preprocess([path], tokenizer_folder, tmp_path / "out")
    assert {name: facts.documents for name, facts in done.domains.items()} == {"all": 40}
    assert done.options.split_by is None
    asked = preprocess(
        [path], tokenizer_folder, tmp_path / "asked", options=DataOptions(split_by=None)
    )
    assert asked.domains == done.domains
    again = preprocess([path], tokenizer_folder, tmp_path / "out")  # is done already
    assert again == done


def test_a_null_names_no_domain(tokenizer_folder, tmp_path):
    lines = ['{"text": "a", "meta": null}', '{"text": "b", "meta": {"pile_set_name": null}}']
    done = preprocess([write(tmp_path / "a.jsonl", lines)], tokenizer_folder, tmp_path / "out")
    assert list(done.domains) == ["all"]


def test_all_shards_split_as_the_first_file_does(tokenizer_folder, tmp_path):
    files = [write(tmp_path / f"{number}.jsonl", PLAIN) for number in range(2)]
    files.append(write(tmp_path / "2.jsonl", PILE))
    last = {"inputs": files, "tokenizer": tokenizer_folder, "output": tmp_path / "out"}
    with pytest.raises(BrokenLineError, match=r"2\.jsonl:1: names the domain 'A'"):
        preprocess(**last, shard=(2, 3))


@pytest.mark.parametrize(
    ("lines", "at", "reason"),
    [
        ([*PILE, PLAIN[0]], 41, "no domain: expected a non-empty string at meta.pile_set_name"),
        ([PLAIN[0], *PILE], 1, "no domain: expected a non-empty string at meta.pile_set_name"),
        ([*PLAIN, PILE[0]], 41, "names the domain 'A' at meta.pile_set_name, the first .* none"),
    ],
)
def test_a_file_only_some_lines_of_which_name_a_domain_is_refused_with_the_cure(
    tokenizer_folder, tmp_path, lines, at, reason
):
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(BrokenLineError, match=f":{at}: {reason}.*--split-by ''"):
        preprocess([path], tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
    whole = preprocess(
        [path], tokenizer_folder, tmp_path / "one", options=DataOptions(split_by=None)
    )
    assert {name: facts.documents for name, facts in whole.domains.items()} == {"all": 41}


def test_the_byte_order_mark_of_windows_editors_is_no_part_of_a_line(tokenizer_folder, tmp_path):
    path = write(tmp_path / "a.jsonl", PILE)
    clean = preprocess([path], tokenizer_folder, tmp_path / "clean")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = preprocess([path], tokenizer_folder, tmp_path / "marked", workers=2)
    assert marked.domains == clean.domains
    assert (
        IndexedReader(marked.prefix("A")).tokens == IndexedReader(clean.prefix("A")).tokens
    ).all()
