"""Writes a Megatron dataset, document after document, without holding any of it.

    <prefix>.bin       the ids, appended as they come
    <lengths>          4 bytes a document, appended as they come; not part of the dataset
    <prefix>.idx       made of the lengths at the end, in pieces

Both growing files can be cut back to where they were synced and go on from there, which is all that
resuming needs. Nothing is renamed here: whoever writes a dataset does so in a hidden folder.

The last step of a dataset folder is `finish`: indexes, token counts, checksums, manifest.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.blocks import UnfitDocumentsError
from megatron_infoentropy.data.indexed import (
    CODES,
    HEADER,
    MAGIC,
    MAX_LENGTH,
    VERSION,
    Integers,
    bin_path,
    idx_path,
    token_dtype,
)
from megatron_infoentropy.data.journal import Counts, DomainTally
from megatron_infoentropy.data.manifest import TOKEN_COUNTS, DomainFacts, Manifest
from megatron_infoentropy.files import file_sha256

LENGTHS_AT_ONCE = 1 << 18
_HASH_BYTES = 1 << 22


class Size(NamedTuple):
    """How far a dataset is written."""

    documents: int = 0
    tokens: int = 0


NOTHING = Size()


class Checksums(NamedTuple):
    """SHA-256 of the two files of a dataset, in hexadecimal."""

    bin: str
    idx: str


class DatasetWriter:
    """Appends to one dataset, new or cut back to `size`, and completes it.

    `lengths` is the path of the side file. Memory does not depend on the number of documents.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        vocab_size: int,
        lengths: Path,
        size: Size = NOTHING,
    ) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self.size = size
        self._vocab_size = vocab_size
        self._lengths_path = lengths
        self._hash = hashlib.sha256()
        self._bin = _cut_back(bin_path(prefix), size.tokens * self.dtype.itemsize)
        self._lengths = _cut_back(lengths, size.documents * 4)
        for piece in _pieces(bin_path(prefix)):  # a running hash can not be stored
            self._hash.update(piece)

    def add(self, tokens: Integers, lengths: Integers) -> None:
        """Append documents: `tokens` [sum of lengths], their ids in a row, `lengths` [documents].

        Raises:
            ValueError: an id outside the vocabulary, lengths that do not add up to the tokens, or
                a document of more than 2^31 - 1 tokens, which the format can not hold.
        """
        self._require_valid(tokens, lengths)
        raw = tokens.astype(self.dtype, copy=False).tobytes()
        write_all(self._bin, raw)
        write_all(self._lengths, lengths.astype("<i4").tobytes())
        self._hash.update(raw)
        self.size = Size(self.size.documents + lengths.size, self.size.tokens + tokens.size)

    def _require_valid(self, tokens: Integers, lengths: Integers) -> None:
        if lengths.sum(dtype=np.int64) != tokens.size or (lengths < 0).any():
            raise ValueError(
                f"the lengths of {lengths.size} documents must add up to the {tokens.size} tokens, "
                f"got {lengths.sum(dtype=np.int64)}"
            )
        if lengths.size and lengths.max() > MAX_LENGTH:
            raise ValueError(
                f"a document has {lengths.max()} tokens, the format holds {MAX_LENGTH}; split it"
            )
        # A cast to uint16 would silently wrap what does not fit.
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise ValueError(
                f"token ids must be in 0..{self._vocab_size - 1}, got "
                f"{tokens.min()}..{tokens.max()}; is this the tokenizer the vocabulary size is of?"
            )

    def sync(self) -> Size:
        """Have everything so far on the disk; returns how much that is."""
        for file in (self._bin, self._lengths):
            os.fsync(file.fileno())
        return self.size

    def finish(self) -> Checksums:
        """Write the index; can be repeated. The side file stays."""
        self.sync()
        index = write_index(idx_path(self.prefix), self._lengths_path, self.dtype)
        return Checksums(self._hash.hexdigest(), index)

    def close(self) -> None:
        """Close the files as they are."""
        self._bin.close()
        self._lengths.close()


