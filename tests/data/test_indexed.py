"""Our .bin/.idx against megatron-core's own writer and reader, and against damage."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from text_files import change, cut

from megatron_infoentropy.data import writer as writer_module
from megatron_infoentropy.data.indexed import IndexedReader, bin_path, idx_path, token_dtype
from megatron_infoentropy.data.manifest import DomainFacts
from megatron_infoentropy.data.writer import DatasetWriter, write_index
from megatron_infoentropy.files import file_sha256

Documents = list[list[int]]
Damage = Callable[[Path, Path], object]
SMALL, LARGE = 8192, 70_000  # one vocabulary for each dtype

rng = np.random.default_rng(0)
MANY = [rng.integers(0, SMALL, size=length).tolist() for length in rng.geometric(0.01, 3000) - 1]
CASES: dict[str, Documents] = {
    "one token": [[5]],
    "empty between": [[1, 2, 3], [], [4]],
    "empty at both ends": [[], [1], []],
    "only empty": [[], []],
    "none": [],
    "largest ids": [[0, SMALL - 1], [SMALL - 1]],
    "many": MANY,
}


def flat(documents: Documents) -> list[int]:
    return [token for document in documents for token in document]


def new_writer(prefix: Path, vocab_size: int, facts: DomainFacts | None = None) -> DatasetWriter:
    lengths = prefix.with_name(prefix.name + ".lengths")
    return DatasetWriter(prefix, vocab_size=vocab_size, lengths=lengths, facts=facts)


def add_documents(writer: DatasetWriter, documents: Documents) -> None:
    for first in range(0, len(documents), 7):
        some = documents[first : first + 7]
        lengths = np.array([len(document) for document in some])
        writer.add(np.array(flat(some), dtype=np.int64), lengths)


def write_ours(prefix: Path, documents: Documents, vocab_size: int) -> DatasetWriter:
    writer = new_writer(prefix, vocab_size)
    add_documents(writer, documents)
    writer.finish()
    writer.close()
    return writer


def write_megatron(prefix: Path, documents: Documents, vocab_size: int) -> None:
    """As tools/preprocess_data.py does: an empty document is a boundary without a sequence."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        lengths = [len(document)] if document else []
        builder.add_document(np.array(document, dtype=np.int64), lengths)
    builder.finalize(f"{prefix}.idx")


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    for path_of in (bin_path, idx_path):
        assert path_of(ours).read_bytes() == path_of(theirs).read_bytes()


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at_once", [1 << 18, 100])  # lengths that an index is written of
def test_files_are_byte_identical_to_megatrons_and_read_back(
    tmp_path, case, vocab_size, at_once, monkeypatch
):
    monkeypatch.setattr(writer_module, "LENGTHS_AT_ONCE", at_once)
    documents, prefix = CASES[case], tmp_path / "a.b"
    tokens = np.array(flat(documents), dtype=np.int64)
    writer = write_ours(prefix, documents, vocab_size)
    write_megatron(tmp_path / "theirs", documents, vocab_size)
    assert_same_bytes(prefix, tmp_path / "theirs")

    done, size = writer.facts, bin_path(prefix).stat().st_size
    assert done.bin_spans == ([(size, file_sha256(bin_path(prefix)))] if size else [])
    assert done.idx_sha256 == file_sha256(idx_path(prefix))
    assert writer.counts.tolist() == np.bincount(tokens, minlength=vocab_size).tolist()
    assert (done.documents, done.tokens) == (len(documents), tokens.size)
    assert done.empty == documents.count([])

    reader = IndexedReader(prefix)
    assert [reader[i].tolist() for i in range(len(reader))] == documents
    assert reader.tokens.tolist() == tokens.tolist()
    assert reader.lengths.tolist() == [len(document) for document in documents]
    assert reader.dtype == token_dtype(vocab_size)


