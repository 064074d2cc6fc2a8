"""Damage is found and named, and nothing is changed."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from text_files import change, cut, line, write

from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.verify import Fault, inspect, verify

LINES = [line(f"text {i} " * (i % 40 + 1), "AB"[i % 2]) for i in range(200)]


@pytest.fixture
def dataset(prepare, tmp_path):
    return prepare(write(tmp_path / "a.jsonl", LINES)).folder


LENGTHS, STARTS, DOCUMENTS = 34, 34 + 4 * 100, 34 + (4 + 8) * 100  # places in an index


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("a.bin", lambda path: cut(path, -6), "is cut off"),
        ("a.bin", lambda path: change(path, 40, b"\1"), "checksum"),
        (
            "a.bin",
            lambda path: change(path, 40, b"\xff\xff"),
            "has ids 0..65535, the vocabulary",
        ),
        ("a.bin", lambda path: change(path, -2, b"\7\0"), "1 documents lack the end token 0, the"),
        (
            "a.bin",
            lambda path: change(path.with_suffix(".idx"), LENGTHS, struct.pack("<ii", 7, -1)),
            "is too long: ",
        ),
        ("a.idx", Path.unlink, "is missing"),
        ("a.idx", lambda path: change(path, 17, b"\3"), "int16"),
        (
            "a.idx",
            lambda path: change(path, STARTS + 24, struct.pack("<q", 2)),
            "sequence 3 starts at byte 2",
        ),
        (
            "a.idx",
            lambda path: change(path, DOCUMENTS + 16, struct.pack("<q", 50)),
            "documents out of order: number 2 ends before it starts",
        ),
        ("token_counts.npy", lambda path: change(path, 200, b"\1"), "checksum"),
        ("token_counts.npy", Path.unlink, "missing"),
    ],
)
def test_damage_is_found_and_left_as_it_is(dataset, name, damage, problem):
    damage(dataset / name)
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    found = verify(dataset)
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before
    assert any(f.path.name == name and problem in f.problem for f in found), found


def test_a_sound_dataset_has_no_findings_and_another_tokenizer_is_one(
    dataset, tokenizer_folder, tmp_path
):
    assert verify(dataset, tokenizer=tokenizer_folder) == []
    assert verify(dataset / "a", tokenizer=tokenizer_folder) == []
    other = Path(shutil.copytree(tokenizer_folder, tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    text = text.replace('"normalizer": null', '"normalizer": {"type": "NFC"}')
    (other / "tokenizer.json").write_text(text)
    problem = f"was made with another tokenizer than {other}"
    assert verify(dataset, tokenizer=other) == [Fault(dataset / "manifest.json", problem)]


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no dataset folder and no dataset: .* without either"):
        verify(tmp_path / "gone")
    with pytest.raises(ValueError, match="is no token dataset"):
        verify(tmp_path)


def test_a_look_shows_lengths_and_texts(dataset, tokenizer_folder):
    tokens = np.fromfile(dataset / "a.bin", "<u2").size
    longest = IndexedReader(dataset / "a").lengths.max()
    lines = list(inspect(dataset, tokenizer=tokenizer_folder, documents=[0, -1]))
    assert [line.split(":")[0] for line in lines if " documents (" in line] == ["A", "B"]
    assert lines[0].startswith(f"A: 100 documents (0 empty), {tokens} tokens, median ")
    assert lines[0].endswith(f", longest {longest}")
    first = [line.startswith("document 0, ") for line in lines].index(True)
    assert lines[first].endswith(" tokens: 'text 0 <|endoftext|>'")
    bars = [line.split() for line in lines[1:first]]
    assert sum(int(bar[-1]) for bar in bars) == 100
    assert max(len(bar[3]) for bar in bars) == 40
    assert int(bars[-1][0]) <= longest <= int(bars[-1][2])
    assert lines[first + 1].startswith("document 99, ")
    assert "tokens: 'text 198 text 198" in lines[first + 1]
    assert list(inspect(dataset / "a")) == list(inspect(dataset / "a", documents=[0, 99]))
    with pytest.raises(ValueError, match="has documents 0 to 99, not 100"):
        list(inspect(dataset / "a", documents=[100]))
    change(dataset / "a.bin", 0, b"\xff\xff")
    with pytest.raises(ValueError, match=r"has the id 65535, .* 0 to 599; name the one"):
        list(inspect(dataset / "a", tokenizer=tokenizer_folder))
