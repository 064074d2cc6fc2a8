"""Repairs that prove themselves: what is put in place has the checksum of the original.

Each function returns what it did, in words, or "" where nothing could be proved.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_infoentropy.data.indexed import HEADER, IndexedReader, bin_path, idx_path
from megatron_infoentropy.data.manifest import TOKEN_COUNTS, DomainFacts, Manifest
from megatron_infoentropy.data.writer import write_index
from megatron_infoentropy.files import file_sha256, write_whole

_PIECE = 1 << 22


def repair_bin(prefix: Path, facts: DomainFacts, dtype: np.dtype[Any]) -> str:
    """Cut off what was appended to a `.bin` that is otherwise the original."""
    path, size = bin_path(prefix), facts.tokens * dtype.itemsize
    if not path.is_file() or path.stat().st_size <= size:
        return ""
    digest, left = hashlib.sha256(), size
    with path.open("rb") as file:
        while left and (piece := file.read(min(_PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    if digest.hexdigest() != facts.bin_sha256:
        return ""
    with path.open("r+b") as file:
        file.truncate(size)
    return "cut off what was behind the tokens"


def repair_index(prefix: Path, facts: DomainFacts, dtype: np.dtype[Any], eod_id: int) -> str:
    """Write the `.idx` anew, by the lengths that it still has or by the ends of the documents."""
    path = idx_path(prefix)
    if not facts.idx_sha256 or (path.is_file() and file_sha256(path) == facts.idx_sha256):
        return ""
    ways = {
        "written again from its own lengths": _lengths_from_index(path),
        "written again from the end tokens": _lengths_from_ends(prefix, dtype, eod_id),
    }
    side, new = (path.with_name(f"{path.name}.{kind}") for kind in ("lengths", "partial"))
    try:
        for how, lengths in ways.items():
            with side.open("wb") as file:
                for piece in lengths:
                    file.write(piece.astype("<i4").tobytes())
            if write_index(new, side, dtype) == facts.idx_sha256:
                new.rename(path)
                return how
    finally:
        side.unlink(missing_ok=True)
        new.unlink(missing_ok=True)
    return ""


def _lengths_from_index(path: Path) -> Iterator[npt.NDArray[np.int64]]:
    """Of each document, if the index is whole enough to have them."""
    raw = path.read_bytes() if path.is_file() else b""
    if len(raw) < HEADER.size:
        return
    *_, sequences, boundaries = HEADER.unpack(raw[: HEADER.size])
    if len(raw) != HEADER.size + 12 * sequences + 8 * boundaries:
        return
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size).astype(np.int64)
    bounds = np.frombuffer(raw, "<i8", boundaries, HEADER.size + 12 * sequences)
    if boundaries and bounds.min() >= 0 and bounds.max() <= sequences:
        yield np.diff(np.append(0, np.cumsum(lengths))[bounds])


def _lengths_from_ends(
    prefix: Path, dtype: np.dtype[Any], eod_id: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Of each document, where each ends with the end token and none is empty."""
    if not bin_path(prefix).is_file() or not bin_path(prefix).stat().st_size:
        return
    tokens = np.memmap(bin_path(prefix), dtype=dtype, mode="r")
    before = 0
    for first in range(0, tokens.size, _PIECE):
        ends = first + 1 + np.flatnonzero(tokens[first : first + _PIECE] == eod_id)
        yield np.diff(ends, prepend=before)
        before = int(ends[-1]) if ends.size else before


def repair_counts(manifest: Manifest) -> str:
    """Count the tokens again."""
    vocab_size = manifest.tokenizer.vocab_size
    table = np.zeros((len(manifest.domains), vocab_size), dtype=np.int64)
    for row, name in zip(table, manifest.domains, strict=True):
        try:
            for tokens, _ in IndexedReader(manifest.prefix(name)).pieces():
                np.add.at(row, tokens, 1)
        except (ValueError, IndexError):  # a damaged dataset has no counts
            return ""
    stream = io.BytesIO()
    np.save(stream, table)
    if hashlib.sha256(stream.getvalue()).hexdigest() != manifest.token_counts_sha256:
        return ""
    write_whole(manifest.folder / TOKEN_COUNTS, stream.getvalue())
    return "counted again"