def test_starts_beyond_two_gigabytes_do_not_wrap(tmp_path):
    """The index of 2^33 ids, which is made of their lengths alone."""
    np.array([2**31 - 1] * 4, dtype="<i4").tofile(tmp_path / "lengths")
    write_index(idx_path(tmp_path / "a"), tmp_path / "lengths", token_dtype(LARGE))
    raw = idx_path(tmp_path / "a").read_bytes()
    starts = np.frombuffer(raw, "<i8", count=4, offset=34 + 4 * 4)
    assert starts.tolist() == [4 * (2**31 - 1) * i for i in range(4)]


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 65_536, 128_256])
def test_the_dtype_switches_where_megatrons_does(vocab_size):
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_documents_of_several_sequences_are_read_whole_as_views(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(np.arange(5), [2, 3])
    builder.add_document(np.arange(4), [4])
    builder.finalize(str(tmp_path / "a.idx"))
    reader = IndexedReader(tmp_path / "a")
    assert [reader[0].tolist(), reader[-1].tolist()] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    assert reader[0].base is not None
    with pytest.raises(ValueError, match="read-only"):
        reader[0][0] = 7
    for beyond in (2, -3):
        with pytest.raises(IndexError, match="of 2"):
            reader[beyond]


LONG = np.broadcast_to(np.uint8(0), (2**31,))


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, SMALL], [2], "must be in 0..8191, got 1..8192"),
        ([-1, 2], [2], "must be in 0..8191, got -1..2"),
        ([1, 2], [1], "must add up to the 2 tokens, got 1"),
        ([1, 2], [3, -1], "must add up"),
        (LONG, [2**31], "has 2147483648 tokens, the format holds 2147483647"),
    ],
)
def test_what_the_format_can_not_hold_is_refused_and_not_written(
    tmp_path, tokens, lengths, message
):
    with pytest.raises(ValueError, match=message):
        new_writer(tmp_path / "a", SMALL).add(np.asarray(tokens), np.array(lengths))
    assert bin_path(tmp_path / "a").stat().st_size == 0


@pytest.mark.parametrize("at", [0, 1, 1500, 3000])
def test_a_writer_goes_on_from_where_it_was_synced(tmp_path, at):
    """Whatever was written after that, whole documents or not, is cut off."""
    write_ours(tmp_path / "whole", MANY, SMALL)
    writer = new_writer(tmp_path / "a", SMALL)
    add_documents(writer, MANY[:at])
    writer.sync()
    facts = replace(writer.facts)
    add_documents(writer, [[1, 2, 3]])
    writer.close()
    with (tmp_path / "a.lengths").open("ab") as file:
        file.write(b"x")
    again = new_writer(tmp_path / "a", SMALL, facts)
    add_documents(again, MANY[at:])
    assert again.finish() == replace(again.finish())
    again.close()
    assert_same_bytes(tmp_path / "a", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"a\.bin is cut off: expected at least .* bytes, found"):
        new_writer(tmp_path / "a", SMALL, replace(facts, tokens=1 << 30))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b, i: cut(b, -2), r"a\.bin is cut off: 6 bytes, expected 8 \(4 tokens"),
        (lambda b, i: b.write_bytes(b.read_bytes() * 2), r"a\.bin is too long: 16 bytes"),
        (lambda b, i: cut(i, -1), r"a\.idx is cut off: 89 bytes, expected 90"),
        (lambda b, i: cut(i, 20), r"a\.idx is no Megatron index"),
        (lambda b, i: change(i, 0, b"X"), r"a\.idx is no Megatron index"),
        (lambda b, i: change(i, 9, struct.pack("<Q", 2)), "version 2, only version 1"),
        (lambda b, i: change(i, 17, b"\x09"), "dtype code 9"),
        (lambda b, i: change(i, 82, struct.pack("<q", 7)), "must span sequences 0 to 2"),
        (lambda b, i: b.unlink(), r"no such dataset file: .*a\.bin"),
        (lambda b, i: i.unlink(), r"no such dataset file: .*a\.idx"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write_ours(tmp_path / "a", [[1, 2, 3], [], [4]], SMALL)
    damage(bin_path(tmp_path / "a"), idx_path(tmp_path / "a"))
    with pytest.raises(ValueError, match=message):
        IndexedReader(tmp_path / "a")
