"""Writes a Megatron dataset, document after document, without holding any of it.

    <prefix>.bin       the ids, appended as they come
    <lengths>          4 bytes a document, appended as they come; not part of the dataset
    <prefix>.idx       made of the lengths at the end, in pieces

Both growing files can be cut back to where they were synced and go on from there, which is all that
resuming needs. Nothing is renamed here: whoever writes a dataset does so in a hidden folder.

The last step of a dataset folder is `finish`: indexes, token counts, checksums, manifest.
"""

import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

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
from megatron_infoentropy.data.manifest import TOKEN_COUNTS, DomainFacts, Manifest, Span
from megatron_infoentropy.files import file_pieces, file_sha256, write_atomically

LENGTHS_AT_ONCE = 1 << 18
Counts = npt.NDArray[np.int64]  # [vocab_size], occurrences of every id


class DatasetWriter:
    """Appends to one dataset, new or cut back to what `facts` and `counts` say, and completes it.

    `lengths` is the path of the side file. Memory does not depend on the number of documents.

    Attributes:
        facts, counts: what is written so far.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        vocab_size: int,
        lengths: Path,
        facts: DomainFacts | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self.facts = DomainFacts(prefix.name, 0, 0, 0) if facts is None else facts
        self.counts = np.zeros(vocab_size, dtype=np.int64) if counts is None else counts
        self._lengths_path = lengths
        self._bin = _cut_back(bin_path(prefix), self.facts.tokens * self.dtype.itemsize)
        self._lengths = _cut_back(lengths, self.facts.documents * 4)
        self._hash = hashlib.sha256()
        for piece in file_pieces(bin_path(prefix), self._hashed()):  # it can not be stored
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
        np.add.at(self.counts, tokens, 1)
        self.facts.documents += lengths.size
        self.facts.tokens += tokens.size
        self.facts.empty += int((lengths == 0).sum())

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
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.counts.size):
            raise ValueError(
                f"token ids must be in 0..{self.counts.size - 1}, got "
                f"{tokens.min()}..{tokens.max()}; is this the tokenizer the vocabulary size is of?"
            )

    def end_span(self) -> None:
        """Begin a new checksum: what was added since the last one is all of an input."""
        size = self.facts.tokens * self.dtype.itemsize - self._hashed()
        if size:
            self.facts.bin_spans.append(Span(size, self._hash.hexdigest()))
            self._hash = hashlib.sha256()

    def _hashed(self) -> int:
        return sum(span.bytes for span in self.facts.bin_spans)

    def sync(self) -> None:
        """Have everything so far on the disk."""
        for file in (self._bin, self._lengths):
            os.fsync(file.fileno())

    def finish(self) -> DomainFacts:
        """Write the index and add the checksums to the facts; can be repeated."""
        self.sync()
        self.end_span()
        self.facts.idx_sha256 = write_index(idx_path(self.prefix), self._lengths_path, self.dtype)
        return self.facts

    def close(self) -> None:
        """Close the files as they are; the side file stays."""
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
    """Yield the file's parts; a document without a token is a boundary and no sequence."""
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


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Write without a buffer, as a full disk must be noticed here; it may take part of the data."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(RuntimeError):
    """There is no room for the output; what is finished is kept, nothing of it is visible."""


@contextmanager
def full_disk_is_said(work: Path) -> Iterator[None]:
    """Raise `DiskFull` with what to do, in place of the system's error."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(work).free
        raise DiskFull(
            f"no room for the output below {work.parent} ({error.strerror}; {free / 1e6:.0f} MB "
            "are free): make room and give the same command again, it goes on from what is finished"
        ) from error


def save_array(file: BinaryIO, array: Counts) -> None:
    """Write the bytes of np.save, whose own error does not say that the disk is full."""
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(array.data)


def _cut_back(path: Path, size: int) -> FileIO:
    file = path.open("r+b" if path.exists() else "w+b", buffering=0)
    there = path.stat().st_size
    if there < size:
        file.close()
        raise ValueError(f"{path} is cut off: expected at least {size} bytes, found {there}")
    file.truncate(size)
    file.seek(size)
    return file


def finish(manifest: Manifest, writers: Mapping[str, DatasetWriter]) -> Manifest:
    """Complete the domains in the manifest's folder; see `seal`. Can be repeated."""
    domains = {name: writer.finish() for name, writer in writers.items()}
    return seal(manifest, domains, {name: writer.counts for name, writer in writers.items()})


def seal(
    manifest: Manifest, written: Mapping[str, DomainFacts], counts: Mapping[str, Counts]
) -> Manifest:
    """Write the token counts of the domains in the manifest's folder, and it with their facts.

    A domain without any token is left out, as Megatron can not open an empty dataset; in a shard it
    is kept, as other shards may have tokens for it.

    Raises:
        UnfitDocumentsError: no domain has a token, and this is no shard.
    """
    domains: dict[str, DomainFacts] = {}
    left_out = Counter(manifest.left_out)
    for name, facts in sorted(written.items()):
        if facts.tokens or manifest.shard:
            domains[name] = facts
        else:
            left_out[name] += facts.documents
            for path_of in (bin_path, idx_path):
                path_of(manifest.folder / facts.prefix).unlink(missing_ok=True)
    if not domains and not manifest.shard:
        raise UnfitDocumentsError("the inputs hold no document with a token; nothing to write")
    shape = (len(domains), manifest.tokenizer.vocab_size)
    table = np.array([counts[name] for name in domains], dtype=np.int64).reshape(shape)
    path = manifest.folder / TOKEN_COUNTS
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        save_array(file, table)
    done = replace(
        manifest,
        domains=domains,
        left_out=dict(sorted(left_out.items())),
        token_counts_sha256=file_sha256(path),
    )
    done.save()
    return done
