"""Where the numbers of a tensor lie inside what torch.save wrote, so that a few rows can be read.

torch.save writes a zip archive without compression: `data.pkl`, which says what object it is, and
`data/0`, the numbers. A checkpoint holds thousands of such archives, one after another in a file.
Here nothing but the pickle is unpacked (without running it) and the numbers stay on disk.
"""

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.convert.errors import UnreadableCheckpointError
from megatron_infoentropy.convert.unpickle import StandIn, unpickle

DTYPES: dict[tuple[str, str], Any] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_STORAGES = {  # of torch.save, where the dtype is not said beside the tensor
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
}
# What zipfile raises for archives that are damaged.
_DAMAGE = (
    *(zipfile.BadZipFile, ValueError, LookupError, OSError, EOFError, struct.error),
    *(OverflowError, RuntimeError, NotImplementedError, AssertionError),
)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of its name and its extra field


class Extent(NamedTuple):
    """A tensor on disk: its numbers begin at byte `start` of the file, in rows of C order."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def find_tensor(path: Path, offset: int, length: int) -> Extent:
    """Return where the tensor lies that torch.save wrote at `offset`, `length` bytes in all.

    Raises:
        UnreadableCheckpointError: it is no such archive, or holds no plain tensor.
    """
    with path.open("rb") as file:
        archive = _open(_Window(file, offset, length), path, offset)
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}
        rebuilt = unpickle(_read(archive, names.get("data.pkl", ""), path), DTYPES)
        dtype, skipped, shape, strides = _describe(rebuilt, path, offset)
        if strides != _contiguous(shape):
            raise UnreadableCheckpointError(
                f"{path} at byte {offset}: expected a contiguous tensor, got strides {strides}"
            )
        numbers = _stored(archive, names["data.pkl"].removesuffix("data.pkl") + "data/0", path)
        file.seek(offset + numbers.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        start = offset + numbers.header_offset + len(header) + sum(_LOCAL_HEADER.unpack(header))
        if (skipped + math.prod(shape)) * dtype.itemsize > numbers.file_size:
            raise UnreadableCheckpointError(f"{path} at byte {offset}: numbers are missing")
        return Extent(start + skipped * dtype.itemsize, dtype, shape)


def load_object(data: bytes, where: str) -> Any:
    """Load what torch.save wrote, without the numbers of its tensors and without running it.

    Raises:
        UnreadableCheckpointError: the bytes are not the archive that torch.save writes.
    """
    archive = _open(io.BytesIO(data), where, 0)
    for name in archive.namelist():
        if name.endswith("/data.pkl"):
            return unpickle(_read(archive, name, where), DTYPES)
    raise UnreadableCheckpointError(f"{where} holds an archive that torch.save did not write")


def _open(file: Any, where: object, offset: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE:
        raise UnreadableCheckpointError(
            f"{where} at byte {offset}: expected the archive that torch.save writes, got something "
            "else; the file is damaged or was cut off, copy it again"
        ) from None


def _stored(archive: zipfile.ZipFile, name: str, where: object) -> zipfile.ZipInfo:
    """A member as torch.save writes them: uncompressed, so that it cannot swell."""
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise UnreadableCheckpointError(
            f"{where} holds an archive that torch.save did not write: no {name or 'data.pkl'}"
        ) from None
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise UnreadableCheckpointError(f"{where}: {name} is compressed, which torch.save never is")
    return member


def _read(archive: zipfile.ZipFile, name: str, where: object) -> bytes:
    try:
        return archive.read(_stored(archive, name, where))
    except UnreadableCheckpointError:
        raise
    except _DAMAGE as error:
        raise UnreadableCheckpointError(f"{where}: {name} is damaged ({error})") from None


def _describe(
    rebuilt: Any, path: Path, offset: int
) -> tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    """(dtype, numbers before the first, shape, strides) of what torch's _rebuild_tensor_v2 says."""
    try:
        if type(rebuilt).__name__ not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            raise TypeError
        storage, skipped, shape, strides, *rest = rebuilt.arguments
        _, kind, *_ = storage.arguments[0]
        given = [dtype for dtype in rest if isinstance(dtype, torch.dtype)]
        dtype = given[0] if given else _STORAGES[kind.__name__]
        return dtype, int(skipped), tuple(shape), tuple(strides)
    except (TypeError, ValueError, AttributeError, LookupError):
        name = type(rebuilt).__name__ if isinstance(rebuilt, StandIn) else rebuilt
        raise UnreadableCheckpointError(
            f"{path} at byte {offset}: expected a plain floating-point tensor, got {name}"
        ) from None


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, math.prod(shape[axis + 1 :])) for axis in range(len(shape)))


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + to < 0:
            raise OSError("before the beginning")  # what zipfile expects of files that are short
        self._at = base + to
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._offset + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
