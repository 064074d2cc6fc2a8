"""The bytes of a text file, decompressed as they are read: plain, `.zst` or `.gz`.

A compressed file may consist of several frames or members (concatenated files do). Each must be
complete: a truncated download is an error, not a shorter corpus.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
_READ_BYTES = 1 << 16  # of the file as it is on disk
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` needs; memory is only taken if the file asks for it
_GZIP = 16 + zlib.MAX_WBITS


class DamagedFileError(Exception):
    """Compressed data that ends early or can not be decompressed."""


def require_readable(path: Path) -> None:
    """Check that `path` is a file whose name says how to read it.

    Raises:
        ValueError: it does not exist, is a folder, or its name ends in none of `SUFFIXES`.
    """
    if not path.is_file():
        raise ValueError(f"no such input file: {path}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"the input must be a .jsonl, .jsonl.zst or .jsonl.gz file, got {path}; "
            "decompress or rename it first"
        )


def read_chunks(path: Path, advance: Callable[[int], None], skip: int = 0) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file from byte `skip` on.

    `advance` is called with the bytes read from the disk since the last call, skipped ones too.

    Raises:
        DamagedFileError: after the last byte that could be read.
    """
    with path.open("rb") as file:
        if path.suffix in _FRAMES:
            blocks = iter(lambda: file.read(_READ_BYTES), b"")
            chunks = _decompressed(blocks, advance, *_FRAMES[path.suffix])
            yield from _without_first(chunks, skip)
            return
        file.seek(skip)
        advance(skip)
        while block := file.read(_READ_BYTES):
            advance(len(block))
            yield block


def _without_first(chunks: Iterator[bytes], skip: int) -> Iterator[bytes]:
    for chunk in chunks:
        if skip < len(chunk):
            yield chunk[skip:] if skip else chunk
        skip = max(skip - len(chunk), 0)


def _decompressed(
    blocks: Iterator[bytes],
    advance: Callable[[int], None],
    new_frame: Callable[[], Any],
    error_type: type[Exception],
) -> Iterator[bytes]:
    """Frame after frame; the libraries' own file readers end quietly on a truncated one."""
    frame = None
    empty = True
    for block in blocks:
        advance(len(block))
        empty = False
        while block:
            frame = frame or new_frame()
            try:
                yield frame.decompress(block)
            except error_type as error:
                raise DamagedFileError(f"damaged compressed data here or later: {error}") from error
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if empty or frame is not None:
        raise DamagedFileError("the compressed data ends inside a frame: the file is truncated")


_FRAMES: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    ".zst": (
        lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj(),
        zstandard.ZstdError,
    ),
    ".gz": (lambda: zlib.decompressobj(_GZIP), zlib.error),
}
