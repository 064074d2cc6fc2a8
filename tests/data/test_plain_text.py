"""Lines that name no domain, as most corpora's: one dataset, unless some of them do name one."""

import json
from pathlib import Path

import pytest
from text_files import line, write

from megatron_infoentropy.data import blocks
from megatron_infoentropy.data.blocks import BrokenLineError
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.manifest import DataOptions
from megatron_infoentropy.data.preprocess import preprocess

PLAIN = [json.dumps({"text": f"plain {number}"}) for number in range(40)]
PILE = [line(f"text {number}") for number in range(40)]


@pytest.fixture(autouse=True)
def few_lines_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 150)
    monkeypatch.setattr(blocks, "_READ_BYTES", 50)


def test_text_without_domains_becomes_one_dataset(tokenizer_folder: Path, tmp_path: Path) -> None:
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


def test_a_null_names_no_domain(tokenizer_folder: Path, tmp_path: Path) -> None:
    lines = ['{"text": "a", "meta": null}', '{"text": "b", "meta": {"pile_set_name": null}}']
    done = preprocess([write(tmp_path / "a.jsonl", lines)], tokenizer_folder, tmp_path / "out")
    assert list(done.domains) == ["all"]


def test_all_shards_split_as_the_first_file_does(tokenizer_folder: Path, tmp_path: Path) -> None:
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
    tokenizer_folder: Path, tmp_path: Path, lines: list[str], at: int, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(BrokenLineError, match=f":{at}: {reason}.*--split-by ''"):
        preprocess([path], tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
    whole = preprocess(
        [path], tokenizer_folder, tmp_path / "one", options=DataOptions(split_by=None)
    )
    assert {name: facts.documents for name, facts in whole.domains.items()} == {"all": 41}


def test_the_byte_order_mark_of_windows_editors_is_no_part_of_a_line(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", PILE)
    clean = preprocess([path], tokenizer_folder, tmp_path / "clean")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = preprocess([path], tokenizer_folder, tmp_path / "marked", workers=2)
    assert marked.domains == clean.domains
    assert (
        IndexedReader(marked.prefix("A")).tokens == IndexedReader(clean.prefix("A")).tokens
    ).all()