def write_index(path: Path, lengths: Path, dtype: np.dtype[Any]) -> str:
    """Write an index from a file of int32 document lengths; returns its SHA-256."""
    documents = lengths.stat().st_size // 4
    sequences = sum(int(np.count_nonzero(piece)) for piece in _lengths(lengths))
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for piece in _index(lengths, documents, sequences, dtype):
            write_all(file, piece)
            digest.update(piece)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _index(lengths: Path, documents: int, sequences: int, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The parts of the file in order; a document without a token is a boundary, no sequence."""
    yield HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, documents + 1)
    for piece in _lengths(lengths):
        yield piece[piece > 0].tobytes()
    start = 0
    for piece in _lengths(lengths):
        ends = start + dtype.itemsize * np.cumsum(piece[piece > 0], dtype=np.int64)
        if ends.size:
            yield np.concatenate(([start], ends[:-1])).astype("<i8").tobytes()
            start = int(ends[-1])
    boundary = 0
    yield np.int64(0).astype("<i8").tobytes()
    for piece in _lengths(lengths):
        boundaries = boundary + np.cumsum(piece > 0, dtype=np.int64)
        yield boundaries.astype("<i8").tobytes()
        boundary = int(boundaries[-1])


def _lengths(path: Path) -> Iterator[npt.NDArray[np.int32]]:
    with path.open("rb") as file:
        while raw := file.read(4 * LENGTHS_AT_ONCE):
            yield np.frombuffer(raw, dtype="<i4")


def write_all(file: FileIO, data: bytes) -> None:
    """Write without a buffer, as a full disk must be noticed here; it may take part of the data."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _cut_back(path: Path, size: int) -> FileIO:
    file = path.open("r+b" if path.exists() else "w+b", buffering=0)
    found = path.stat().st_size
    if found < size:
        file.close()
        raise ValueError(f"{path} is cut off: expected at least {size} bytes, found {found}")
    file.truncate(size)
    file.seek(size)
    return file


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            yield piece


@dataclass(frozen=True)
class Written:
    """One domain whose documents are all appended; `counts` int64 [vocab_size]."""

    writer: DatasetWriter
    tally: DomainTally
    counts: Counts


def finish(manifest: Manifest, written: Mapping[str, Written]) -> Manifest:
    """Complete the domains in the manifest's folder and save it with their facts.

    A domain without any token is left out, as Megatron can not open an empty dataset; in a shard it
    is kept, as other shards may have tokens for it. Can be repeated.

    Raises:
        UnfitDocumentsError: no domain has a token, and this is no shard.
    """
    domains: dict[str, DomainFacts] = {}
    left_out: dict[str, int] = {}
    for name, domain in sorted(written.items()):
        if domain.tally.tokens or manifest.shard:
            domains[name] = _facts(domain)
        else:
            left_out[name] = domain.tally.documents
            for path_of in (bin_path, idx_path):
                path_of(domain.writer.prefix).unlink(missing_ok=True)
    if not domains and not manifest.shard:
        raise UnfitDocumentsError("the inputs hold no document with a token; nothing to write")
    shape = (len(domains), manifest.tokenizer.vocab_size)
    table = np.array([written[name].counts for name in domains], dtype=np.int64).reshape(shape)
    checksum = _save_counts(manifest.folder / TOKEN_COUNTS, table)
    done = replace(manifest, domains=domains, left_out=left_out, token_counts_sha256=checksum)
    done.save()
    return done


def _facts(domain: Written) -> DomainFacts:
    checksums = domain.writer.finish()
    tally = domain.tally
    return DomainFacts(
        prefix=tally.prefix,
        documents=tally.documents,
        tokens=tally.tokens,
        bytes=tally.bytes,
        empty=tally.empty,
        rejected=tally.rejected,
        bin_sha256=checksums.bin,
        idx_sha256=checksums.idx,
    )


def _save_counts(path: Path, table: Counts) -> str:
    with path.open("wb") as file:
        np.save(file, table)
        file.flush()
        os.fsync(file.fileno())
    return file_sha256(path)
