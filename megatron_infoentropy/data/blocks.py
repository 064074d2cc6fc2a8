"""Files as blocks of whole lines: what a worker gets at once, and where a run can go on.

A block is some raw lines of one file, about half a megabyte, together with where they stand in it.
Nothing is parsed here: counting newlines is all that the one reading process does per byte. Rows of
a table stand for lines where a file has those: `tables.py` makes blocks of them.

Files are decompressed as they are read: plain, `.zst` or `.gz`. A compressed file may consist of
several frames or members (concatenated files do). Each must be complete: a truncated download is an
error, not a shorter corpus. So is a file of a few bytes that decompresses without end: text shrinks
ten times, such files ten thousand times.
"""

import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from megatron_infoentropy.data.sources import StandardInput

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
TABLES = (".parquet", ".arrow")
_READ_BYTES = 1 << 16  # of the file as it is on disk
_SLICE_BYTES = 1 << 12  # decompressed at once: to 128 MiB at most, whatever a file holds
MAX_RATIO, FREE_BYTES = 1000, 1 << 30  # a file may grow so many times, or to so many bytes
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` needs; memory is only taken if the file asks for it
_GZIP = 16 + zlib.MAX_WBITS


class DamagedFileError(Exception):
    """Compressed data that ends early or can not be decompressed."""


def require_readable(path: Path) -> None:
    """Check that `path` is a file whose name says how to read it.

    Raises:
        ValueError: it does not exist, is a folder, or its name ends as that of no kind of file.
    """
    if isinstance(path, StandardInput):
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the files in it, such as '{path}/*.jsonl'")
    if not path.is_file():
        raise ValueError(f"no such input file: {path}")
    if not path.name.endswith(SUFFIXES + TABLES):
        raise ValueError(
            f"the input must be a {', '.join(SUFFIXES)}, {' or '.join(TABLES)} file, got {path}; "
            "decompress or rename it first"
        )


def read_chunks(
    path: Path,
    advance: Callable[[int], None],
    skip: int = 0,
    look: Callable[[bytes], object] = lambda _: None,
) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file, as it is when it is opened, from byte `skip` on.

    `advance` is called with the bytes read from the disk since the last call, skipped ones too;
    `look` is shown all of them.

    Raises:
        DamagedFileError: after the last byte that could be read.
    """
    with path.open("rb") as file:
        chunks = _blocks(file, advance, look)
        if path.suffix in _FRAMES:
            chunks = _decompressed(chunks, *_FRAMES[path.suffix])
        yield from _without_first(chunks, skip)


def _blocks(
    file: BinaryIO, advance: Callable[[int], None], look: Callable[[bytes], object]
) -> Iterator[bytes]:
    left = sys.maxsize
    if file.seekable():  # what is written to it meanwhile may never end
        left = file.seek(0, os.SEEK_END)
        file.seek(0)
    while block := file.read(min(left, _READ_BYTES)):
        left -= len(block)
        look(block)
        advance(len(block))
        yield block


def _without_first(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(skip - len(chunk), 0)


def _decompressed(
    blocks: Iterator[bytes],
    new_frame: Callable[[], Any],
    error_type: type[Exception],
    padding: bytes,
) -> Iterator[bytes]:
    """Frame after frame; the libraries' own file readers end quietly on a truncated one."""
    frame = None
    taken = given = frames = 0
    for part in _slices(blocks):
        taken += len(part)
        while part:
            if frame is None:
                part = part.lstrip(padding) if frames else part
                if not part:
                    break
                frame, frames = new_frame(), frames + 1
            try:
                text = frame.decompress(part)
            except error_type as error:
                raise DamagedFileError(f"damaged compressed data here or later: {error}") from error
            given += len(text)
            if given > max(FREE_BYTES, MAX_RATIO * taken):
                raise DamagedFileError(
                    f"{taken} compressed bytes became more than {given // 10**6} MB, which text "
                    "does not; if it is meant so, decompress the file first"
                )
            yield text
            part = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if not taken or frame is not None:
        raise DamagedFileError("the compressed data ends inside a frame: the file is truncated")


def _slices(blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        for start in range(0, len(block), _SLICE_BYTES):
            yield block[start : start + _SLICE_BYTES]


# what reads a frame, what it raises, and the bytes that tapes fill the rest of a block with
_FRAMES: dict[str, tuple[Callable[[], Any], type[Exception], bytes]] = {
    ".zst": (
        lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj(),
        zstandard.ZstdError,
        b"",
    ),
    ".gz": (lambda: zlib.decompressobj(_GZIP), zlib.error, b"\0"),
}


BLOCK_BYTES = 1 << 19
MAX_LINE_BYTES = 1 << 28  # a hundred times a long book; more is no document


class BrokenLineError(ValueError):
    """A line, named by file and number, that does not hold a document."""

    def __init__(self, path: Path, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = path, line, reason


class UnfitDocumentsError(ValueError):
    """Documents that cannot become a dataset together with what was done of them so far."""


class Keys(NamedTuple):
    """Where a document has its text and its domain, dots leading into objects; None: no domain.

    A document that names none there is broken if `is_domain_required`.
    """

    text: str = "text"
    domain: str | None = None
    is_domain_required: bool = True


TEXT_ALONE = Keys()


@dataclass(frozen=True)
class Position:
    """A place between two lines: bytes of decompressed text before it, number of the next line."""

    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Block:
    """Whole lines, newlines included (a file's last one may lack it), between two places.

    Of a table it is the same number of rows, as `tables.rows_of` reads them. The one at the end of
    a file, without lines, has the SHA-256 of the file as it was read.
    """

    path: Path
    data: bytes
    start: Position
    end: Position
    sha256: str = ""
    is_table: bool = False

    @property
    def lines(self) -> int:
        """Count the lines."""
        return self.end.line - self.start.line


def read_blocks(
    path: Path,
    advance: Callable[[int], None] = lambda _: None,
    start: Position = Position(),
    keys: Keys = TEXT_ALONE,
) -> Iterator[Block]:
    """Yield the lines of one file from `start` on, and last a block without any: the end.

    `advance` is called with the bytes read from the disk since the last call. Of a table only the
    columns `keys` are read.

    Raises:
        BrokenLineError: the file is truncated or damaged, after the last whole line.
        ValueError: see `require_readable`.
    """
    require_readable(path)
    if path.suffix in TABLES:
        yield from import_module("megatron_infoentropy.data.tables").read_tables(
            path, advance, start, keys
        )
        return
    at = start
    pieces: list[bytes] = []  # a list, as one line may span very many chunks
    size = 0
    damage: DamagedFileError | None = None
    digest = hashlib.sha256()
    try:
        for chunk in read_chunks(path, advance, start.offset, digest.update):
            pieces.append(chunk)
            size += len(chunk)
            if size >= BLOCK_BYTES and b"\n" in chunk:
                lines, _, rest = b"".join(pieces).rpartition(b"\n")
                block = _block(path, lines + b"\n", at)
                yield block
                at, pieces, size = block.end, [rest], len(rest)
            if size > MAX_LINE_BYTES:
                what = f"a line of more than {MAX_LINE_BYTES >> 20} MiB: no document"
                raise DamagedFileError(what)
    except DamagedFileError as error:
        damage = error
    data = b"".join(pieces)
    if damage is not None:  # the line that was cut is not one that the file holds
        data = data[: data.rfind(b"\n") + 1]
    if data:
        block = _block(path, data, at)
        yield block
        at = block.end
    if damage is not None:
        raise BrokenLineError(path, at.line, str(damage)) from damage
    yield Block(path, b"", at, at, digest.hexdigest())


def _block(path: Path, data: bytes, start: Position) -> Block:
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    return Block(path, data, start, Position(start.offset + len(data), start.line + lines))
