"""Packing as published: groups of documents, end to end, cut to one length, the rest dropped."""

import numpy as np
import pytest
from text_files import line, write

from megatron_infoentropy.data import indexed
from megatron_infoentropy.data.indexed import IndexedReader
from megatron_infoentropy.data.manifest import load_manifest
from megatron_infoentropy.data.rewrite import pack
from megatron_infoentropy.data.verify import verify


@pytest.fixture
def dataset(prepare, tmp_path):
    """Domain A: 25 documents of all lengths, some empty. Domain B: too little for one piece."""
    lines = [line("more words " * (i * i % 23), "A") for i in range(25)]
    lines.append(line("x", "B"))
    text = write(tmp_path / "text.jsonl", lines)
    return prepare(text, "whole")


def expected_pieces(reader: IndexedReader, length: int, documents: int) -> list[list[int]]:
    """The published procedure, written down naively."""
    pieces = []
    for first in range(0, len(reader), documents):
        group = [
            int(token)
            for i in range(first, min(first + documents, len(reader)))
            for token in reader[i]
        ]
        pieces += [group[k : k + length] for k in range(0, len(group) - length + 1, length)]
    return pieces


@pytest.mark.parametrize(("documents", "length"), [(1, 7), (4, 1), (4, 64), (1000, 64)])
@pytest.mark.parametrize("at_once", [(2048, 1 << 23), (3, 20)])  # documents, tokens per read
def test_pieces_are_those_of_the_published_procedure(
    dataset, tmp_path, monkeypatch, documents, length, at_once
):
    monkeypatch.setattr(indexed, "_DOCUMENTS_AT_ONCE", at_once[0])
    monkeypatch.setattr(indexed, "_TOKENS_AT_ONCE", at_once[1])
    packed, dropped = pack(dataset.folder, tmp_path / "packed", length=length, documents=documents)
    source = IndexedReader(dataset.prefix("A"))
    reader = IndexedReader(packed.prefix("A"))
    expected = expected_pieces(source, length, documents)
    assert len(expected) > 3
    assert [list(map(int, reader[i])) for i in range(len(reader))] == expected
    assert dropped["A"] == source.tokens.size - length * len(expected)
    counts = np.load(packed.folder / packed.token_counts)
    row = list(packed.domains).index("A")
    assert (counts[row] == np.bincount(np.concatenate(expected), minlength=counts.shape[1])).all()


def test_a_packed_dataset_is_whole_and_says_what_it_is(dataset, tmp_path):
    pack(dataset.folder, tmp_path / "packed", length=64, documents=10)
    assert verify(tmp_path / "packed") == []
    manifest = load_manifest(tmp_path / "packed")
    assert (manifest.options.piece_tokens, manifest.options.piece_documents) == (64, 10)
    assert manifest.left_out == {"B": 0}
    assert manifest.inputs == dataset.inputs
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_packed_is_named_and_nothing_is_written(dataset, tmp_path):
    output = tmp_path / "packed"
    with pytest.raises(ValueError, match="at least 1, got 0 and 1000"):
        pack(dataset.folder, output, length=0)
    with pytest.raises(ValueError, match=r"no 1000 documents in a row .* the 1048576 tokens"):
        pack(dataset.folder, output, length=1 << 20)
    assert not output.exists()
    pack(dataset.folder, output, length=64)
    with pytest.raises(ValueError, match="is packed already"):
        pack(output, tmp_path / "twice")
