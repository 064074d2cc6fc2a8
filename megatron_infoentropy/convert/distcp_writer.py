"""Writing PyTorch's distributed checkpoint format piece by piece, as Megatron reads it.

A piece is a tensor, or one layer of a stacked one: a model never has to be in memory whole. Pieces
need not be those of the ranks that will read: PyTorch's reader cuts and joins them for any layout.
"""

import io
import pickle
from pathlib import Path
from typing import Any

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


class CheckpointWriter:
    """Writes `.distcp` files of about `file_bytes` each; `finish` writes the index."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder, self._limit = folder, file_bytes
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._number, self._filled = 0, 0

    def tensor(
        self, name: str, tensor: torch.Tensor, *, layer: int | None = None, layers: int = 0
    ) -> None:
        """Append a whole tensor, or one layer of a stacked one that has `layers` of them."""
        whole = tuple(tensor.shape)
        if layer is not None:
            tensor, whole = tensor[None], (layers, *whole)
        offset = torch.Size([layer or 0, *[0] * (len(whole) - 1)])
        entry = self._entries.setdefault(
            name,
            TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), size=torch.Size(whole), chunks=[]
            ),
        )
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(offset, tensor.shape))
        self._append(MetadataIndex(name, offset, len(entry.chunks) - 1), tensor.contiguous())

    def object(self, name: str, content: Any) -> None:
        """Append something that is not numbers, in the list Megatron keeps it in."""
        self._entries[name] = BytesStorageMetadata()
        self._append(MetadataIndex(name), [content])

    def finish(self) -> None:
        """Write the index; what was written before becomes a checkpoint by it."""
        index = Metadata(self._entries, storage_data=self._places, version="1.0.0")
        (self._folder / ".metadata").write_bytes(pickle.dumps(index))

    def _append(self, index: MetadataIndex, content: Any) -> None:
        if self._filled > self._limit:
            self._number, self._filled = self._number + 1, 0
        name = f"__{self._number}_0.distcp"
        with (self._folder / name).open("ab") as file:
            start = file.seek(0, io.SEEK_END)
            # Not into the file itself: torch.save counts its zip's offsets from the file's start.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            file.write(buffer.getbuffer())
            length = buffer.tell()
        self._filled = start + length
        self._places[index] = _StorageInfo(name, start, length)
