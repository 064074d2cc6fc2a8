"""Documents from `.jsonl` and `.jsonl.zst` files, one JSON object a line, as the Pile has them.

    {"text": "...", "meta": {"pile_set_name": "Pile-CC"}}

A line that is not such an object stops the reading with an error that names file, line and reason;
nothing is skipped in silence. Blank lines at the end of a file are harmless and ignored; a blank
line before another document is an error, because that is where a document was lost.

A `.zst` file may consist of several frames (concatenated files do). Each must be complete: a
truncated download is an error, not a shorter corpus.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

_READ_BYTES = 1 << 17  # of the file as it is on disk


class Record(NamedTuple):
    """One document of a file."""

    line: int  # counted from 1
    text: str
    text_bytes: int  # in UTF-8
    domain: str | None  # None where no domain was asked for


class BrokenLineError(ValueError):
    """A line, named by file and number, that does not hold a document."""

    def __init__(self, path: Path, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = path, line, reason


class _DamagedFileError(Exception):
    """Compressed data that ends early or can not be decompressed; becomes a BrokenLineError."""


def require_readable(path: Path) -> None:
    """Check that `path` is a file whose name says how to read it.

    Raises:
        ValueError: it does not exist, is a folder, or is neither `.jsonl` nor `.jsonl.zst`.
    """
    if not path.is_file():
        raise ValueError(f"no such input file: {path}")
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        raise ValueError(
            f"the input must be a .jsonl or .jsonl.zst file, got {path}; "
            "decompress or rename it first"
        )


def read_jsonl(
    path: Path, *, domain_key: str | None, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Record]:
    """Yield the documents of one file in order.

    `domain_key` is where a record names its domain, dots leading into objects
    (`meta.pile_set_name`); None asks for no domain. `advance` is called with the number of bytes
    read from the file since the last call, for a progress bar.

    Raises:
        BrokenLineError: the first line that is not a document.
        ValueError: see `require_readable`.
    """
    require_readable(path)
    keys = None if domain_key is None else domain_key.split(".")
    blank = None
    for line, raw in _numbered_lines(path, advance):
        if not raw.strip():
            blank = blank or line
            continue
        if blank is not None:
            raise BrokenLineError(path, blank, "blank line before the end of the file")
        try:
            record = _parse(line, raw, keys)
        except ValueError as error:
            raise BrokenLineError(path, line, str(error)) from error
        yield record


def _parse(line: int, raw: bytes, keys: list[str] | None) -> Record:
    record = _decode(raw)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if "text" not in record:
        raise ValueError(f'no "text" key; the keys are {sorted(record)}')
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f'"text" must be a string, got {type(text).__name__}')
    try:
        text_bytes = len(text.encode())
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair: "\ud800"
        raise ValueError(f'"text" holds half a surrogate pair at {error.start}') from error
    return Record(line, text, text_bytes, None if keys is None else _domain(record, keys))


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not readable: JSON nested too deeply") from error


def _domain(record: dict[str, Any], keys: list[str]) -> str:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value:
        raise ValueError(f"no domain: expected a non-empty string at {'.'.join(keys)}")
    return value


def _numbered_lines(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """Lines without their newline. Only newlines separate: JSON may hold U+2028 and the like."""
    number = 1
    unfinished: list[bytes] = []  # a list, as a document may span very many chunks
    try:
        for chunk in _chunks(path, advance):
            *finished, rest = chunk.split(b"\n")
            for piece in finished:
                yield number, b"".join((*unfinished, piece))
                unfinished = []
                number += 1
            unfinished.append(rest)
    except _DamagedFileError as error:
        raise BrokenLineError(path, number, str(error)) from error
    last = b"".join(unfinished)
    if last:
        yield number, last


def _chunks(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        blocks = iter(lambda: file.read(_READ_BYTES), b"")
        yield from _frames(blocks, advance) if path.suffix == ".zst" else _plain(blocks, advance)


def _plain(blocks: Iterator[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    for block in blocks:
        advance(len(block))
        yield block


def _frames(blocks: Iterator[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    """Decompress frame after frame; zstandard's own file reader ends quietly on a truncated one."""
    frame = None
    empty = True
    for block in blocks:
        advance(len(block))
        empty = False
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise _DamagedFileError(f"damaged zstd data here or later: {error}") from error
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if empty or frame is not None:
        raise _DamagedFileError("the zstd data ends inside a frame: the file is truncated")
