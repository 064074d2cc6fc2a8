"""Writing PyTorch's distributed checkpoint format piece by piece, as Megatron reads it.

A piece is a tensor, or one layer of a stacked one: a model never has to be in memory whole. Pieces
need not be those of the ranks that will read: PyTorch's reader cuts and joins them for any layout.

A journal has a line for every piece that is on disk whole. From it a later writer goes on.
"""

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

FILE_BYTES = 2_000_000_000


class _Piece(NamedTuple):
    """A line of the journal; without a dtype it is an object."""

    name: str
    dtype: str | None
    whole: list[int]  # shape of the tensor that this is a piece of
    offset: list[int]
    sizes: list[int]
    file: str
    start: int
    length: int


class CheckpointWriter:
    """Writes `.distcp` files of about `file_bytes` each; `finish` writes the index.

    With a journal, what an interrupted writer of the same checkpoint had written is kept.
    """

    def __init__(
        self, folder: Path, *, journal: Path | None = None, file_bytes: int = FILE_BYTES
    ) -> None:
        self._folder, self._journal, self._limit = folder, journal, file_bytes
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._written: set[tuple[str, tuple[int, ...]]] = set()
        self._number, self._filled = 0, 0
        if journal is not None:
            self._go_on(journal)

    def has(self, name: str, index: tuple[int, ...] = ()) -> bool:
        """Say whether this piece, or object, was written before."""
        return (name, _start(index)) in self._written

    def tensor(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        index: tuple[int, ...] = (),
        of: tuple[int, ...] = (),
    ) -> None:
        """Append a whole tensor, or what is at an index of a stacked one with these first axes."""
        whole = [*of, *tensor.shape]
        offset = [*index, *[0] * tensor.ndim]
        sizes = [*[1] * len(of), *tensor.shape]
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = self._append(tensor.contiguous().view(sizes))
        self._enter(_Piece(name, dtype, whole, offset, sizes, *place))

    def object(self, name: str, content: Any) -> None:
        """Append something that is not numbers, in the list Megatron keeps it in."""
        self._enter(_Piece(name, None, [], [], [], *self._append([content])))

    def finish(self) -> None:
        """Write the index; what was written before becomes a checkpoint by it."""
        index = Metadata(self._entries, storage_data=self._places, version="1.0.0")
        (self._folder / ".metadata").write_bytes(pickle.dumps(index))

    def _append(self, content: Any) -> tuple[str, int, int]:
        if self._filled > self._limit:
            self._number, self._filled = self._number + 1, 0
        name = f"__{self._number}_0.distcp"
        with (self._folder / name).open("ab") as file:
            start = file.seek(0, io.SEEK_END)
            # Not into the file itself: torch.save counts its zip's offsets from the file's start.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            file.write(buffer.getbuffer())
            return name, start, buffer.tell()

    def _enter(self, piece: _Piece) -> None:
        self._register(piece)
        if self._journal is not None:
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(piece) + "\n")

    def _register(self, piece: _Piece) -> None:
        self._filled = piece.start + piece.length
        self._written.add((piece.name, _start(piece.offset)))
        place = _StorageInfo(piece.file, piece.start, piece.length)
        if piece.dtype is None:
            self._entries[piece.name] = BytesStorageMetadata()
            self._places[MetadataIndex(piece.name)] = place
            return
        properties = TensorProperties(dtype=getattr(torch, piece.dtype))
        new = TensorStorageMetadata(properties, size=torch.Size(piece.whole), chunks=[])
        entry = self._entries.setdefault(piece.name, new)
        assert isinstance(entry, TensorStorageMetadata)
        offset = torch.Size(piece.offset)
        entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(piece.sizes)))
        self._places[MetadataIndex(piece.name, offset, len(entry.chunks) - 1)] = place

    def _go_on(self, journal: Path) -> None:
        """Take over the pieces that are whole, and remove what was written after the last one."""
        sizes = {path.name: path.stat().st_size for path in self._folder.glob("*.distcp")}
        whole, text = [], journal.read_text(encoding="utf-8") if journal.exists() else ""
        for line in text.splitlines():
            try:
                piece = _Piece(*json.loads(line))
            except (ValueError, TypeError):
                break  # interrupted while this line was written
            if sizes.get(piece.file, 0) < piece.start + piece.length:
                break
            self._register(piece)
            whole.append(line + "\n")
        if "".join(whole) != text:
            new = journal.with_name(journal.name + ".new")
            new.write_text("".join(whole), encoding="utf-8")
            new.replace(journal)
        ends = {place.relative_path: place.offset + place.length for place in self._places.values()}
        for name, size in sizes.items():
            if name not in ends:
                (self._folder / name).unlink()
            elif size > ends[name]:
                os.truncate(self._folder / name, ends[name])
        self._number = max(len(ends) - 1, 0)


def _start(offset: Sequence[int]) -> tuple[int, ...]:
    """Return where a piece begins, without the zeros at the end: of an index, or of all axes."""
    end = max((axis + 1 for axis, at in enumerate(offset) if at), default=0)
    return tuple(offset[:end])
