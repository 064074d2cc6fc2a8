"""Megatron's token dataset, a `.bin` and an `.idx` file: the format, and reading it without torch.

`.bin` is nothing but the token ids, one after the other, uint16 or int32. `.idx`, little endian:

    bytes   what
    9       the magic "MMIDIDX" and two zeros
    8       version, uint64, 1
    1       dtype of the ids: 4 int32, 8 uint16 (1..7 others that Megatron knows)
    8       S, the number of sequences, uint64
    8       D, the number of document boundaries, uint64: documents + 1
    4 S     length of each sequence in tokens, int32
    8 S     where each sequence starts in `.bin`, in bytes, int64
    8 D     sequence at which each document starts, int64; first 0, last S

Here a document is one sequence, or, if it has no token, none: only its boundary is written, as
Megatron's own tool does. Documents of 3, 0 and 1 tokens in uint16 thus have S = 2, D = 4; `.bin` is
2 * 4 = 8 bytes, `.idx` is 34 + 4 * 2 + 8 * 2 + 8 * 4 = 90 bytes: lengths 3 1, starts 0 6, documents
0 1 1 2.

`writer.py` writes it, byte-identical to `IndexedDatasetBuilder` in megatron-core 0.19. There is no
checksum in the format, so the reader at least holds the sizes of both files against each other.
"""

import struct
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
MAX_LENGTH = 2**31 - 1  # lengths are int32
_DOCUMENTS_AT_ONCE = 2048
_TOKENS_AT_ONCE = 1 << 23  # documents are books in some domains
_SEQUENCES_AT_ONCE = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron stores ids of such a vocabulary in: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def bin_path(prefix: Path) -> Path:
    """`prefix` with `.bin` appended (a dot in the prefix stays)."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """`prefix` with `.idx` appended (a dot in the prefix stays)."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedReader:
    """One dataset, memory-mapped: `len(reader)` documents, `reader[i]` the ids of document i.

    Attributes:
        tokens: every id in the order of the documents [tokens], read-only view.
        dtype: of the ids.

    Raises:
        ValueError: a file is missing, is no Megatron dataset, or was cut off.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        _require_files(prefix)
        code, sequences, boundaries = _read_header(idx_path(prefix))
        self.dtype = np.dtype(DTYPES[code])
        index = np.memmap(idx_path(prefix), dtype=np.uint8, mode="r")
        ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * boundaries])
        views = [index[first:last] for first, last in pairwise(ends)]
        self._sequence_lengths = np.asarray(views[0].view("<i4"))
        self._starts = np.asarray(views[1].view("<i8"))
        self._boundaries = np.asarray(views[2].view("<i8"))
        self._require_consistent()
        self.tokens = _map(bin_path(prefix), self.dtype)

    def __len__(self) -> int:
        return self._boundaries.size - 1

    def __getitem__(self, document: int) -> Integers:
        if not -len(self) <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        document %= len(self)
        first, last = self._boundaries[document : document + 2]
        return self.tokens[self._token_start(first) : self._token_start(last)]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, int64 [documents]; kept, at 8 bytes a document."""
        pieces = [lengths for _, lengths in self.pieces()]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def pieces(self) -> Iterator[tuple[Integers, npt.NDArray[np.int64]]]:
        """All documents in order, some at a time: (their tokens in a row, their lengths)."""
        first = 0
        while first < len(self):
            sequences = self._boundaries[first : first + _DOCUMENTS_AT_ONCE + 1]
            inner = sequences[sequences < self._starts.size]
            starts = np.full(sequences.size, self.tokens.size, dtype=np.int64)
            starts[: inner.size] = self._starts[inner] // self.dtype.itemsize
            fitting = np.searchsorted(starts, starts[0] + _TOKENS_AT_ONCE, side="right")
            starts = starts[: max(int(fitting), 2)]  # one document at least
            yield self.tokens[starts[0] : starts[-1]], np.diff(starts)
            first += starts.size - 1

    def disorder(self) -> str:
        """Where the index contradicts itself beyond what opening it finds; "" if nowhere."""
        start = 0
        for first in range(0, self._starts.size, _SEQUENCES_AT_ONCE):
            lengths = self._sequence_lengths[first : first + _SEQUENCES_AT_ONCE].astype(np.int64)
            ends = start + self.dtype.itemsize * np.cumsum(lengths)
            found = self._starts[first : first + lengths.size]
            wrong = np.flatnonzero((found != np.append(start, ends[:-1])) | (lengths < 0))
            if wrong.size:
                at = int(wrong[0])
                return f"offsets out of order: sequence {first + at} starts at byte {found[at]}"
            start = int(ends[-1])
        for first in range(0, self._boundaries.size, _SEQUENCES_AT_ONCE):
            steps = np.diff(self._boundaries[first : first + _SEQUENCES_AT_ONCE + 1])
            if (steps < 0).any():
                at = first + int(np.flatnonzero(steps < 0)[0])
                return f"documents out of order: number {at} ends before it starts"
        return ""

    def _token_start(self, sequence: int) -> int:
        if sequence == self._starts.size:
            return self.tokens.size
        return int(self._starts[sequence]) // self.dtype.itemsize

    def _require_consistent(self) -> None:
        sequences = self._sequence_lengths.size
        bounds = self._boundaries
        if not bounds.size or bounds[0] != 0 or bounds[-1] != sequences:
            raise ValueError(
                f"{idx_path(self.prefix)} is damaged: its documents must span sequences 0 to "
                f"{sequences}; write it again"
            )
        tokens = int(self._sequence_lengths.sum(dtype=np.int64))
        expected = tokens * self.dtype.itemsize
        _require_size(bin_path(self.prefix), expected, f"{tokens} tokens of {self.dtype.name}")


