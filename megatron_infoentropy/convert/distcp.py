"""PyTorch's distributed checkpoint format, read without PyTorch's classes for it.

    .metadata         a pickle: for every tensor its shape, dtype and pieces; for every piece the
                      file it is in, where, and how long it is
    __0_0.distcp ...  the pieces, each as torch.save writes it; which rank wrote them is past

The index is read into the plain records below. Pickles of PyTorch's own classes change with its
version (2.15 added a field, and older versions fail on it); what is needed here has not changed.
"""

import math
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.convert.errors import (
    IncompleteCheckpointError,
    UnreadableCheckpointError,
)
from megatron_infoentropy.convert.raw_numbers import read_numbers
from megatron_infoentropy.convert.torch_file import DTYPES, Extent, find_tensor
from megatron_infoentropy.convert.unpickle import unpickle


class Place(NamedTuple):
    """Where something lies: `length` bytes of a file from `start` on."""

    file: str
    start: int
    length: int


class Piece(NamedTuple):
    """A block of a tensor, from `offsets` on, of the size `sizes`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


class StoredTensor(NamedTuple):
    """Shape and dtype of a tensor as a whole, and the pieces of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class Index(NamedTuple):
    """What a checkpoint holds, by name."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Place]


def read_index(folder: Path) -> Index:
    """Read `.metadata`.

    Raises:
        UnreadableCheckpointError: it is not the index of a checkpoint, or of an unknown version.
    """
    allowed = {**DTYPES, ("torch", "Size"): torch.Size}
    root = unpickle((folder / ".metadata").read_bytes(), allowed)
    try:
        return _read(root.state)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        state = getattr(root, "state", None)
        version = state.get("version") if isinstance(state, dict) else None
        raise UnreadableCheckpointError(
            f"{folder / '.metadata'} is not the index of a checkpoint that can be read here: it "
            f"was written in version {version or 'unknown'} of PyTorch's format; known are those "
            f"up to 1.0.0, of PyTorch up to 2.15 (installed: {torch.__version__}). Save it again "
            f"with one of these ({type(error).__name__}: {error})"
        ) from error


def _read(state: dict[str, Any]) -> Index:
    objects: dict[str, Place] = {}
    places: dict[str, dict[tuple[int, ...], Place]] = {}
    for key, value in state["storage_data"].items():
        if value.state.get("transform_descriptors"):
            raise ValueError(f"{key.state['fqn']} is compressed")
        info = value.state
        place = _place(info)
        offset = key.state.get("offset")
        if offset is None:
            objects[key.state["fqn"]] = place
        else:
            places.setdefault(key.state["fqn"], {})[tuple(offset)] = place
    tensors = {}
    for name, entry in state["state_dict_metadata"].items():
        if type(entry).__name__ != "TensorStorageMetadata":
            continue
        sizes = {tuple(c.state["offsets"]): tuple(c.state["sizes"]) for c in entry.state["chunks"]}
        found = places.get(name, {})
        pieces = tuple(Piece(at, sizes[at], place) for at, place in found.items())
        dtype = entry.state["properties"].state[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} has no dtype that is known: {reprlib.repr(dtype)}")
        shape = tuple(entry.state["size"])
        _require_sizes(name, shape, *(piece[:2] for piece in pieces))
        tensors[name] = StoredTensor(shape, dtype, pieces)
    return Index(tensors, objects)


def _require_sizes(name: str, shape: Any, *pieces: tuple[Any, Any]) -> None:
    for numbers in (shape, *(part for piece in pieces for part in piece)):
        fits = len(numbers) == len(shape)
        if not fits or not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers):
            raise ValueError(
                f"{name} has the shape {reprlib.repr(shape)} with a piece {reprlib.repr(numbers)}"
            )


def _place(info: dict[str, Any]) -> Place:
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\0" in file:
        raise ValueError(f"{reprlib.repr(file)} is no name of a file in this folder")
    if not all(isinstance(number, int) and number >= 0 for number in (start, length)):
        raise ValueError(
            f"{file} has a piece at {reprlib.repr(start)} of {reprlib.repr(length)} bytes"
        )
    return Place(file, start, length)


def require_complete(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Look whether every piece is on disk, without reading it.

    Raises:
        IncompleteCheckpointError: naming the tensor, and the file with its size if there is one.
    """
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name, tensor in tensors.items():
        for _, shape, (file, start, length) in tensor.pieces:
            if math.prod(shape) * tensor.dtype.itemsize > length:
                raise UnreadableCheckpointError(
                    f"{folder / '.metadata'} says that {length} bytes hold {list(shape)} numbers "
                    f"of {name}: it is damaged"
                )
            if sizes.get(file, -1) < start + length:
                has = f"has {sizes[file]} bytes" if file in sizes else "is missing"
                raise IncompleteCheckpointError(
                    f"{folder / file} {has}; {name} needs {start + length} of it: the copy is "
                    "incomplete, or saving was interrupted; copy it again or take another iteration"
                )
        stored = sum(math.prod(piece.sizes) for piece in tensor.pieces)
        if stored < math.prod(tensor.shape):
            raise IncompleteCheckpointError(
                f"{folder} has {stored} of the {math.prod(tensor.shape)} numbers of {name}: "
                "ranks did not write their part; take another iteration"
            )


class TensorReader:
    """Reads parts of tensors; remembers where in its archive a piece's numbers begin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._extents: dict[Place, Extent] = {}

    def part(
        self, tensor: StoredTensor, index: tuple[int, ...], into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what is at an index of the first axes, joined from the pieces that have some.

        It is put at the beginning of `into`, of bytes, if that is given and large enough.

        Raises:
            UnreadableCheckpointError: a file does not hold what the index says.
        """
        axes = len(index)
        shape = tensor.shape[axes:]
        size = math.prod(shape) * tensor.dtype.itemsize
        if into is None or len(into) < size:
            into = torch.empty(size, dtype=torch.uint8)
        result = into[:size].view(tensor.dtype).view(shape)
        for piece in tensor.pieces:
            inside = tuple(at - first for at, first in zip(index, piece.offsets, strict=False))
            if not all(0 <= at < n for at, n in zip(inside, piece.sizes, strict=False)):
                continue
            ends = zip(piece.offsets[axes:], piece.sizes[axes:], strict=True)
            part = result[tuple(slice(first, first + n) for first, n in ends)]
            if part.is_contiguous():
                self._read_into(part, piece, inside, tensor)
            else:
                block = torch.empty(part.shape, dtype=part.dtype)
                self._read_into(block, piece, inside, tensor)
                part.copy_(block)
        return result

    def _read_into(
        self, part: torch.Tensor, piece: Piece, inside: tuple[int, ...], of: StoredTensor
    ) -> None:
        path = self._folder / piece.place.file
        extent = self._extents.get(piece.place)
        if extent is None:
            extent = find_tensor(path, piece.place.start, piece.place.length)
            self._extents[piece.place] = extent
        if extent.dtype != of.dtype or math.prod(extent.shape) != math.prod(piece.sizes):
            raise UnreadableCheckpointError(
                f"{path} at byte {piece.place.start}: expected {of.dtype} {list(piece.sizes)}, "
                f"got {extent.dtype} {list(extent.shape)}"
            )
        before = sum(at * math.prod(piece.sizes[axis + 1 :]) for axis, at in enumerate(inside))
        read_numbers(path, extent.start + before * of.dtype.itemsize, part)
