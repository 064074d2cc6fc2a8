"""PyTorch's distributed checkpoint format, read without running what is in it, and written.

    .metadata         a pickle: for every tensor its shape, dtype and pieces; for every piece the
                      file it is in, where, and how long it is
    __0_0.distcp ...  the pieces, each as torch.save writes it; which rank wrote them is past

PyTorch's reader unpickles the index and loads a piece whole, whatever part of it is wanted. Here
`unpickle` reads the index, in any version of its classes, and of a piece the part is read that is
asked for: one layer of a stacked parameter. PyTorch's planning finds and joins the pieces, and its
writer asks for the tensors one by one.
"""

import io
import math
import os
import reprlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _ReaderView

from megatron_infoentropy.convert.errors import ConversionError
from megatron_infoentropy.convert.unpickle import DTYPES, load_object, pickle_of, unpickle

Shape = tuple[int, ...]
Part = tuple[str, Shape, Shape, Callable[[], Tensor]]


class DistcpReader(FileSystemReader):
    """PyTorch's reader of a checkpoint's folder, for files that may come from anywhere.

    Raises:
        ConversionError: `.metadata` is not the index of a checkpoint, or of an unknown
            version.
    """

    tensors: dict[str, Tensor]  # on the device meta: shapes and dtypes
    objects: list[str]  # the names of what is not numbers

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self._index = self.read_metadata()
        self.set_up_storage_reader(self._index, is_coordinator=True)
        entries = self._index.state_dict_metadata
        self.tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = [key.fqn for key in self.storage_data if key.offset is None]

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read `.metadata`; nothing that is in it runs."""
        path = self.folder / ".metadata"
        root = unpickle(path.read_bytes(), {**DTYPES, ("torch", "Size"): torch.Size})
        try:
            return _index_of(root.state)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            state = getattr(root, "state", None)
            version = state.get("version", "unknown") if isinstance(state, dict) else "unknown"
            raise ConversionError(
                f"{path} is not the index of a checkpoint that can be read here: it was written in "
                f"version {reprlib.repr(version).strip("'")} of PyTorch's format; known are "
                f"those up to 1.0.0, of PyTorch up to 2.15 (installed: {torch.__version__}). Save "
                f"it again with one of these ({type(error).__name__}: {error})"
            ) from error

    def require_complete(self, names: Iterable[str]) -> None:
        """Look whether every piece of these tensors is on disk, without reading it."""
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        for name in names:
            tensor, stored = self.tensors[name], 0
            for chunk in self._chunks(name):
                place = self.storage_data[MetadataIndex(name, chunk.offsets)]
                file, end = place.relative_path, place.offset + place.length
                numbers = math.prod(chunk.sizes)
                if numbers * tensor.itemsize > place.length:
                    raise ConversionError(
                        f"{self.folder / '.metadata'} says that {place.length} bytes hold "
                        f"{list(chunk.sizes)} numbers of {name}: it is damaged"
                    )
                if sizes.get(file, -1) < end:
                    has = f"has {sizes[file]} bytes" if file in sizes else "is missing"
                    raise ConversionError(
                        f"{self.folder / file} {has}; {name} needs {end} of it: the copy is "
                        "incomplete, or saving was interrupted; copy it again or take another "
                        "iteration"
                    )
                stored += numbers
            if stored < tensor.numel():
                raise ConversionError(
                    f"{self.folder} has {stored} of the {tensor.numel()} numbers of {name}: "
                    "ranks did not write their part; take another iteration"
                )

    def read(self, name: str, index: Shape = ()) -> Tensor:
        """Return what is at an index of the first axes, joined from the pieces that have some."""
        whole = self.tensors[name]
        shape = whole.shape[len(index) :]
        wanted = _chunk(index, shape)
        result = torch.empty(wanted.sizes, dtype=whole.dtype)
        near = [  # of thousands, where every expert has some: the planning sorts what it is given
            chunk
            for chunk in self._chunks(name)
            if all(
                first <= at < first + n
                for at, first, n in zip(index, chunk.offsets, chunk.sizes, strict=False)
            )
        ]
        entry = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, near)
        for item in create_read_items_for_chunk_list(name, entry, [wanted]):
            place = item.storage_index
            assert place.index is not None  # the planning says which chunk it is
            piece = self._map(place, near[place.index].sizes)
            part = piece[_slices(item.storage_offsets, item.lengths)]
            result[_slices(item.dest_offsets, item.lengths)] = part
        return result.view(shape)

    def read_object(self, name: str) -> Any:
        """Return what is not numbers; objects of unknown classes are stand-ins."""
        place = self.storage_data[MetadataIndex(name)]
        path = self.folder / place.relative_path
        if not path.is_file():
            raise ConversionError(f"{path} is missing; {name} is in it")
        with path.open("rb") as file:
            return load_object(self._slice_file(file, place), f"{path} ({name})")

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> Any:
        return _Slice(file, sinfo.offset, sinfo.length)

    def _chunks(self, name: str) -> list[ChunkStorageMetadata]:
        entry = self._index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.chunks

    def _map(self, index: MetadataIndex, sizes: Shape) -> Tensor:
        """Return a piece whose numbers are read where they lie, when they are asked for."""
        place, tensor = self.storage_data[index], self.tensors[index.fqn]
        path = self.folder / place.relative_path
        where = f"{path} at byte {place.offset}"
        with path.open("rb") as file:
            archive = self._slice_file(file, place)
            pickle_of(archive, where)
            archive.seek(0)
            try:  # on the device meta, no numbers are read
                saved = torch.load(archive, map_location="meta", weights_only=True)
                if saved.dtype != tensor.dtype or saved.numel() != math.prod(sizes):
                    raise ValueError(f"got {saved.dtype} {list(saved.shape)}")
                numbers = saved.untyped_storage()
                if numbers._checkpoint_offset + numbers.nbytes() > place.length:
                    raise ValueError("numbers are missing")
                start = place.offset + numbers._checkpoint_offset
                mapped = torch.from_numpy(np.memmap(path, np.uint8, "c", start, numbers.nbytes()))
                piece = mapped.view(saved.dtype).as_strided(
                    saved.shape, saved.stride(), saved.storage_offset()
                )
                return piece.view(sizes)
            except Exception as error:  # damage ends in errors of every kind
                said = error if isinstance(error, ValueError) else type(error).__name__
                raise ConversionError(
                    f"{where}: expected {tensor.dtype} {list(sizes)} as torch.save writes: {said}"
                ) from error


def write_distcp(
    folder: Path, dtype: torch.dtype, parts: Iterable[Part], objects: dict[str, Any]
) -> None:
    """Write a checkpoint, of one file beside its index.

    Args:
        folder: where to; it is made.
        dtype: of all tensors.
        parts: (name, shape of the tensor as a whole, index of this part of it along the first axes,
            what returns the part); called in this order, one part is in memory at a time.
        objects: what is not numbers, each to be kept in the list in which Megatron keeps it.
    """
    items: list[WriteItem] = []
    contents: dict[MetadataIndex, Callable[[], Any]] = {}
    for name, whole, index, part in parts:
        chunk = _chunk(index, whole[len(index) :])
        item = WriteItem(
            MetadataIndex(name, chunk.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, TensorProperties(dtype), torch.Size(whole)),
        )
        items.append(item)
        contents[item.index] = part
    for name, content in objects.items():
        buffer = io.BytesIO()
        torch.save([content], buffer)
        item = WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
        items.append(item)
        contents[item.index] = partial(io.BytesIO, buffer.getvalue())
    plans, index_file = create_default_global_save_plan([SavePlan(items)])
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(plans[0])])
    written = writer.write_data(plan, _Contents(contents))
    writer.finish(index_file, [written.value()])


class _Contents(DefaultSavePlanner):
    """Tells PyTorch's writer what to write when it asks, so that nothing waits in memory."""

    def __init__(self, contents: dict[MetadataIndex, Callable[[], Any]]) -> None:
        super().__init__()
        self._contents = contents

    def resolve_data(self, write_item: WriteItem) -> Any:
        content = self._contents[write_item.index]()
        data = write_item.tensor_data
        return content if data is None else content.contiguous().view(data.chunk.sizes)