def require_whole(prefix: Path, tokens: int) -> None:
    """Check that both files have their full length, without reading more than a header.

    Raises:
        ValueError: a file is missing, is no Megatron dataset, or does not hold so many tokens.
    """
    _require_files(prefix)
    code, _, _ = _read_header(idx_path(prefix))
    dtype = np.dtype(DTYPES[code])
    _require_size(bin_path(prefix), tokens * dtype.itemsize, f"{tokens} tokens of {dtype.name}")


def _require_files(prefix: Path) -> None:
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise ValueError(
                f"no such dataset file: {path}; a dataset is a .bin and an .idx, and is named by "
                "their path without either"
            )


def require_prefix(target: Path) -> None:
    """Check that there is a file of a dataset of this name.

    Raises:
        ValueError: there is none.
    """
    if not bin_path(target).is_file() and not idx_path(target).is_file():
        raise ValueError(
            f"no dataset folder and no dataset: {target}; name the folder, or one of its datasets "
            "by the path of its .bin and .idx without either"
        )


def _read_header(path: Path) -> tuple[int, int, int]:
    """(dtype code, sequences, boundaries) of an index that has the size it says."""
    with path.open("rb") as file:
        raw = file.read(HEADER.size)
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise ValueError(f"{path} is no Megatron index: it does not start with {MAGIC!r}")
    _, version, code, sequences, boundaries = HEADER.unpack(raw)
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, only version {VERSION} is known")
    if code not in DTYPES:
        raise ValueError(f"{path} has dtype code {code}, expected one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    _require_size(path, expected, f"{sequences} sequences and {boundaries} boundaries")
    return code, sequences, boundaries


def _require_size(path: Path, expected: int, what: str) -> None:
    size = path.stat().st_size
    if size != expected:
        state = "cut off" if size < expected else "too long"
        raise ValueError(
            f"{path} is {state}: {size} bytes, expected {expected} ({what}); write it again"
        )


def _map(path: Path, dtype: np.dtype[Any]) -> Integers:
    # An empty file can not be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
