"""The weights of a Hugging Face folder, read tensor by tensor: one `.safetensors` file or many."""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_infoentropy.convert.errors import (
    IncompleteCheckpointError,
    UnreadableCheckpointError,
    UnsupportedModelError,
)
from megatron_infoentropy.convert.raw_numbers import read_numbers
from megatron_infoentropy.convert.to_hf import INDEX
from megatron_infoentropy.convert.weights_file import NAMES

_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_WHOLE = "model.safetensors"
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", "inv_freq", ".masked_bias")
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # absent in some old exports
_COMPARED_NUMBERS = 2**24  # of each of two tables, at a time
_MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit


def parameter_names(stored: Iterable[str], family: str) -> dict[str, str]:
    """{a parameter's name in transformers' model: its name in the files}."""
    prefix = _PREFIXES.get(family, "")
    return {
        name if name.startswith((prefix, "lm_head.", "embed_out.")) else prefix + name: name
        for name in stored
    }


class Stored(NamedTuple):
    """A tensor on disk: its numbers begin at byte `start` of `path`."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class HuggingFaceWeights:
    """What parameters a folder holds, and their numbers on request; old buffers are left out.

    Raises:
        UnreadableCheckpointError: no safetensors files, or one that is damaged.
        IncompleteCheckpointError: a file of the index, a part of a file, or a tensor is missing.
        UnsupportedModelError: a tensor in another dtype than fp32, bf16 or fp16.
    """

    tensors: dict[str, Stored]

    def __init__(self, folder: Path) -> None:
        wanted = _weight_map(folder)
        if wanted is None:
            self.tensors = _read_header(folder / _WHOLE)
            return
        self.tensors = {}
        for file in sorted(set(wanted.values())):
            stored = _read_header(folder / file)
            said = {name for name, place in wanted.items() if place == file}
            if other := min(said ^ stored.keys(), default=None):  # transformers reads all there is
                does, does_not = ("says", "does not") if other in said else ("does not say", "does")
                raise IncompleteCheckpointError(
                    f"{folder / INDEX} {does} that {file} holds {other}, and it {does_not}: the "
                    "folder mixes two exports; copy it again"
                )
            self.tensors |= stored

    @property
    def dtype(self) -> torch.dtype:
        """That of all of them, or fp32 where they differ; config.json may say another, or none."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in the dtype it was saved in."""
        path, start, dtype, shape = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        read_numbers(path, start, tensor)
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Say whether two tables hold the same numbers, reading some rows of both at a time."""
        first, second = self.tensors[one], self.tensors[other]
        if first.shape != second.shape:
            return False
        width = math.prod(first.shape[1:])
        step = max(1, _COMPARED_NUMBERS // max(1, width))
        for start in range(0, first.shape[0], step):
            rows = min(step, first.shape[0] - start)
            pair = [torch.empty(rows, width, dtype=table.dtype) for table in (first, second)]
            for table, into in zip((first, second), pair, strict=True):
                read_numbers(table.path, table.start + start * width * into.itemsize, into)
            if not torch.equal(pair[0].float(), pair[1].float()):
                return False
        return True


def _weight_map(folder: Path) -> dict[str, str] | None:
    """{tensor: file} of the index; None where there is one file without an index."""
    if (folder / INDEX).is_file():
        wanted = _read_index(folder / INDEX)
        if (folder / _WHOLE).is_file() and set(wanted.values()) != {_WHOLE}:
            raise UnreadableCheckpointError(
                f"{folder} holds {_WHOLE}, which transformers would read, and {INDEX}, which names "
                "other files: one of them is of an earlier export; remove that"
            )
        return wanted
    if not (folder / _WHOLE).is_file():
        other = [path.name for path in folder.glob("*.bin")]
        raise UnreadableCheckpointError(
            f"expected {_WHOLE} or {INDEX} in {folder}, got {other or 'no weights'}; .bin files "
            "are pickles: load the model with transformers and save it again as safetensors"
        )
    return None


def _read_index(path: Path) -> dict[str, str]:
    try:
        files: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        for file in files.values():
            if file in ("", ".", "..") or "/" in file or "\0" in file:
                raise ValueError(f"{file!r} is no name of a file in this folder")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableCheckpointError(f"{path} is no index of weights: {error}") from None
    return _without_buffers(files)


def _without_buffers(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if not name.endswith(_BUFFERS)}


def _read_header(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise IncompleteCheckpointError(f"{path} is missing; the index names it; copy it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _MAX_HEADER + 1
        try:
            entries: dict[str, Any] = json.loads(file.read(length) if length <= _MAX_HEADER else "")
            entries.pop("__metadata__", None)
            entries = _without_buffers(entries)
            _require_numbers(entries)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            raise UnreadableCheckpointError(
                f"{path} is no safetensors file, or a damaged one; copy it again"
            ) from None
    tensors = {name: _stored(path, 8 + length, name, entry) for name, entry in entries.items()}
    for name, (_, start, dtype, shape) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        if end > size:
            raise IncompleteCheckpointError(
                f"{path} has {size} bytes; {name} needs {end} of it: the copy is incomplete, copy "
                "it again"
            )
    return tensors


def _stored(path: Path, after_header: int, name: str, entry: dict[str, Any]) -> Stored:
    if entry["dtype"] not in _DTYPES:
        raise UnsupportedModelError(
            f"expected weights in {', '.join(_DTYPES)}, got {name} in {entry['dtype']}; take the "
            "model before it was quantised"
        )
    start = after_header + entry["data_offsets"][0]
    return Stored(path, start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _require_numbers(entries: dict[str, Any]) -> None:
    for entry in entries.values():
        numbers = [*entry["shape"], *entry["data_offsets"]]
        if not entry["data_offsets"] or not isinstance(entry["dtype"], str):
            raise ValueError("an entry without offsets or dtype")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a size that is none")