class _Slice(_ReaderView):
    """A part of a file; PyTorch's own goes astray where zipfile seeks from the end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:
            offset, whence = self.len + offset, os.SEEK_SET
        return super().seek(offset, whence)


def _chunk(index: Shape, shape: Shape) -> ChunkStorageMetadata:
    """Return the block at an index of the first axes; `shape` is that of the others."""
    offsets, sizes = (*index, *[0] * len(shape)), (*[1] * len(index), *shape)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _slices(offsets: Shape, lengths: Shape) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(offsets, lengths, strict=True))


def _index_of(state: dict[str, Any]) -> Metadata:
    """Return PyTorch's index, of which only what is needed here is taken, and looked at."""
    places: dict[MetadataIndex, _StorageInfo] = {}
    entries: dict[str, STORAGE_TYPES] = {}
    for key, value in state["storage_data"].items():
        name, offset = key.state["fqn"], key.state.get("offset")
        if value.state.get("transform_descriptors"):
            raise ValueError(f"{reprlib.repr(name)} is compressed")
        places[MetadataIndex(name, offset)] = _place(value.state)
    for name, entry in state["state_dict_metadata"].items():
        if type(entry).__name__ != "TensorStorageMetadata":
            entries[name] = BytesStorageMetadata()
            continue
        dtype, shape = entry.state["properties"].state[0], entry.state["size"]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype that is known: {reprlib.repr(dtype)}")
        chunks = [(c.state["offsets"], c.state["sizes"]) for c in entry.state["chunks"]]
        _require_sizes(name, shape, *chunks)
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype),
            torch.Size(shape),
            [
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes in chunks
                if MetadataIndex(name, offsets) in places
            ],
        )
    return Metadata(entries, storage_data=places)


def _require_sizes(name: str, shape: Any, *pieces: tuple[Any, Any]) -> None:
    for numbers in (shape, *(part for piece in pieces for part in piece)):
        fits = len(numbers) == len(shape)
        if not fits or not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers):
            raise ValueError(
                f"{name} has the shape {reprlib.repr(shape)} with a piece {reprlib.repr(numbers)}"
            )


def _place(info: dict[str, Any]) -> _StorageInfo:
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\0" in file:
        raise ValueError(f"{reprlib.repr(file)} is no name of a file in this folder")
    if not all(isinstance(number, int) and number >= 0 for number in (start, length)):
        raise ValueError(
            f"{file} has a piece at {reprlib.repr(start)} of {reprlib.repr(length)} bytes"
        )
    return _StorageInfo(file, start, length)
