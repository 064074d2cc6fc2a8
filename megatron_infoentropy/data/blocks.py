"""Files as blocks of whole lines: what a worker gets at once, and where a run can go on.

A block is some raw lines of one file, about half a megabyte, together with where they stand in it.
Nothing is parsed here: counting newlines is all that the one reading process does per byte.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_infoentropy.data.compression import (
    DamagedFileError,
    read_chunks,
    require_readable,
)

BLOCK_BYTES = 1 << 19
MAX_LINE_BYTES = 1 << 28  # a hundred times a long book; more is no document


class BrokenLineError(ValueError):
    """A line, named by file and number, that does not hold a document."""

    def __init__(self, path: Path, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = path, line, reason


class UnfitDocumentsError(ValueError):
    """Documents that cannot become a dataset together with what was done of them so far."""


@dataclass(frozen=True)
class Position:
    """A place between two lines: bytes of decompressed text before it, number of the next line."""

    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Block:
    """Whole lines, newlines included (a file's last one may lack it), between two places.

    The one at the end of a file, without lines, has the SHA-256 of the file as it was read.
    """

    path: Path
    data: bytes
    start: Position
    end: Position
    sha256: str = ""

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return self.end.line - self.start.line


def read_blocks(
    path: Path,
    advance: Callable[[int], None] = lambda _: None,
    start: Position = Position(),
) -> Iterator[Block]:
    """Yield the lines of one file from `start` on, and last a block without any: the end.

    `advance` is called with the bytes read from the disk since the last call.

    Raises:
        BrokenLineError: the file is truncated or damaged, after the last whole line.
        ValueError: see `require_readable`.
    """
    require_readable(path)
    at = start
    pieces: list[bytes] = []  # a list, as one line may span very many chunks
    size = 0
    damage: DamagedFileError | None = None
    digest = hashlib.sha256()
    chunks = read_chunks(path, advance, start.offset, digest.update)
    while True:
        try:
            chunk = next(chunks, None)
        except DamagedFileError as error:
            chunk, damage = None, error
        if chunk is None:
            break
        pieces.append(chunk)
        size += len(chunk)
        if size >= BLOCK_BYTES and b"\n" in chunk:
            lines, _, rest = b"".join(pieces).rpartition(b"\n")
            block = _block(path, lines + b"\n", at)
            yield block
            at, pieces, size = block.end, [rest], len(rest)
        if size > MAX_LINE_BYTES:
            damage = DamagedFileError(
                f"a line of more than {MAX_LINE_BYTES >> 20} MiB: no document"
            )
            break
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
